"""Every Triton configuration that a launcher can choose compiles for sm_90 without a GPU, spills nothing and moves 16 bytes an
access where it should."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

REPORT = Path(__file__).parents[1] / "bench" / "aot_report.py"


def test_every_configuration_compiles_wide_and_without_spills() -> None:
    done = subprocess.run([sys.executable, REPORT, "--arch", "90"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) > 200
    for kernel in (
        "flow_step",
        "noise",
        "mmd resident",
        "mmd products",
        "mmd pairs",
        "mmd gram",
        "attention",
        "adaln",
        "timestep",
    ):
        assert any(row.startswith(kernel) for row in rows)


def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPORT.parent))
    import aot_report

    first = aot_report.CONFIGURATIONS[0]
    good = aot_report.Usage(registers=32, stack=0, spills=0, shared=0, loads={64: 2, 128: 4}, stores={128: 1})
    assert aot_report.problems(first, good) == []
    assert good.occupancy(4, 90) == 16
    bad = aot_report.Usage(registers=255, stack=8, spills=12, shared=100_000, loads={32: 8}, stores={32: 2})
    assert [p.partition(" ")[0] for p in aot_report.problems(first, bad)] == ["spills", "expected", "expected", "expected"]
    assert bad.occupancy(4, 90) == 2
    products = dataclasses.replace(first, tensor_cores=True)
    assert aot_report.problems(products, good) == ["expected products by tensor cores, got none"]
    assert aot_report.problems(products, dataclasses.replace(good, tensor_cores=4)) == []
