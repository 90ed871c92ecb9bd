# Work on this repository on a machine without a GPU: Linux on x86-64, Python 3.11 or newer, 8 GB of
# disk. On a GPU machine none of this is needed: `pip install tlt-sglang` brings SGLang with it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup prepare serve lint style test lock clean

PYTHON := .venv/bin/python
UV := .venv/bin/uv
UV_VERSION := 0.13.9
MODEL := smollm2-135m
STAND_IN := tlt_sglang/cpu/stand_in
LOCK := requirements/cpu.txt

# Each step ends by writing its stamp, so an interrupted setup goes on where it stopped, and one
# that is done costs nothing.
ENVIRONMENT := .venv/.stamp-environment
SYNCED := .venv/.stamp-synced
# There while a sync runs. uv takes a package it was interrupted in for an installed one, so a sync
# that finds this mark puts all of them in place again, from its cache.
SYNCING := .venv/.mark-syncing
INSTALLED := .venv/.stamp-installed

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv from the lock (a few minutes and 8 GB the first time)

$(ENVIRONMENT):
	@if [ "$$(uname -sm)" != "Linux x86_64" ]; then
	  echo "This lock is for Linux on x86-64, this machine is $$(uname -sm)." >&2; exit 1
	fi
	new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
	if ! $(PYTHON) -c "$$new_enough" 2>/dev/null || [[ "$$($(UV) --version 2>&1)" != "uv $(UV_VERSION)"* ]]; then
	  base=
	  for candidate in python3.11 python3.12 python3.13 python3; do
	    if $$candidate -c "$$new_enough" 2>/dev/null; then base=$$candidate; break; fi
	  done
	  if [ -z "$$base" ]; then
	    echo "No Python 3.11 or newer found: install one that python3.11 or python3 starts." >&2; exit 1
	  fi
	  echo "Making .venv with $$($$base --version)"
	  $$base -m venv --clear .venv
	  awk '/^uv==/ {on = 1; print; next} on && /--hash/ {print; next} on {exit}' $(LOCK) >.venv/uv.txt
	  $(PYTHON) -m pip install --no-deps --require-hashes -r .venv/uv.txt
	fi
	touch $@

# The sync takes away what the lock does not name, our own two packages too: they come after it.
$(SYNCED): $(LOCK) | $(ENVIRONMENT)
	@echo "Installing the packages of $(LOCK) (some GB to download the first time) and compiling them"
	again=
	if [ -e $(SYNCING) ]; then again=--reinstall; fi
	touch $(SYNCING)
	# Compiled here, once: where nobody may write bytecode, every start would compile 7,000 modules.
	$(UV) pip sync --python $(PYTHON) --require-hashes --compile-bytecode $$again $(LOCK)
	rm $(SYNCING)
	touch $@

$(INSTALLED): $(SYNCED) pyproject.toml $(STAND_IN)/pyproject.toml
	@$(UV) pip install --python $(PYTHON) --no-deps --no-build-isolation -e . -e $(STAND_IN)
	$(PYTHON) -m compileall -q tlt_sglang patches apply_patches.py
	echo "Compiling the CPU kernels (once, half a minute)"
	$(PYTHON) -c "from tlt_sglang.cpu.kernels import argmax, attention, matrix, vector"
	touch $@

prepare: setup ## put the small model into the cache folder (once, under a minute)
	@.venv/bin/tlt prepare $(MODEL)

serve: prepare ## serve the small model on port 30000; ARGS="..." go to SGLang
	@exec $(PYTHON) -m tlt_sglang.launch_server --model $(MODEL) --adaptive-spec $(ARGS)

lint: style ## ruff, mypy, and the patches against the installed SGLang
	@.venv/bin/mypy

style: setup
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(PYTHON) apply_patches.py --check

# Directories are given in this order so that the quick tests speak first. mypy has a core to itself
# while the unit tests run on another.
test: setup prepare style ## lint and all tests; ARGS="..." go to pytest
	@log=$$(mktemp)
	.venv/bin/mypy >"$$log" 2>&1 & typing=$$!
	trap 'kill $$typing 2>/dev/null || true; rm -f "$$log"' EXIT
	failed=0
	$(PYTHON) -m pytest --durations=15 $(wildcard tests/unit tests/patches tests/engine tests/gpu) $(ARGS) || failed=$$?
	wait $$typing || failed=1
	cat "$$log"
	exit $$failed

lock: $(ENVIRONMENT) ## write requirements/cpu.txt anew; ARGS=--upgrade to take newer versions
	@$(UV) pip compile requirements/cpu.in --override requirements/cpu-overrides.txt \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_34 --generate-hashes \
	  --no-emit-package pip --custom-compile-command 'make lock' --output-file $(LOCK) $(ARGS) >/dev/null

clean: ## remove build products and caches; .venv and the model cache stay
	@rm -rf build dist *.egg-info $(STAND_IN)/build $(STAND_IN)/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
