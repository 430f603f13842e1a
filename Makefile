# Two commands: `make demo` runs the whole job on a CPU, `make test` runs the tests. Both set up what they need in .venv.
# TORCH: what pip installs when the environment has no torch yet, for example
#   make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTHON ?= python3
BIN := $(VENV)/bin
CXX_FILES := '*.h' '*.cpp' '*.cu' '*.cuh'
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-slow lint format abi clean

demo: $(VENV)/.installed
	$(BIN)/patch-llm demo --out demo-output

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files $(CXX_FILES))

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files $(CXX_FILES))

# The library must load into every torch from 2.11 on: only stable symbols, and none that a CPU torch lacks.
abi: $(VENV)/.lint
	$(BIN)/python tools/check_abi.py patch_kernels/libpatch_kernels_ops.so

$(VENV)/.installed: pyproject.toml setup.py tools/build_backend.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf build demo-output patch_kernels/*.so *.egg-info
