# make demo | test | check | docs: each makes .venv first and reuses it when it is up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/demo

# One thread for each test process: two processes with a thread each are faster than two that fight for the cores.
export TOKENIZERS_PARALLELISM ?= true

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format docs docs-serve clean

help:
	@echo "make demo    train, kill, resume bit for bit, measure, average, open in transformers: five minutes"
	@echo "make test    the whole test suite"
	@echo "make check   style, types, and who imports whom"
	@echo "make docs    the documentation, into site/"

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "cairn needs Python 3.11 or newer, and '$(PYTHON)' is not; name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || test -x $(BIN)/pip || { \
	  echo "This Python has no venv module; on Debian and Ubuntu 'apt-get install python3-venv' brings it." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(VENV) was made with a Python older than 3.11; remove it and run make again." >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch>=2.11,<=2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[hf,science,scale,harness,serve,quant,dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/cairn demo -o $(OUT)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tools/check_imports.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY)
	$(BIN)/mkdocs serve

clean:
	rm -rf site .pytest_cache .mypy_cache .ruff_cache .hypothesis
