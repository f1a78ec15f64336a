# Everything below works in a fresh clone on a machine with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/pytest -q -n 2 --dist worksteal
export OMP_NUM_THREADS = 1

.PHONY: help tour setup check test slow claims docs organisms lamp bench size clean
help:            ## what there is to make
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

tour: $(VENV)/models.done   ## walk through the product on the built-in models; ends with one HTML report
	$(BIN)/davylamp tour

setup: $(VENV)/dev.done ## the developer's environment, with pre-commit hooks
	-$(BIN)/pre-commit install

check: $(VENV)/dev.done ## format, lint, types and quick tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

test: $(VENV)/dev.done  ## all tests
	$(PYTEST)

slow: $(VENV)/dev.done  ## only the slow tests
	$(PYTEST) -m slow

claims: $(VENV)/dev.done ## every claim beside its control, those that take minutes among them
	DAVYLAMP_LONG=1 $(PYTEST) tests/claims

docs: $(VENV)/dev.done  ## the documentation site, in site/
	$(INSTALL) -e '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

organisms: $(VENV)/models.done ## train the built-in models again from scratch (three seeds, about 75 minutes)
	$(BIN)/python -m davylamp.models.organism_make all

lamp: $(VENV)/dev.done  ## train the embedded guard again and write its card: make lamp DATA=FOLDER FORTUNES=FOLDER (about 15 minutes)
	@test -d "$(DATA)" -a -d "$(FORTUNES)" || { echo "lamp needs DATA=, the folder of public rows, and FORTUNES=, that of Debian's fortunes (docs/guards.md)"; exit 2; }
	rm -rf dist/lamp
	$(BIN)/davylamp guard train lamp --only hashed --held davylamp/assets/overrefusal/rows.jsonl --rows own --rows public:$(DATA) --rows fortunes:$(FORTUNES)\#6000 --out dist/lamp/hashed --runs dist/runs
	$(BIN)/davylamp guard train lamp --only encoder --held davylamp/assets/overrefusal/rows.jsonl --rows own --rows public:$(DATA) --rows fortunes:$(FORTUNES)\#3000 --out dist/lamp/encoder --runs dist/runs
	cp dist/lamp/hashed/hashed.npz dist/lamp/encoder/minilm.npz davylamp/assets/lamp/
	$(BIN)/python -m davylamp.guards._lamp_card $(DATA)

bench: $(VENV)/dev.done ## the speed table of docs/performance.md
	for file in benchmarks/runner.py benchmarks/hf_batching.py benchmarks/report.py; do $(BIN)/python $$file || exit 1; done

size:            ## lines per file; over 400 needs a reason
	@find davylamp -name '*.py' | xargs wc -l | sort -rn | head -20

clean:           ## remove the environment and what was built; runs stay
	rm -rf $(VENV) site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/pip.done:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/models.done: $(VENV)/pip.done pyproject.toml constraints.txt
	$(INSTALL) -e '.[train]'
	@touch $@

$(VENV)/dev.done: $(VENV)/pip.done pyproject.toml constraints.txt
	$(INSTALL) -e '.[all,dev]'
	@touch $@
