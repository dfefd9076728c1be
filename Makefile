# `make demo` and `make test` need nothing but Python 3.11 or later: the first target that wants
# the environment makes it, in .venv. Another interpreter: `make demo PYTHON=python3.13`.

PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done),python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
MUTANTS := $(VENV)/.mutants-installed
PIN := pip compile --quiet --universal --generate-hashes --python-version 3.11

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo picture simulate test test-slow mutants ci lint types bench e2e requirements clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNTIME) ## watch the real script follow a queue, in about half a minute; no cluster needed
	@$(BIN)/python -m tools.demo

picture: $(RUNTIME) ## draw docs/replicas.svg again, from the real script's decisions
	@$(BIN)/python -m tools.chart docs/replicas.svg

simulate: $(RUNTIME) ## try other settings on last week's jobs: make simulate ARGS="jobs.csv"
	@$(BIN)/python -m tools.simulate $(ARGS)

test: $(DEV) ## the fast tests, in a minute; some of them only: make test ARGS="-k cooldown"
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: $(DEV) ## the other tests, in minutes, several files at a time: processes, the emulator, the image
	$(BIN)/python -m pytest -m slow -n 3 --dist loadfile $(ARGS)

mutants: $(MUTANTS) ## mutation testing: change scaler.py, does a test fail? ARGS="--sample 100"
	@$(BIN)/python -m tools.mutants $(ARGS)

ci: lint types test test-slow ## all that has to hold before a change lands

lint: $(DEV) ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## types, strictly
	$(BIN)/mypy

bench: $(DEV) ## what a run costs, against the same calls written the straightforward way
	@$(BIN)/python -m tools.bench $(ARGS)

e2e: ## try the manifests on the cluster of the current kubectl context; see tests/e2e/README.md
	@$(PYTHON) -m tests.e2e $(ARGS)

requirements: $(DEV) ## pin requirements*.txt again; to newer versions: make requirements ARGS=--upgrade
	$(PIP) install uv
	$(BIN)/uv $(PIN) --output-file requirements.txt requirements.in $(ARGS)
	$(BIN)/uv $(PIN) --constraint requirements.txt --output-file requirements-dev.txt requirements-dev.in $(ARGS)

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "queue-scaler needs Python 3.11 or later; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "python3 -m venv failed; on Debian: apt-get install python3-venv"; exit 1; }

$(RUNTIME): requirements.txt | $(VENV)/pyvenv.cfg
	@echo "installing requirements.txt into $(VENV)"
	@$(PIP) install --require-hashes -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt $(RUNTIME)
	@echo "installing requirements-dev.txt into $(VENV)"
	@$(PIP) install --require-hashes -r requirements.txt -r requirements-dev.txt
	@touch $@

$(MUTANTS): requirements-mutants.txt $(DEV)
	@echo "installing requirements-mutants.txt into $(VENV)"
	@$(PIP) install --no-deps --require-hashes -r requirements-mutants.txt
	@touch $@
