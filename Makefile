# Work on this repository on a machine without a GPU: Linux on x86-64, Python 3.11 or newer, 8 GB of
# disk. On a GPU machine none of this is needed: `pip install tlt-sglang[sglang]` brings SGLang, too.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup prepare serve unit check style types test test-default test-other test-all test-versions
.PHONY: test-version gpu fuzz identity bench figures lock clean stacks fleet

# SGLANG=0.5.16 makes and uses an environment of its own beside .venv, from the lock of that version.
DEFAULT_SGLANG := $(shell sed -n 's/^sglang==//p' requirements/cpu.in)
SGLANG := $(DEFAULT_SGLANG)
ifeq ($(SGLANG),$(DEFAULT_SGLANG))
NAME :=
else
NAME := -$(SGLANG)
endif
VENV := .venv$(NAME)
LOCK := requirements/cpu$(NAME).txt
# The versions beside the default one that have a lock, the newest first, and those that TLT runs on.
VERSIONS := $(shell ls requirements/cpu-*.in | sed -E 's/.*cpu-(.*)\.in/\1/' | sort -rV)
KNOWN := $(filter $(VERSIONS),$(shell sed -nE 's/^    "([0-9a-z.]+)": "v.*/\1/p' tlt_sglang/upstream/versions.py))

PYTHON := $(VENV)/bin/python
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
MODEL := smollm2-135m
STAND_IN := tlt_sglang/cpu/stand_in
STARTUP := $(addprefix tlt_sglang/startup/,tlt_sglang.pth tlt_sglang_startup.py)
# The bytecode of the tests is stored even where the environment forbids it: to make it takes seconds.
UNIT_TESTS := env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m pytest -n 2 --dist worksteal tests/unit tests/patches
# The rooms of pure decisions, of which the unit tests must cover nearly all lines and branches.
COVERAGE := --cov --cov-report=term
# What is tested with every SGLang: start, identity, sampling, weights, switching of strategies, clients
# that die, harvest and hot swap, and how RL stacks start an engine and talk to it.
VERSION_TESTS := $(addprefix tests/engine/test_,$(addsuffix .py,start identity sampling coupled weights \
  switching clients live growing)) $(addprefix tests/stacks/test_,$(addsuffix .py,traces starts launch_scripts))
# The clients of RL stacks, in an environment that stands on that of the tests.
STACKS := $(VENV)-stacks
CLIENTS := $(STACKS)/.stamp-installed
# What `make test` leaves to `make test-all`.
QUICK := -m "not long"
# What `make test` tests with the newest of the other versions, beside the patches.
OTHER_VERSION := $(lastword $(KNOWN))
OTHER_TESTS := tests/engine/test_identity.py
# Paths in ARGS replace the default ones.
TEST_PATHS := $(filter tests tests/%,$(ARGS))

# Each step ends by writing its stamp: an interrupted setup continues where it stopped, and a complete
# one costs nothing.
ENVIRONMENT := $(VENV)/.stamp-environment
SYNCED := $(VENV)/.stamp-synced
# Exists while a sync runs. uv regards a package whose installation was interrupted as installed, so a
# sync that finds this mark reinstalls all packages from its cache.
SYNCING := $(VENV)/.mark-syncing
INSTALLED := $(VENV)/.stamp-installed

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

setup: $(INSTALLED) ## make .venv from the lock (a few minutes, 8 GB); SGLANG=0.5.16 makes .venv-0.5.16

requirements/cpu-%.txt:
	@echo "There is no lock for SGLang $*; SGLANG is one of: $(DEFAULT_SGLANG) $(VERSIONS)." >&2; exit 1

$(ENVIRONMENT): | $(LOCK)
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
	  echo "Making $(VENV) with $$($$base --version)"
	  $$base -m venv --clear $(VENV)
	  awk '/^uv==/ {on = 1; print; next} on && /--hash/ {print; next} on {exit}' $(LOCK) >$(VENV)/uv.txt
	  $(PYTHON) -m pip install --no-deps --require-hashes -r $(VENV)/uv.txt
	fi
	touch $@

# The sync removes what the lock does not name, including our own two packages, which follow it.
$(SYNCED): $(LOCK) | $(ENVIRONMENT)
	@echo "Installing the packages of $(LOCK) (some GB to download the first time) and compiling them"
	again=
	if [ -e $(SYNCING) ]; then again=--reinstall; fi
	touch $(SYNCING)
	# Compile once, here: without stored bytecode, every start would compile 7,000 modules.
	$(UV) pip sync --python $(PYTHON) --require-hashes --compile-bytecode $$again $(LOCK)
	rm $(SYNCING)
	touch $@

$(INSTALLED): $(SYNCED) pyproject.toml $(STAND_IN)/pyproject.toml $(STARTUP)
	@$(UV) pip install --python $(PYTHON) --no-deps --no-build-isolation -e . -e $(STAND_IN)
	# A wheel brings these files; an editable install leaves them out.
	cp $(STARTUP) "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(PYTHON) -m compileall -q tlt_sglang patches apply_patches.py
	echo "Compiling the CPU kernels (once, half a minute)"
	$(PYTHON) -c "from tlt_sglang.cpu.kernels import argmax, attention, matrix, vector"
	touch $@

prepare: setup ## store the small model in the cache folder (once, under a minute)
	@$(VENV)/bin/tlt prepare $(MODEL)

serve: prepare ## serve the small model on port 30000; ARGS="..." go to SGLang
	@exec $(PYTHON) -m tlt_sglang.launch_server --model $(MODEL) --adaptive-spec $(ARGS)

check: style types ## ruff, mypy, and the patches against the installed SGLang

style: setup
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) apply_patches.py --check

types: setup
	@$(VENV)/bin/mypy

unit: setup ## unit and patch tests, in under a minute
	@$(UNIT_TESTS)

test: test-default $(if $(TEST_PATHS),,test-other) ## checks and tests, in an hour; ARGS="path" runs that path alone

# Without paths in ARGS: the checks, then all tests, the quick ones first. mypy runs beside the unit
# tests. The engine tests measure speed, so they have the machine to themselves.
test-default: setup prepare $(if $(TEST_PATHS),,style)
	@if [ -n "$(TEST_PATHS)" ]; then exec $(PYTHON) -m pytest $(ARGS); fi
	log=$$(mktemp)
	$(VENV)/bin/mypy >"$$log" 2>&1 & typing=$$!
	trap 'kill $$typing 2>/dev/null || true; rm -f "$$log"' EXIT
	failed=0
	# Status 5 says that ARGS select no test here.
	run() { "$$@" || { status=$$?; [ $$status = 5 ] || failed=$$status; }; }
	run $(UNIT_TESTS) $(COVERAGE) --durations=15 $(ARGS)
	wait $$typing || failed=1
	cat "$$log"
	run $(PYTHON) -m pytest -n 2 --dist worksteal tests/cuda $(ARGS)
	run $(PYTHON) -m pytest --durations=40 $(QUICK) tests/engine tests/stacks tests/gpu --ignore tests/stacks/own $(ARGS)
	run $(PYTHON) -m pytest $(QUICK) tests/fleet $(ARGS)
	exit $$failed

test-other:
	@$(MAKE) --no-print-directory test-version SGLANG=$(OTHER_VERSION) \
	  VERSION_TESTS="$(OTHER_TESTS)" ARGS='$(QUICK) $(ARGS)'

test-all: ## the same with those that try it once more on other servers
	@$(MAKE) --no-print-directory test QUICK=

test-versions: ## test every other SGLang that TLT runs on, half an hour each; ARGS go to pytest
	@failed=0
	for version in $(KNOWN); do
	  echo "SGLang $$version"
	  $(MAKE) --no-print-directory test-version SGLANG=$$version || failed=1
	done
	exit $$failed

test-version: setup prepare ## test one other SGLang, as SGLANG=0.5.16
	@failed=0
	$(PYTHON) apply_patches.py --check
	run() { "$$@" || { status=$$?; [ $$status = 5 ] || failed=$$status; }; }
	run $(PYTHON) -m pytest -n 2 --dist worksteal tests/patches tests/unit/packaging $(ARGS)
	run $(PYTHON) -m pytest --durations=15 -m "not failures" $(VERSION_TESTS) $(ARGS)
	exit $$failed

$(CLIENTS): requirements/stacks.txt requirements/stacks-3.12.txt | $(INSTALLED)
	@$(PYTHON) -m venv --clear --without-pip $(STACKS)
	folder() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
	base=$$(folder $(PYTHON))
	echo "import site; site.addsitedir('$$base')" >"$$(folder $(STACKS)/bin/python)/base.pth"
	awk '/^[a-z]/ {miles = /^miles-rl==/} {print > ("$(STACKS)/" (miles ? "miles" : "clients") ".txt")}' $<
	install() { $(UV) pip install --python $(STACKS)/bin/python --no-deps --require-hashes "$$@"; }
	install -r $(STACKS)/clients.txt
	# Of this wheel one folder alone: it also has an SGLang, which would replace ours.
	install --target $(STACKS)/miles -r $(STACKS)/miles.txt
	# Of this one a folder: the rest is for another Python, and imports what is not here.
	install --target $(STACKS)/unirl --python-version 3.12 -r requirements/stacks-3.12.txt
	for client in miles unirl/rollout/engine/sglang/backends; do
	  mkdir -p "$$(folder $(STACKS)/bin/python)/$$client"
	  cp -r $(STACKS)/$${client%%/*}/$$client/. "$$(folder $(STACKS)/bin/python)/$$client"
	done
	rm "$$(folder $(STACKS)/bin/python)/unirl/rollout/engine/sglang/backends/__init__.py"
	rm -r $(STACKS)/miles $(STACKS)/unirl
	touch $@

stacks: prepare $(CLIENTS) ## train with AReaL against our server, in ten minutes; ARGS go to pytest
	@exec $(PYTHON) -m pytest --durations=5 tests/stacks/own $(ARGS)

fleet: prepare ## serve the small model on a Ray cluster of three nodes on this machine; Ctrl-C ends it
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" exec launch/ray/local.sh $(ARGS)

# On a GPU machine, with the Python that the wheel was installed for.
gpu: ## check and time everything on one GPU, in twelve minutes; ARGS="OUT --parts a,b"
	@exec python -m tests.gpu.run $(or $(ARGS),build/gpu)

fuzz: prepare ## send random requests to a server for an hour; ARGS="--seconds 120"
	@$(PYTHON) -m tools.fuzzing $(ARGS)

identity: prepare ## compare 2,000 sampled answers with plain decoding's, in half an hour; ARGS="--answers 200"
	@exec $(PYTHON) -m pytest -s tests/engine/test_sampled_identity.py --timeout 7200 --answers 2000 $(ARGS)

bench: $(ENVIRONMENT) ## list the benchmarks; each has --help
	@$(PYTHON) -m tools.benchmarks

figures: $(ENVIRONMENT) ## count the figures of the code's shape, each with its bar
	@$(PYTHON) -m tools.figures

# The lock of another SGLang starts from the versions of the default one, and is made with its uv.
lock: ## write the lock again, also of SGLANG=0.5.16; ARGS=--upgrade takes newer versions
	@$(MAKE) --no-print-directory SGLANG=$(DEFAULT_SGLANG) .venv/.stamp-environment
	[ -f $(LOCK) ] || cp requirements/cpu.txt $(LOCK)
	.venv/bin/uv pip compile requirements/cpu$(NAME).in --override requirements/cpu-overrides.txt \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_34 --generate-hashes \
	  --no-emit-package pip --custom-compile-command 'make lock$(if $(NAME), SGLANG=$(SGLANG))' \
	  --output-file $(LOCK) $(ARGS) >/dev/null
	.venv/bin/uv pip compile requirements/stacks.in --no-deps --prerelease allow \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_34 --generate-hashes \
	  --custom-compile-command 'make lock' --output-file requirements/stacks.txt $(ARGS) >/dev/null
	.venv/bin/uv pip compile requirements/stacks-3.12.in --no-deps \
	  --python-version 3.12 --python-platform x86_64-manylinux_2_34 --generate-hashes \
	  --custom-compile-command 'make lock' --output-file requirements/stacks-3.12.txt $(ARGS) >/dev/null

clean: ## remove build products and caches; .venv and the model cache stay
	@rm -rf build dist *.egg-info $(STAND_IN)/build $(STAND_IN)/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
