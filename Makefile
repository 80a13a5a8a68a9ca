# make quickstart   pack the digits, train both networks, draw guided samples
# make photos       photographs in class folders to pictures in two stages; make photos PHOTOS=/my/jpegs: yours
# make test         the tests            make check   format, lint, types
# make test-slow    those that take long: chaos, costs of real steps, kernels interpreted, an ablation
# make docs-check  the commands of the pages run, their links and options exist
# make test-cluster the tests on a real Slurm and ssh cluster in namespaces; it needs root, and the
#                   Debian packages that it names
# make chaos        a run killed, filled and damaged at random; precisions, stages and offload resumed
# Each sets up .venv when it is missing. Another interpreter: make PYTHON=python3.12 test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# DeepSpeed compiles an operator at its first start; each environment keeps its own. Its own tools
# come first in the PATH: another ninja would compile it again.
export PATH := $(abspath $(BIN)):$(PATH)
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

# Tests run beside each other: more threads in each would only wait for a processor, by spinning.
test test-slow: export OMP_NUM_THREADS := 1

.PHONY: quickstart photos test test-slow test-cluster docs-check chaos check format
quickstart: $(VENV)/installed
	bash examples/quickstart.sh

photos: $(VENV)/installed
	bash examples/photos.sh "$(PHOTOS)"

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

test-cluster: $(VENV)/installed
	$(BIN)/python -m pytest -rs -m cluster

docs-check: $(VENV)/installed
	$(BIN)/python -m pytest -m "docs or not docs" tests/test_docs.py tests/test_docs_commands.py

chaos: $(VENV)/installed
	$(BIN)/python -m tests.support.chaos
	$(BIN)/python -m tests.support.resuming

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch goes first, so that the rest finds it and pulls in no other build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
