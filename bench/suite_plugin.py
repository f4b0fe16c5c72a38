"""The pytest plugin of gpu_suite.py: pytest -p suite_plugin tests/test_mmd.py

A process whose GPU does not answer any more ends, lest one illegal access fails every later test too; with xdist, another
worker takes the other tests. Tests that have passed in an earlier command of the suite (``IMM_SUITE_TESTS``, its tests.txt) are
left out.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest


def passed(text: str) -> set[str]:
    """The tests that pytest's output says have passed, with its workers or without."""
    return set(re.findall(r"^(tests/test_\w+\.py::.+?) PASSED\b", text, re.MULTILINE)) | set(
        re.findall(r"^\[gw\d+\].*? PASSED (tests/test_\w+\.py::.+?) *$", text, re.MULTILINE)
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    before = Path(os.environ.get("IMM_SUITE_TESTS") or os.devnull)
    known = passed(before.read_text()) if before.exists() else set()
    again = [item for item in items if item.nodeid not in known]
    if again:  # pytest takes it for an error when nothing is left
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
        items[:] = again


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:  # xdist says itself which test ended a worker
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(f"\n{item.nodeid}: FAILED: the device does not answer: {str(error).splitlines()[0]}", flush=True)
        os._exit(3)
