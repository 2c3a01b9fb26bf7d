# make run    set up everything, then the tour: a picture of label noise at work, and the norms of a digits network checked against autograd
# make test   set up everything, then all tests
# make lint   formatting, lint and types;  make test-cpp  the C++ tests;  make format  rewrite in the project's format
#
# PYTHON picks the interpreter, TORCH the torch to install (any from 2.11 on), VENV where.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.pyi' -o -name '*.j2')
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: run test lint format test-cpp clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	$(BIN)/ghostgrad tour

test: $(VENV)/.tools
	$(BIN)/python -m pytest

lint: $(VENV)/.tools
	$(BIN)/ruff check python tests benchmarks docs/examples setup.py
	$(BIN)/ruff format --check python tests benchmarks docs/examples setup.py
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.tools
	$(BIN)/ruff check --fix python tests benchmarks docs/examples setup.py
	$(BIN)/ruff format python tests benchmarks docs/examples setup.py
	$(BIN)/clang-format -i $(CPP)

# The build that tests/kernels uses, too; its log keeps what ptxas says.
test-cpp: $(VENV)/.torch
	mkdir -p build/tests
	$(BIN)/cmake -S . -B build/tests -G Ninja -DGHOSTGRAD_TESTS=ON -DGHOSTGRAD_CUDA=$(if $(shell command -v nvcc),ON,OFF)
	$(BIN)/cmake --build build/tests >> build/tests/build.log 2>&1 || { tail -n 60 build/tests/build.log; exit 1; }
	$(BIN)/ctest --test-dir build/tests --output-on-failure

# torch comes first and alone, so that nothing else chooses its version; then what the build needs, since it is not isolated from that torch.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" wheel "cmake>=3.22" ninja pybind11
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation ".[papers]"
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-build-isolation ".[papers,test,dev]"
	touch $@

clean:
	rm -rf build $(VENV)
