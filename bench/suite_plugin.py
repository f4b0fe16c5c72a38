"""The pytest plugin of gpu_suite.py: a line for every verdict as it falls, "tests/test_a.py::test_b: FAILED".

A process whose GPU does not answer any more ends, lest one illegal access fails every later test too. Tests that have passed in
an earlier command of the suite (``IMM_SUITE_TESTS``, its tests.txt) are left out.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and (report.failed or (report.when == "call" and report.passed)):
        print(f"\n{report.nodeid}: {report.outcome.upper()}", flush=True)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and "ModuleNotFoundError" not in str(report.longrepr):  # what is not installed says nothing of a GPU
        print(f"\n{report.nodeid}: FAILED: it cannot be imported", flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = Path(os.environ.get("IMM_SUITE_TESTS") or os.devnull)
    known = set(re.findall(r"^(\S.*): PASSED$", before.read_text(), re.MULTILINE)) if before.exists() else set()
    again = [item for item in items if item.nodeid not in known]
    if again:  # pytest takes it for an error when nothing is left
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = again


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:  # xdist says itself which test ended a worker
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(f"\n{item.nodeid}: FAILED: the device does not answer: {str(error).splitlines()[0]}", flush=True)
        os._exit(3)
