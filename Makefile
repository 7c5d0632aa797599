# Two commands do everything on a fresh machine: `make demo` and `make test`. VENV=<folder> reuses an environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.kdrun-ready
# Processes that share the tests, a file each; every one computes on a single thread.
WORKERS ?= auto

.PHONY: help setup demo test lint type slow ledger clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 10

setup: $(READY) ## make the environment (in VENV) and install kdrun into it

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: setup ## train teacher, student alone, KD and PLD on real digits (about two minutes)
	$(BIN)/kdrun train

test: setup lint type ## check style and types, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

slow: setup ## the long tests too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow or not slow"

lint: setup ## style
	$(BIN)/ruff check kdrun tests && $(BIN)/ruff format --check kdrun tests

type: setup ## types
	$(BIN)/mypy

ledger: setup ## write the ledger's table into README.md
	$(BIN)/python -m kdrun.ledger.readme README.md

clean: ## remove caches (runs and environments stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
