# Two commands matter: `make demo` (train, fine-tune, evaluate, report on this machine) and `make test`.
#
# PYTHON       interpreter for the environment, 3.11 or newer (default: python3.11, else python3)
# CONSTRAINTS  pip constraints file (default: constraints.txt, the exact versions the tests ran with); empty: none,
#              which is the way to a CUDA build of torch
# PYTEST_ARGS  further arguments for pytest, e.g. PYTEST_ARGS="-k loader -x"
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

VENV := .venv
EXTRAS := dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := dino_scale kernels data_pipeline launch tests

.PHONY: env lint types test test-slow test-jobs bench demo clean

env: $(STAMP)

# One resolver run for everything: installed one after the other, a later package could replace torch by another build.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "PYTHON is '$(PYTHON)': expected Python 3.11 or newer; run make env PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(EXTRAS)]'
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

# `ray job submit` needs Ray's dashboard and what that needs, which nothing else does: an environment of its own.
test-jobs:
	$(MAKE) env VENV=$(VENV)-jobs EXTRAS=dev,cluster
	$(VENV)-jobs/bin/pytest -m slow tests/launch/test_ray_jobs.py $(PYTEST_ARGS)

# Every figure of docs/kernels.md that needs no GPU, and the data path, into one folder named after the moment. One
# thread: the ratios of a machine that is seldom free are steadiest so. SHARDS: a packed folder for the data path;
# empty: synthetic pictures are drawn and packed.
bench: FOLDER := runs/bench-$(shell date -u +%Y%m%d-%H%M%S)
bench: $(STAMP)
	mkdir -p $(FOLDER)
	OMP_NUM_THREADS=1 $(BIN)/dino-scale bench kernels --device cpu --turns 7 --out $(FOLDER)/kernels_cpu.csv
	OMP_NUM_THREADS=1 $(BIN)/dino-scale bench kernels --compiled --out $(FOLDER)/kernels_compiled.csv
	OMP_NUM_THREADS=1 $(BIN)/dino-scale bench step --device cpu --out $(FOLDER)/step_profile_cpu.csv
ifeq ($(SHARDS),)
	$(BIN)/python -c 'import pathlib, data_pipeline.synthetic as drawn; drawn.write_synthetic(pathlib.Path("$(FOLDER)/raw"), "objects", 0, 200, 1)'
	$(BIN)/dino-scale pack --annotations $(FOLDER)/raw/train.json --images $(FOLDER)/raw/train/images --out $(FOLDER)/shards
endif
	OMP_NUM_THREADS=1 $(BIN)/dino-scale bench loader $(or $(SHARDS),$(FOLDER)/shards) --out $(FOLDER)/loader_cpu.csv

demo: $(STAMP)
	$(BIN)/dino-scale demo

clean:
	rm -rf $(VENV) $(VENV)-jobs .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
