from davylamp.cli import main

main()
