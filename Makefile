# Two commands from nothing but Python 3.10+, make and a package index: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m-instruct-q4_1.gguf
DEMO_INDEX := indexes/demo

.PHONY: help demo test test-slow test-oldest lint check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install, fetch a small model, build an index, decode from it"
	@echo "make test       install and run the tests"
	@echo "make test-slow  also the tests that run a real language model or thousands of examples"
	@echo "make test-oldest  a quick look with the oldest Python that is promised"
	@echo "make lint       formatting, lint and types"
	@echo "make check      lint and test: what a change must pass"

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

$(MODEL): | $(VENV)/.base
	$(BIN)/python demo/fetch_model.py $@

$(DEMO_INDEX)/manifest.json: demo/corpus.jsonl $(MODEL) | $(VENV)/.demo
	$(BIN)/coreinfer-sim build-index demo/corpus.jsonl --model $(MODEL) --prompt-column prompt \
		--template '{prompt}\n{completion}' --clusters 10 --out $(DEMO_INDEX) --force

demo: $(VENV)/.demo $(DEMO_INDEX)/manifest.json
	$(BIN)/coreinfer-sim generate --index $(DEMO_INDEX) --model $(MODEL) --mode similarity --read-ratio 0.6 \
		--chat --compare --max-new-tokens 64 --file demo/prompts.txt

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

clean:
	rm -rf $(VENV) $(VENV)-* models $(DEMO_INDEX) build *.egg-info
