"""Where the Triton kernels are tested: on a GPU, else in Triton's interpreter.

Triton decides at its import whether it interprets, so a machine without a GPU runs such a file once more in a child process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def kernel_test(function: Any) -> Any:
    """Collected where kernels can run: on a GPU, and in the child of :func:`in_the_interpreter`."""
    return function if INTERPRETED or torch.cuda.is_available() else None


def in_the_interpreter(file: str) -> Callable[[], None]:
    """A test that runs a file's kernel tests in the interpreter, where they do not run directly."""

    @pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests of this file run directly")
    @pytest.mark.parametrize("marks", ["not full", pytest.param("full", marks=pytest.mark.full)])
    def test_in_the_interpreter(marks: str) -> None:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", marks, "-p", "no:cacheprovider", file]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
        if marks == "full" and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip("no long forms")
        assert done.returncode == 0, done.stdout + done.stderr
        assert " passed" in done.stdout, done.stdout

    return test_in_the_interpreter
