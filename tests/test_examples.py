"""The examples run as they are printed, on fewer steps."""

from __future__ import annotations

import re
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
    assert name in {"your_network.py", "loss_alone.py", "your_images.py", "ensemble.py", "tokens.py"}


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


SCORES = re.compile(r"(.+), (\d+) steps?: label match (.+)%, spread (.+)%, MMD (.+), slope (.+), energy score")


def scores_of(output: str) -> dict[tuple[str, int], tuple[float, ...]]:
    lines = [match.groups() for match in map(SCORES.match, output.splitlines()) if match]
    return {(name, int(steps)): tuple(map(float, values)) for name, steps, *values in lines}


def test_tokens() -> None:
    found = scores_of(run("tokens.py", "--steps", "3", "--samples", "20"))
    assert set(found) == {("energy score", 1), ("energy score", 2)}
    found = scores_of(run("tokens.py", "--imm", "--steps", "3", "--samples", "20"))
    assert set(found) == {("flow matching", 1), ("flow matching", 32), ("IMM on frozen z", 1), ("IMM on frozen z", 2)}


@pytest.mark.full
def test_tokens_learn_to_fit_together() -> None:
    match, spread, mmd, slope = scores_of(run("tokens.py"))["energy score", 1]
    assert (match >= 60, spread >= 85, mmd <= 0.006, slope >= 0.6) == (True,) * 4
    match, spread, mmd, slope = scores_of(run("tokens.py", "--imm"))["IMM on frozen z", 2]
    assert (match >= 65, spread >= 85, mmd <= 0.004, slope >= 0.65) == (True,) * 4
