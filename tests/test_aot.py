"""Every shipped Triton configuration compiles for sm_90 without a GPU, spills nothing and moves 16 bytes per access."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "aot_report.py"
    spec = importlib.util.spec_from_file_location("aot_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


aot_report = _load()


@pytest.mark.parametrize("configuration", aot_report.CONFIGURATIONS, ids=lambda c: c.name.replace(" ", "-"))
def test_compiles_wide_and_without_spills(configuration) -> None:
    usage = aot_report.usage(configuration)
    assert usage.spills == 0
    assert set(usage.stores) == {128}
    # Coefficients, seeds and the tables of log, sin and cos are 64 bits wide; everything else is read 16 bytes at a time.
    assert set(usage.loads) <= {64, 128}
    tensors = sum(name in ("x_ptr", "g_ptr", "g_uncond_ptr") for name in configuration.signature)
    assert usage.loads.get(128, 0) >= tensors
