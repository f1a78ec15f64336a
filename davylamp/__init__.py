"""davylamp: full-stack safety for language models and agents. See `davylamp --help` and docs/."""

__version__ = "0.1.0"
