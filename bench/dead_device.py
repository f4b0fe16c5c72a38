"""A pytest plugin: a process whose GPU does not answer any more ends, lest one illegal access fails every later test too.

pytest -p dead_device tests/test_mmd.py           with xdist, another worker goes on with the other tests
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:  # xdist says itself which test ended a worker
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(f"\n{item.nodeid}: FAILED: the device does not answer: {str(error).splitlines()[0]}", flush=True)
        os._exit(3)
