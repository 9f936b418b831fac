# Two commands from nothing but Python 3.10+, make and a package index: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m-instruct-q4_1.gguf

.PHONY: help demo test test-slow test-oldest lint check check-docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install, fetch a small model, answer three questions, sparse beside dense"
	@echo "make test       install and run the tests"
	@echo "make test-slow  also the tests that run a real language model or thousands of examples"
	@echo "make test-oldest  a quick look with the oldest Python that is promised"
	@echo "make lint       formatting, lint and types"
	@echo "make check      lint and test: what a change must pass"
	@echo "make check-docs  run the notebooks and build the site into docs/_build; a warning or a broken link fails"

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/coreinfer-sim demo

$(MODEL): | $(VENV)/.dev
	mkdir -p $(@D)
	cp "$$($(BIN)/python -m coreinfer_sim_cli.demo_model)" $@

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.dev $(MODEL)
	$(BIN)/python -m pytest -m slow

test-oldest: $(VENV)/.dev
	.ci/python 3.10

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python figures/tables.py --check

check: lint test

check-docs: $(VENV)/.docs
	$(BIN)/python -m coreinfer_sim_cli.demo_model
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build

clean:
	rm -rf $(VENV) $(VENV)-* models build *.egg-info
