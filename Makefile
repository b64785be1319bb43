# Everything runs in .venv, which each target makes by itself and makes again when the dependencies change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
FAST_TESTS := tests --ignore=tests/wire --ignore=tests/flows --ignore=tests/faults

.DEFAULT_GOAL := help
.PHONY: help run test check format bench docs clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

.venv/stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1). Set PYTHON=/path/to/python3.11."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: .venv/stamp ## A real model learns: pull, make a task, fine-tune, evaluate, promote
	$(BIN)/python -m flows.quickstart

test: .venv/stamp ## All tests
	$(BIN)/python -m pytest --durations=15

check: .venv/stamp ## Format, lint, types and the fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(FAST_TESTS)

format: .venv/stamp ## Format and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/stamp ## Make docs/config.md from the config classes
	$(BIN)/python docs/make_config_reference.py

.venv-bench/stamp: benchmarks/requirements.txt
	@test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

bench: .venv/stamp .venv-bench/stamp ## Compare with peers, in turn on the same rows
	$(BIN)/cookbook models pull smollm2-135m-instruct
	$(BIN)/python -m benchmarks.sft

clean: ## Remove the environments and caches; runs and models stay
	rm -rf .venv .venv-bench build *.egg-info .mypy_cache .ruff_cache .pytest_cache
