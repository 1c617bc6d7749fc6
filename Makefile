# Needs make and Python 3.10 or newer; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.setup-done
DOCS_STAMP := $(VENV)/.docs-done
# A second environment, in which there is no peft for Lamina to stand in front of.
ECOSYSTEM := .venv-ecosystem
ECOSYSTEM_STAMP := $(ECOSYSTEM)/.setup-done
CHECKED := src tests scripts benchmarks examples
# `make test PYTEST_ARGS="tests/engine -x"` runs a part.
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo example browser test ecosystem torture lint format bench docs pins clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Install everything into .venv (once)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Lamina needs Python 3.10+: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(STAMP) ## Take a small model through three stages of real text
	$(BIN)/lamina demo

# Without one, the tests that look at reports in a browser are skipped, and say so.
browser: ## Install Chromium for the tests of reports (as root, on Debian and its like)
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing chromium" && \
	  apt-get -qq -o Acquire::http::Timeout=30 update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends chromium >/dev/null; \
	} || echo "no chromium: reports are not looked at in a browser"

example: $(STAMP) ## Run a plan: a support bot from its manual to its preferences
	$(BIN)/python examples/support-bot/make_data.py
	$(BIN)/lamina run examples/support-bot/plan.yaml
	$(BIN)/lamina verify runs/support-bot/preferences

test: $(STAMP) browser ## Run the tests on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

$(ECOSYSTEM_STAMP): pyproject.toml constraints.txt
	test -x $(ECOSYSTEM)/bin/python || $(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[ecosystem,tests]'
	! $(ECOSYSTEM)/bin/python -c 'import peft' 2>/dev/null
	@touch $@

ecosystem: $(STAMP) $(ECOSYSTEM_STAMP) ## Train with the libraries around peft, without and beside it
	OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/python -m pytest -n 2 tests/ecosystem -m "ecosystem or not ecosystem" $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/ecosystem -m "ecosystem or not ecosystem" $(PYTEST_ARGS)

torture: $(STAMP) ## Kills, full disks, two writers, broken files: all of them
	LAMINA_TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --timeout 3600 tests/torture $(PYTEST_ARGS)
	$(BIN)/python scripts/reliability.py

lint: $(STAMP) ## Style, types, import layers, length of files
	$(BIN)/ruff check $(wildcard $(CHECKED))
	$(BIN)/ruff format --check $(wildcard $(CHECKED))
	$(BIN)/mypy --strict src
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/check_file_length.py $(wildcard $(CHECKED))

format: $(STAMP) ## Apply ruff's fixes and formatting
	$(BIN)/ruff check --fix $(wildcard $(CHECKED))
	$(BIN)/ruff format $(wildcard $(CHECKED))

bench: $(STAMP) ## Measure against peft, as ratios
	$(BIN)/python -m benchmarks

docs: $(DOCS_STAMP) ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pins: $(DOCS_STAMP) ## Write what .venv holds to constraints.txt
	$(BIN)/python scripts/write_constraints.py

clean: ## Remove what was built (.venv stays)
	rm -rf site dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(wildcard $(CHECKED)) -name __pycache__ -type d -prune -exec rm -rf {} +
