# Commands of the project. A machine needs Python 3.11 or later with pip, and make; the rest is installed into .venv.

VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3 python; do command -v $$p >/dev/null 2>&1 && echo $$p && break; done)
IN_VENV := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PEER_VENV := .venv-bench
PEERS := $(PEER_VENV)/.installed
SLOW_TESTS := tests/wire tests/flows tests/faults

.DEFAULT_GOAL := help
.PHONY: help install run run-sft run-dpo run-orpo test faults check format docs bench clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything in it; nothing happens when it is up to date

# The stamp is newer than what it was made from, so a second call costs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or later is needed, found: $$($(or $(PYTHON),:) --version 2>&1 | tail -1)" >&2; \
		echo "Install it, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(IN_VENV) || $(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

run: RUN ?= runs/rl-quickstart
run: $(INSTALLED) ## Train a small real model with GRPO on this machine and show what it learned; RUN=DIR for another run
	$(VENV)/bin/cookbook models pull smollm2-135m-instruct
	$(VENV)/bin/cookbook data example runs/data
	$(VENV)/bin/cookbook run rl --config presets/rl-quickstart.yaml --log-path $(RUN)

run-sft: RUN ?= runs/sft-quickstart
run-sft: $(INSTALLED) ## The same with supervised fine-tuning
	$(VENV)/bin/cookbook models pull smollm2-135m-instruct
	$(VENV)/bin/cookbook data example runs/data
	$(VENV)/bin/cookbook run sft --config presets/sft-quickstart.yaml --log-path $(RUN)

run-dpo: RUN ?= runs/dpo-quickstart
run-dpo: $(INSTALLED) ## The same with direct preference optimization
	$(VENV)/bin/cookbook models pull smollm2-135m-instruct
	$(VENV)/bin/cookbook data example runs/data
	$(VENV)/bin/cookbook run dpo --config presets/dpo-quickstart.yaml --log-path $(RUN)

run-orpo: RUN ?= runs/orpo-quickstart
run-orpo: $(INSTALLED) ## The same with odds-ratio preference optimization
	$(VENV)/bin/cookbook models pull smollm2-135m-instruct
	$(VENV)/bin/cookbook data example runs/data
	$(VENV)/bin/cookbook run orpo --config presets/orpo-quickstart.yaml --log-path $(RUN)

test: $(INSTALLED) ## Run all tests
	$(IN_VENV) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

faults: $(INSTALLED) ## Kill and disturb runs of all recipes in every way, and compare how they end (40 minutes)
	rm -rf runs/faults
	FAULT_REPORTS=runs/faults $(IN_VENV) -m pytest -v -n 2 --dist loadfile -m faults tests/faults
	$(IN_VENV) -m tests.faults.report runs/faults

check: $(INSTALLED) ## Check format, lint and types, and run the fast tests
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy
	$(IN_VENV) -m pytest -n 2 --dist loadfile $(SLOW_TESTS:%=--ignore=%)

format: $(INSTALLED) ## Format, and mend what the linter can mend
	$(IN_VENV) -m ruff format .
	$(IN_VENV) -m ruff check --fix .

docs: $(INSTALLED) ## Make docs/config.md from the config classes
	$(IN_VENV) docs/make_config_reference.py

bench: $(INSTALLED) $(PEERS) ## Measure this project against its peers, in turn on the same rows
	$(VENV)/bin/cookbook models pull smollm2-135m-instruct
	for part in sft sample grpo dpo dcp; do \
		$(IN_VENV) -m benchmarks.$$part --peer-python $(PEER_VENV)/bin/python || exit 1; done
	$(IN_VENV) -m benchmarks.orchestration

# The peers have an environment of their own: their dependencies are not ours.
$(PEERS): benchmarks/requirements.txt
	@test -x $(PEER_VENV)/bin/python || $(PYTHON) -m venv $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet -r benchmarks/requirements.txt
	@touch $@

clean: ## Remove .venv and caches; runs, checkpoints and models stay
	rm -rf $(VENV) $(PEER_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find cookbook flows tasks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
