# `make demo` and `make test` are all that a new user needs; each first makes .venv where it is missing or out of date.
# Needed beforehand: Python 3.10 or newer, make, a C++ compiler.

# The Python that .venv is made with, the torch to put in ("torch==2.4.1"; empty: what .venv has, else the default of
# tools/setup_env.py), and how many compilers may run at once (empty: one per core).
PYTHON ?= python3
TORCH ?=
MAX_JOBS ?=

BIN := .venv/bin
SETUP = $(PYTHON) tools/setup_env.py --torch '$(TORCH)' --jobs '$(MAX_JOBS)'

.DEFAULT_GOAL := help
.PHONY: help demo test test-onedl test-oldest lint setup clean python environment

help:
	@echo "make demo    train, compress, evaluate and compare a small Mask R-CNN (results in work_dirs/demo)"
	@echo "make test    lint and type checks, then the tests"
	@echo "make test-onedl   the tests with the maintained forks (onedl-mm*), in .venv-onedl"
	@echo "make test-oldest  the tests with the oldest torch that is promised, in .venv-oldest"
	@echo "make lint    lint and type checks alone"
	@echo "make setup   make .venv, or check and mend it (variables: PYTHON, TORCH, MAX_JOBS)"
	@echo "make clean   remove caches and build files; .venv, data and work_dirs stay"

demo: environment
	@$(BIN)/python tools/demo.py

test: lint
	$(BIN)/python -m pytest

test-onedl test-oldest: test-%: python
	@SLOPE_STACK=$* $(SETUP) --if-needed
	.venv-$*/bin/python -m pytest

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy slope_mm

setup: python
	@$(SETUP)

environment: python
	@$(SETUP) --if-needed

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "slope_mm needs Python 3.10 or newer, and '$(PYTHON)' is none: install one (Debian: apt-get install" \
	    "python3 python3-venv python3-dev) or name one (make PYTHON=python3.11 ...), and run make again" >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find slope_mm tools tests configs -name __pycache__ -prune -exec rm -rf {} +
