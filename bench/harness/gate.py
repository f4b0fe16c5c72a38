"""An op's own tests, before its figures: a time says nothing while they fail.

An op file names them as TESTS, and what only a GPU runs as CUDA_TESTS: file in tests/ -> what a test's name must contain, as
one word or several ("" for all). pytest's exit status decides.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

Tests = Mapping[str, str]
_REASONS = {1: "its tests fail", 5: "none of its tests ran"}


def tests_of(module: ModuleType, device: torch.device) -> Tests:
    """The tests of an op file on a device: TESTS, and on CUDA its CUDA_TESTS in their place and besides."""
    return {**module.TESTS, **(module.CUDA_TESTS if device.type == "cuda" else {})}


def refusals(asked: Mapping[str, Tests], root: Path) -> dict[str, str]:
    """Per op whose tests (in the checkout ``root``) do not pass the reason. All run at once, op by op only where that fails."""
    if not asked or _reason(list(asked.values()), root) is None:
        return {}
    found = {op: _reason([tests], root) for op, tests in asked.items()}
    return {op: reason for op, reason in found.items() if reason is not None}


def _reason(asked: Sequence[Tests], root: Path) -> str | None:
    """Why these tests do not pass, or None."""
    pairs = [pair for tests in asked for pair in tests.items()]
    words = " or ".join(f"({name} and ({' or '.join(text.split())}))" if text else name for name, text in pairs)
    files = sorted({str(root / "tests" / name) for name, _ in pairs})
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=no", "-k", words, *files]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # within a test run
    variables["PYTHONPATH"] = os.pathsep.join([str(root / "python"), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    last = ((done.stdout + done.stderr).strip().splitlines() or ["no output"])[-1]
    return f"{_REASONS.get(done.returncode, 'its tests did not run')}: {last.strip(' =')[:160]}"
