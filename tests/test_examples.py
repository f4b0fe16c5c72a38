"""The examples run as they are printed, on fewer steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_every_example_is_tested(name) -> None:
    assert name in {"your_network.py", "loss_alone.py", "your_images.py", "ensemble.py"}


def test_your_network() -> None:
    line = run("your_network.py").splitlines()[-1]
    assert line.startswith("4 steps: radius")
    assert 0.6 < float(line.split()[3]) < 0.8, line


def test_loss_alone() -> None:
    line = run("loss_alone.py").splitlines()[-1]
    assert float(line.split()[-1]) < 0.3, line


def test_ensemble() -> None:
    line = run("ensemble.py", "--steps", "300").splitlines()[-1]
    assert float(line.split()[-1]) < 0.25, line


def test_your_images(tmp_path) -> None:
    output = run("your_images.py", "--steps", "6", "--out", str(tmp_path / "run"))
    assert "wrote 32 images to " in output
    assert "and grid.png" in output
    assert (tmp_path / "run" / "samples" / "grid.png").is_file()
