# Everything starts here: `make train` on a machine with only Python and make trains a model.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install train test test-all test-gpu check format docs bench bench-gpu effects picture clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One environment for everything; made anew when what it is made from changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"llmtrain needs Python 3.11, 3.12 or 3.13; $(PYTHON) is {v.major}.{v.minor}. Name another: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(EDITION)'
	@touch $@

EDITION = .
$(VENV)/.ready-dev: EDITION = .[dev]
$(VENV)/.ready-dev: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(EDITION)'
	@touch $@

install: $(READY) ## make .venv with llmtrain in it

train: $(READY) ## train the default job; pass overrides with ARGS="model=gpt_small train.steps=3"
	$(BIN)/llmtrain train $(ARGS)

test: $(VENV)/.ready-dev ## run the tests, two at a time (JOBS=8: more); pass pytest options with ARGS="-k tokenizer"
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.ready-dev ## run the tests, the slow ones too
	$(PYTEST) -m "not gpu" $(ARGS)

test-gpu: $(VENV)/.ready-dev ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

check: $(VENV)/.ready-dev ## lint, types, floors, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/llmtrain explain --markdown | diff -u docs/knobs.md - || { echo 'docs/knobs.md is not current: run make docs'; exit 1; }

docs: $(READY) ## write the generated docs anew
	$(BIN)/llmtrain explain --markdown > docs/knobs.md

format: $(VENV)/.ready-dev ## put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready-dev ## measure the overhead of the loop and the speed beside the Hugging Face Trainer
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/peers.py

bench-gpu: $(VENV)/.ready-dev ## measure on a GPU, in under 8 minutes, beside others; pass ARGS="--models gpt_small --nanogpt CHECKOUT"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python benchmarks/gpu.py $(ARGS)

effects: $(VENV)/.ready-dev ## measure what each knob does, as far as that is new, and write docs/knob-effects.md
	$(BIN)/python benchmarks/knob_effects.py

clean: ## remove the environment and what tools leave behind
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist build *.egg-info
