"""bench/calibrate.py: on the CPU in small; what needs a GPU on a fake with known times; its kernel interpreted.

No figure of a GPU comes from here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda

from harness import timing

pytest.importorskip("triton")
import calibrate

CPU = torch.device("cpu")
UNITS = ("_us", "_ms", "_gb_per_s", "_tflop_per_s", "_mhz", "_w")
LAUNCH, NODE = 9e-6, 1.25e-6  # seconds of a replay and of a node of the fake's graphs


def entries(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["calibrations"]


def checked(values: dict[str, float]) -> dict[str, float]:
    assert values
    assert all(name.endswith(UNITS) and math.isfinite(value) for name, value in values.items()), values
    return values


def test_on_the_cpu_and_again(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    assert calibrate.calibrate(path, CPU, calibrate.ON_CPU) == 0
    found = entries(path)
    assert list(found) == [part.__name__ for part in calibrate.ON_CPU]
    for entry in found.values():
        assert entry["status"] == "ok", entry
        assert min(value for name, value in checked(entry["values"]).items() if "saves" not in name) > 0
    assert {"device", "machine", "torch", "triton", "commit"} <= set(json.loads(path.read_text()))
    before = path.read_text()
    assert calibrate.calibrate(path, CPU, calibrate.ON_CPU) == 0
    assert path.read_text() == before


def test_a_failure_is_recorded_and_tried_again_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls, errors = tmp_path / "calibration.json", [], [RuntimeError("no such luck"), KeyboardInterrupt(), None]

    def broken(device: torch.device) -> calibrate.Numbers:
        calls.append("broken")
        yield "first_us", 1.23456
        yield "second_us", math.nan
        if (error := errors.pop(0)) is not None:
            raise error

    def good(device: torch.device) -> calibrate.Numbers:
        calls.append("good")
        yield "third_us", 1.0

    assert calibrate.calibrate(path, CPU, (broken,)) == 1
    failed = {"status": "failed", "values": {"first_us": 1.235}, "reason": "RuntimeError: no such luck"}
    assert entries(path)["broken"] == failed
    with pytest.raises(KeyboardInterrupt):  # as a stage that is killed
        calibrate.calibrate(path, CPU, (broken,))
    assert entries(path)["broken"]["status"] == "started"
    assert calibrate.calibrate(path, CPU, (broken, good)) == 0
    assert calls == ["broken", "broken", "good", "broken"]
    monkeypatch.setattr(calibrate, "TOTAL", 0.0)
    path.unlink()
    assert calibrate.calibrate(path, CPU, (good,)) == 1
    assert entries(path)["good"]["status"] == "no time left"


def test_parts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clock is that of CUDA, on the fake."""
    FakeCuda(monkeypatch, launch=LAUNCH, node=NODE)
    monkeypatch.setattr(calibrate, "clock", lambda device, steps: timing._cuda(steps, "cold"))
    monkeypatch.setattr(calibrate, "single_calls", lambda device, step: timing.single_calls(torch.device("cuda"), step))
    gaps = checked(dict(calibrate.graph_gaps(CPU)))
    assert gaps["gap_per_node_us"] == pytest.approx(1e6 * NODE, rel=1e-3)
    assert gaps["replay_of_200_nodes_us"] == pytest.approx(1e6 * (LAUNCH + 200 * NODE), rel=1e-3)
    reads = []
    monkeypatch.setattr(calibrate, "read", lambda x, sums, passes: (reads.append((x.nbytes, len(sums), passes)), (sums,))[1])
    monkeypatch.setattr(calibrate, "READ_MEGABYTES", (1, 2))
    found = checked(dict(calibrate.read_bandwidth(CPU)))
    size, _, passes = reads[0]
    assert found["read_of_1_mb_gb_per_s"] == pytest.approx(1e-9 * size * passes / LAUNCH, rel=1e-3)
    seen = iter([("1980 MHz", "690.5 W"), ("1755 MHz", "[N/A]")])
    clocks = lambda device: dict(zip(("clocks.sm", "power.draw"), next(seen, ("", "")), strict=True))
    monkeypatch.setattr(calibrate.environment, "clocks", clocks)
    monkeypatch.setattr(calibrate, "SIDE", 8)
    found = checked(dict(calibrate.sustained_clocks(CPU)))
    asked = {name: number for name, number in found.items() if name.endswith(("_mhz", "_w"))}
    assert asked == {"second_0_sm_clock_mhz": 1980, "second_0_power_w": 690.5, "second_1_sm_clock_mhz": 1755}


INTERPRETED = """import torch, calibrate as k
x, sums = torch.randn(5 * k.BLOCK), torch.full((3,), float("nan"))
k.read(x, sums, 4)
torch.testing.assert_close(sums.double().sum(), 4 * x.double().sum(), rtol=1e-4, atol=1e-2)"""


def test_the_kernel_reads_everything() -> None:
    path = os.pathsep.join([str(Path(calibrate.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
