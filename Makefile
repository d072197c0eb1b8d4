# make demo   install, then run the main job on data that needs no download, and report on it
# make test   install, then run the tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test slow bench bench-gpu docs lint format install clean

demo: install
	$(BIN)/fedleak simulate demo --jobs 2 --out results/runs/demo --overwrite
	$(BIN)/fedleak report results/runs/demo

test: install
	$(BIN)/pytest -n 2

slow: install
	$(BIN)/pytest -m "slow and not ray" -n 2
	$(BIN)/pytest -m "slow and ray"

# Ratios against dense linear algebra and the published attacks, as JSON that names the machine; takes
# about an hour.
BENCH ?= results/runs/bench
bench: install
	$(BIN)/python -m tests.benchmarks.linear --json $(BENCH)/linear.json
	$(BIN)/python -m tests.benchmarks.hybrid --json $(BENCH)/hybrid.json
	$(BIN)/python -m tests.benchmarks.launches --json $(BENCH)/launches.json
	$(BIN)/python -m tests.benchmarks.batches --json $(BENCH)/batches.json
	$(BIN)/python -m tests.benchmarks.fedavg --json $(BENCH)/fedavg.json
	$(BIN)/python -m tests.benchmarks.fedavg --memory
	$(BIN)/python -m tests.benchmarks.metric --json $(BENCH)/metric.json
	$(BIN)/python -m tests.benchmarks.pairs

# On a machine with a card and torch, numpy and scipy, for ten minutes; installs nothing.
bench-gpu:
	mkdir -p $(BENCH)
	$(PYTHON) -m tests.benchmarks.card --json $(BENCH)/card.json

# The documentation, into site/: open site/index.html. To search in it: python3 -m http.server -d site
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedleak needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); with PyTorch this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
