# Every target makes .venv first, with every package at the version constraints.txt names.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
# Processes that share the tests, a file at a time; each of one thread, or two would wait for each other's. Three for two
# cores: the slowest tests mostly wait for processes that they started.
JOBS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-fast test-twins test-slurm soak lint

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## Make .venv with the pinned packages (a second call does nothing)

demo: $(STAMP)  ## Train, measure and export a small tokenizer; VIDEOS=dir VAL=dir use your own clips
	$(BIN)/vtok demo $(if $(VIDEOS),--videos "$(VIDEOS)") $(if $(VAL),--val "$(VAL)")

test: lint  ## Lint, types and every test; PYTEST_ARGS="-k report" picks some, JOBS=8 takes eight processes
	$(PYTEST) $(PYTEST_ARGS)

test-fast: lint  ## The same without the tests that launch processes or a browser
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-twins: $(STAMP)  ## The long tests, left out of `make test`: twins of presets trained for minutes, variants
	$(PYTEST) --dist load -m long $(PYTEST_ARGS)

test-slurm: $(STAMP)  ## Jobs on a real SLURM cluster of two nodes on this machine (installs slurm-wlm and munge)
	slurm/local_cluster.sh install
	VTOK_NEED_SLURM=1 $(PYTEST) -m "" tests/test_slurm*.py $(PYTEST_ARGS)

soak: $(STAMP)  ## Kill, interrupt, damage and starve it, and count (20 minutes; SHORT=1: the few of each that CI does)
	OMP_NUM_THREADS=1 $(BIN)/python -m soak $(if $(SHORT),--short) --out build/soak.md $(SOAK_ARGS)

lint: $(STAMP)  ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# A virtual environment that does not run, or runs another Python, is made anew. Debian splits ensurepip into the
# package python3-venv: without it, the system's pip is asked to furnish an empty environment.
# deepspeed builds its operators at the first use, not here: DS_BUILD_OPS=0. Build requirements come from
# constraints.txt too, so the build is not isolated.
$(STAMP): constraints.txt pyproject.toml
	@supported='import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'; \
	python=; \
	for candidate in $(or $(PYTHON),python3.11 python3.12 python3); do \
	  if "$$candidate" -c "$$supported" 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "vtok needs Python 3.11 or 3.12, and none of these is: $(or $(PYTHON),python3.11 python3.12 python3)." >&2; \
	  echo "Install one (Debian 12: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	if ! { $(BIN)/python -c "$$supported" && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then \
	  rm -rf $(VENV); \
	  if ! "$$python" -m venv $(VENV) >/dev/null 2>&1; then \
	    rm -rf $(VENV); \
	    "$$python" -m venv --without-pip $(VENV); \
	    "$$python" -m pip --python $(BIN)/python install --quiet --constraint constraints.txt pip || { \
	      rm -rf $(VENV); \
	      echo "$$python cannot furnish a virtual environment: it has neither ensurepip nor pip." >&2; \
	      echo "On Debian: apt-get install python3-venv" >&2; \
	      exit 1; \
	    }; \
	  fi; \
	fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	@echo "installing the pinned packages into $(VENV): a few minutes, about 6 GB"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install $(if $(CI),--quiet) --no-build-isolation --constraint constraints.txt \
	  --editable '.[dev]' 'pyright[nodejs]'
	@touch $@
