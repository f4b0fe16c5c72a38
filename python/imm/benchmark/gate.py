"""An op's own tests, before its figures: a time says nothing while they fail.

An op file names them as TESTS, and what only a GPU runs as CUDA_TESTS: file in tests/ -> what a test's name must contain, as
one word or several ("" for all).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

Tests = Mapping[str, str]

_SECONDS = 900  # on a GPU, where kernels are compiled for the first time
#: A pytest plugin: keeps the tests that are asked for, and writes one line per test that failed, and one of those that ran.
_PLUGIN = """
import json, os
import pytest
wanted = json.loads(os.environ["IMM_GATE_TESTS"])
found = {"ran": [], "failed": []}
def short(report):
    file, separator, test = report.nodeid.partition("::")
    return file.rpartition("/")[2] + separator + test
def named(item):
    return any(word in item.name for word in wanted[item.path.name].split() or [""])
def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if not named(item)])
    items[:] = [item for item in items if named(item)]
def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        found["ran"].append(short(report))
    if report.failed:
        found["failed"].append(short(report))
def pytest_collectreport(report):
    if report.failed:
        found["failed"].append(short(report))
def pytest_unconfigure(config):
    with open(os.environ["IMM_GATE_OUT"], "w") as file:
        json.dump(found, file)
"""


def tests_of(module: ModuleType, device: torch.device) -> Tests:
    """The tests of an op file on a device: TESTS, and on CUDA its CUDA_TESTS in their place and besides."""
    return {**module.TESTS, **(module.CUDA_TESTS if device.type == "cuda" else {})}


def refusals(asked: Mapping[str, Tests], root: Path) -> dict[str, str]:
    """Per op whose tests fail, are missing or cannot run, the reason; ops without an entry may be timed.

    Args:
        asked: op -> its TESTS. They run once, in one process.
        root: the checkout.
    """
    files = sorted({name for tests in asked.values() for name in tests})
    if missing := [name for name in files if not (root / "tests" / name).is_file()]:
        raise FileNotFoundError(f"tests: expected {missing} in {root / 'tests'}")
    words = {name: " ".join(tests[name] for tests in asked.values() if name in tests) for name in files}
    whole = {name for tests in asked.values() for name, text in tests.items() if not text}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "imm_gate.py").write_text(_PLUGIN)
        out = Path(folder) / "found.json"
        wanted = {name: "" if name in whole else text for name, text in words.items()}
        path = os.pathsep.join([folder, str(root / "python"), str(root), os.environ.get("PYTHONPATH", "")])
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # within a test run
        variables = {**inherited, "PYTHONPATH": path, "IMM_GATE_TESTS": json.dumps(wanted), "IMM_GATE_OUT": str(out)}
        command = [sys.executable, "-m", "pytest", "-p", "imm_gate", "-p", "no:cacheprovider", "-q", "--tb=no"]
        command += [str(root / "tests" / name) for name in files]
        try:
            done = subprocess.run(
                command, cwd=root, env=variables, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return dict.fromkeys(asked, f"tests did not end within {_SECONDS} s")
        if not out.exists():
            last = next(iter(reversed((done.stderr + done.stdout).strip().splitlines())), "no output")
            return dict.fromkeys(asked, f"tests did not run: {last[:160]}")
        found = json.loads(out.read_text())
    reasons = {}
    for op, tests in asked.items():
        failed, ran = (_of(found[key], tests) for key in ("failed", "ran"))
        if failed:
            reasons[op] = f"{len(failed)} of its tests fail, {failed[0]} first"
        elif not ran:
            reasons[op] = "none of its tests ran"
    return reasons


def _of(names: list[str], tests: Tests) -> list[str]:
    """The node names ("test_mmd.py::test_x[a]"; of a file that cannot be read its own) that belong to an op."""
    kept = []
    for node in names:
        file, _, name = node.partition("::")
        if file in tests and (not name or any(word in name for word in tests[file].split() or [""])):
            kept.append(node)
    return kept
