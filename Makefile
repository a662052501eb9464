# The whole project from nothing but Python 3.11 or newer, a C++ compiler, make and a package index.
#
#   make demo     distil, train, calibrate, evaluate, register, promote, serve, and stream one answer
#   make test     every test that needs no GPU
#   make lint     ruff, mypy, import contracts
#   make bench    speed against transformers' generate, on a quiet machine
#   make format   put the sources into the form that `make lint` wants
#   make clean    remove .venv, builds and caches; runs (medusa-demo, medusa-work) stay
#
# Where pip's default torch is a CUDA build and there is no GPU, a CPU build is much smaller:
#   make install PIP_TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
# Another torch altogether: make install TORCH_SPEC="torch==2.12.0"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# A machine with an NVIDIA GPU takes the torch that pyproject.toml asks for, as pip finds it.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
TORCH_SPEC ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
PIP_TORCH_ARGS ?=

PIP_RETRIES ?= 10
PIP_DEFAULT_TIMEOUT ?= 60
PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_RETRIES PIP_DEFAULT_TIMEOUT PIP_DISABLE_PIP_VERSION_CHECK

# Nothing calls home, from any of these commands.
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export TOKENIZERS_PARALLELISM := false

SOURCES := medusa pipelines deploy benchmarks tests

.PHONY: help install demo test test-unit lint format bench clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(PIP_TORCH_ARGS) '$(TORCH_SPEC)'
	$(BIN)/python -m pip install --editable '.[test,lint]'
	@touch $@

demo: $(STAMP)
	$(BIN)/medusa demo

# Tiny models run fastest on one thread. Unit tests run in a process a core, at most eight (tests/conftest.py).
# PYTEST_ARGS narrows a run: make test PYTEST_ARGS="-k tree -x"; -n0 is for a debugger.
PARALLEL := -n auto --maxprocesses 8

test: export HF_HUB_OFFLINE := 1
test: export OMP_NUM_THREADS := 1
test: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu' $(PARALLEL) $(PYTEST_ARGS)

test-unit: export HF_HUB_OFFLINE := 1
test-unit: export OMP_NUM_THREADS := 1
test-unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit $(PARALLEL) $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Beside vLLM and llama.cpp too, once benchmarks/peers/install_*.sh have put each into a folder of its own:
#   make bench BENCH_ARGS="--vllm FOLDER/bin/python --llama FOLDER/bin/python --prompt-lookup 10 --tree adaptive --tree chain"
bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
