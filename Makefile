# `make help` lists the targets. They need Python 3.10 or newer, and nothing else installed.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A stamp for each set of extras and interpreter, so that PYTHON=... is never ignored.
READY := $(VENV)/.ready-$(notdir $(PYTHON))
UNFINISHED := $(VENV).unfinished

IS_SUPPORTED = { $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10)'; } 2>/dev/null && echo yes
require_python = $(if $(shell $(IS_SUPPORTED)),,$(error $(PYTHON) is not a Python of version 3.10 or newer: name one, as in `make $(MAKECMDGOALS) PYTHON=python3.12`))
VERSION_OF = -c 'import sys; print(sys.version_info[:2])' 2>/dev/null

# Only these files are collected: the others import what a machine for GPU runs may not have.
GPU_TESTS = $(shell grep -rl --include='test_*.py' 'mark\.gpu' tests)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test matrix lint bench docs dist gpu clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(READY)-examples ## grow and train the miniseries (ARGS="--help" lists its options)
	$(RUN) examples/miniseries.py $(ARGS)

test: lint ## lint, then run every test that needs no GPU (ARGS="-k fisher" selects)
	$(RUN) -m pytest -n $(WORKERS) --dist loadscope $(ARGS)

matrix: $(READY)-test ## run the tests on every Python and torch supported (ARGS="-s 'tests-3.12(2.11)'" runs one)
	$(RUN) -m nox $(ARGS)

lint: $(READY)-test ## ruff check, ruff format --check and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)-bench ## run the benchmarks (ARGS=--benchmark-json=out/mine.json keeps the figures)
	@mkdir -p out
	$(RUN) -m pytest benchmarks $(ARGS)

docs: $(READY)-docs ## build the documentation's pages in out/site/ (warnings are errors)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

dist: $(READY)-test ## build the sdist and the wheel in dist/
	rm -rf dist
	$(RUN) -m build --no-isolation

gpu: ## run the GPU tests and all benchmarks with PYTHON as it is: no environment, no network
	$(call require_python)
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "error: torch finds no CUDA device")'
	$(PYTHON) -m pytest -m gpu $(GPU_TESTS)
	$(PYTHON) -m pytest benchmarks $(ARGS)

clean: ## remove the environment, the caches and the builds (results in out/ stay)
	rm -rf $(VENV) $(UNFINISHED) .nox build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# UNFINISHED exists while an environment is being changed: one found unfinished, or of another
# Python, is made anew. setuptools comes first because the package is then built with it, and not
# with whatever is newest.
$(READY)-%: pyproject.toml constraints.txt
	$(call require_python)
	@mkdir -p $(VENV)
	@if [ -e $(UNFINISHED) ] || [ "$$($(RUN) $(VERSION_OF))" != "$$($(PYTHON) $(VERSION_OF))" ]; then touch $(UNFINISHED); rm -rf $(VENV); fi
	@touch $(UNFINISHED)
	@rm -f $(VENV)/.ready-*
	@echo "Installing the package and its extras [$*] in $(VENV)/; the first time takes some minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@ $(if $(filter test,$*),$(READY)-examples $(READY)-bench $(READY)-docs)
	@rm $(UNFINISHED)
