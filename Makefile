# Every target sets up what it needs: a virtual environment in .venv with the package and its development tools.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help run test validate lint bench bench-cuda

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(READY) ## Decompose the example models and show what came of it
	@$(BIN)/python -m models.demo

# One thread for linear algebra in each worker: two workers with a pool each on two cores wait for one another.
test: $(READY) ## Run the tests; those that need a GPU skip themselves where there is none
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not world" -n $(WORKERS)

validate: $(READY) ## Run the slow tests: trained models, statistics over many seeds
	@$(BIN)/python -m pytest -m slow

lint: $(READY) ## Check style, types and the direction of imports
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(READY) ## Measure the example models: FLOPs, error, latency
	@$(BIN)/python -m models.bench

bench-cuda: $(READY) ## Measure every form on a GPU; says what is missing where there is none
	@$(BIN)/python -m models.bench_cuda

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "onnx-decomp needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); } || { \
	  echo "$(PYTHON) can't make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }
	@echo "Installing into $(VENV); the first time this downloads ONNX Runtime for GPUs (about 256 MB)"
	@$(BIN)/python -m pip install --quiet 'pip>=23.1'
	@$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
