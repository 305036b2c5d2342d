# Every target installs what it needs into .venv and is quick when nothing changed.
# the first of these that runs and is at least 3.11
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
WORKERS ?= 2

.PHONY: help install dev demo test test-all lint bench docs clean
help:
	@echo "make install | demo | test | test-all | lint | bench | docs | clean"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "lynceus needs Python >= 3.11; $$(python3 -V 2>&1) is too old or missing. Run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lynceus into $(VENV) (some minutes the first time) ..."
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing lynceus and what its tests need into $(VENV) (some minutes the first time) ..."
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed

dev: $(VENV)/.dev

demo: $(VENV)/.installed
	$(BIN)/lynceus demo

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check lynceus tests bench
	$(BIN)/ruff format --check lynceus tests bench
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m bench

docs: $(VENV)/.dev
	$(BIN)/python -m docs.build
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist
