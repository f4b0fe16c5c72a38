"""bench/calibrate.py: on the CPU in small; what needs a GPU on a fake with known times; its kernel compiled and interpreted.

No figure of a GPU comes from here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from imm.benchmark import timing

BENCH = Path(__file__).parents[1] / "bench"
CPU = torch.device("cpu")
UNITS = ("_us", "_ms", "_s", "_gb_per_s", "_tflop_per_s", "_mhz", "_w", "_celsius", "_count")
LAUNCH, NODE = 9e-6, 1.25e-6  # seconds of a replay and of a node of the fake's graphs


@pytest.fixture
def calibrate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("calibrate", BENCH / "calibrate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def entries(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["calibrations"]


def check_values(values: dict[str, float]) -> None:
    assert values
    assert all(name.endswith(UNITS) for name in values), values
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values()), values


def test_on_the_cpu_and_again(calibrate: ModuleType, tmp_path: Path) -> None:
    path, said = tmp_path / "calibration.json", []
    assert calibrate.calibrate(path, CPU, frozenset({"attention"}), said.append) == 0
    found = entries(path)
    assert list(found) == list(calibrate.CPU_PARTS)
    for entry in found.values():
        assert entry["status"] == "ok", entry
        assert entry["notes"] == []
        assert "\n" not in entry["reading"]
        check_values(entry["values"])
        assert min(value for name, value in entry["values"].items() if "saves" not in name) > 0
    rates = found["matrix_rates"]["values"]
    seconds = sum(
        2e-12 * 16 * K * N / rates[f"{name}_1_rows_with_bias{'_and_gelu' * (name == 'fc1')}_tflop_per_s"]
        for name, (K, N) in calibrate.PRODUCTS.items()
    )
    assert rates["products_of_28_blocks_1_rows_ms"] == pytest.approx(28e3 * seconds, rel=1e-2)
    assert set(found["attention"]["values"]) == {"default_1_rows_us", "flash_1_rows_us", "math_1_rows_us"}  # ours was refused
    assert "priority flash_attention" in found["attention"]["reading"]
    head = json.loads(path.read_text())
    assert {"device", "machine", "torch", "triton", "commit", "time"} <= set(head)
    before = path.read_text()
    assert calibrate.calibrate(path, CPU, frozenset(), said.append) == 0
    assert path.read_text() == before
    assert len(said) == len(found)


def parts(calibrate: ModuleType, monkeypatch: pytest.MonkeyPatch, **functions: Callable[[Any], str]) -> None:
    monkeypatch.setattr(calibrate, "CPU_PARTS", {name: (5.0, function) for name, function in functions.items()})


def test_a_failure_is_recorded_and_tried_again_after_the_others(
    calibrate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "calibration.json", []

    def broken(part: Any) -> str:
        calls.append("broken")
        part.put(first_us=1.23456, second_us=math.nan)
        raise RuntimeError("no such luck\nsecond line")

    def slow(part: Any) -> str:
        calls.append("slow")
        part.until = 0.0
        return "half of it"

    def good(part: Any) -> str:
        calls.append("good")
        return "all of it"

    parts(calibrate, monkeypatch, broken=broken, slow=slow, good=good)
    assert calibrate.calibrate(path, CPU, frozenset(), lambda text: None) == 1
    found = entries(path)
    assert {name: entry["status"] for name, entry in found.items()} == {"broken": "failed", "slow": "cut short", "good": "ok"}
    assert found["broken"]["values"] == {"first_us": 1.235}
    assert found["broken"]["reading"] == "RuntimeError: no such luck"
    calls.clear()
    assert calibrate.calibrate(path, CPU, frozenset(), lambda text: None) == 1
    assert calls == ["slow", "broken"]
    monkeypatch.setattr(calibrate, "TOTAL", 0.0)
    assert calibrate.calibrate(path, CPU, frozenset(), lambda text: None) == 1
    assert {entry["status"] for entry in entries(path).values()} == {"ok", "no time left"}


def test_one_that_ends_the_program_comes_last(calibrate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "calibration.json", []

    def deadly(part: Any) -> str:
        calls.append("deadly")
        raise KeyboardInterrupt

    parts(calibrate, monkeypatch, deadly=deadly, good=lambda part: calls.append("good") or "fine")
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(path, CPU, frozenset(), lambda text: None)
    assert entries(path) == {"deadly": {"status": "started"}}
    with pytest.raises(KeyboardInterrupt):
        calibrate.calibrate(path, CPU, frozenset(), lambda text: None)
    assert calls == ["deadly", "good", "deadly"]


def test_nothing_follows_on_a_device_that_does_not_answer(
    calibrate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts(calibrate, monkeypatch, a=lambda part: "fine", b=lambda part: "fine")
    monkeypatch.setattr(calibrate, "alive", lambda device: False)
    said: list[str] = []
    calibrate.calibrate(tmp_path / "calibration.json", CPU, frozenset(), said.append)
    assert list(entries(tmp_path / "calibration.json")) == ["a"]
    assert "does not answer" in said[-1]


class FakeCuda:
    """Graphs that run nothing and take LAUNCH and NODE for every kernel of ``_sleep``; events that read this clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.nodes = 0.0, 0
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = outer.now

            def synchronize(self) -> None:
                pass

            def query(self) -> bool:
                return False

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * max(end.at - self.at, 1e-6)

        class CUDAGraph:
            nodes = 0

            def replay(self) -> None:
                outer.now += LAUNCH + NODE * self.nodes

        @contextlib.contextmanager
        def graph(made: CUDAGraph, pool: tuple[int, int] | None = None) -> Iterator[None]:
            before, outer.nodes = outer.nodes, 0
            yield
            made.nodes, outer.nodes = outer.nodes, before

        def sleep(cycles: int) -> None:
            assert cycles == 0
            outer.nodes += 1

        stream = SimpleNamespace(wait_stream=lambda other: None)
        properties = SimpleNamespace(multi_processor_count=2)
        for name, value in {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "_sleep": sleep,
            "synchronize": lambda: None,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda side: contextlib.nullcontext(),
            "get_device_properties": lambda device: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)


@pytest.fixture
def fake(calibrate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """Every clock is that of CUDA, on the fake."""
    monkeypatch.setattr(calibrate, "clock", lambda device, steps: timing._cuda(steps, "cold"))
    monkeypatch.setattr(calibrate, "sets_of_buffers", lambda device, size: 2)
    return FakeCuda(monkeypatch)


def test_gap_of_a_graph(calibrate: ModuleType, fake: FakeCuda) -> None:
    part = calibrate.Part(CPU)
    reading = calibrate.graph_gaps(part)
    check_values(part.values)
    assert part.values["gap_per_node_us"] == pytest.approx(1e6 * NODE, rel=1e-3)
    assert part.values["replay_of_1_nodes_us"] == pytest.approx(1e6 * (LAUNCH + NODE), rel=1e-3)
    assert part.values["replay_of_200_nodes_us"] == pytest.approx(1e6 * (LAUNCH + 200 * NODE), rel=1e-3)
    assert reading.startswith("1.25 us a node")


def test_bias_of_do_bench(calibrate: ModuleType, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda step, **options: (step(), 0.05)[1])
    monkeypatch.setattr(calibrate, "MMD_SIZES", ((2, 4, 24), (2, 4, 24)))
    part = calibrate.Part(CPU)
    assert calibrate.do_bench_bias(part).startswith("float32: do_bench 50.0 us, rotated ")
    check_values(part.values)
    assert part.values["float32_after_writing_us"] == part.values["bfloat16_after_reading_us"] == 9.0
    assert part.values["float32_dirty_l2_bias_us"] == 0.0


def test_launches_of_the_mmd(calibrate: ModuleType) -> None:
    pytest.importorskip("triton")
    part = calibrate.Part(CPU)
    reading = calibrate.mmd_launches(part)
    check_values(part.values)
    names = {name.removeprefix("mmd_4_4_256_float32_").removesuffix("_us") for name in part.values if "float32" in name}
    assert names == {"copy", "shipped", *(f"{warps}_warps_{programs}_programs" for warps, programs in calibrate.MMD_LAUNCHES)}
    assert len(part.values) == 2 * len(names)
    assert reading.count("x copy") == 2
    assert part.notes == []
    refused = calibrate.Part(CPU, refused=frozenset({"mmd"}))
    assert "tests of mmd failed" in calibrate.mmd_launches(refused) == calibrate.do_bench_bias(refused)
    assert refused.values == {}


LAUNCHED = """
import fake_driver, torch
launches = fake_driver.install()
import calibrate
from imm_kernels import mmd

what, shipped = mmd.Kernel("laplace", (1.0,), 1e-8, False), (mmd.direct_sizes, mmd._NEAR_BYTES)
for G, M, D in calibrate.MMD_SIZES[:2]:
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.zeros(1, M, D, dtype=dtype).expand(G, M, D)
        for warps, programs in calibrate.MMD_LAUNCHES:
            with calibrate.mmd_launch(warps, programs, 2 * M * D * dtype.itemsize):
                mmd.loss_and_gradient(y, y, torch.ones(G), None, None, what)
            (launch,) = launches
            assert launch.kernel == "mmd_direct._resident_kernel", launch
            assert (launch.grid, launch.warps) == ((132 * programs, 1, 1), warps), launch
            assert launch.given["BLOCK"] == 32 * warps * launch.given["EACH"] == 32 * warps * 16 // dtype.itemsize, launch
            # So many fit a multiprocessor.
            assert programs * 32 * warps * launch.maxnreg <= 65536, launch
            assert programs * (launch.shared + 1024) <= 228 * 1024, launch
            launches.clear()
assert (mmd.direct_sizes, mmd._NEAR_BYTES) == shipped
"""


def test_the_mmd_is_launched_with_the_warps_and_programs_that_are_named(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": f"{BENCH}:{Path(__file__).parent}", "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", LAUNCHED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_products_that_are_asked_for_and_no_others(calibrate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few captures for each of 2, 128 and 16 rows."""
    timed: list[str] = []
    monkeypatch.setattr(calibrate, "timed", lambda part, variants: timed.extend(variants) or dict.fromkeys(variants, 1e-3))
    monkeypatch.setattr(calibrate, "TOKENS", 1)
    monkeypatch.setattr(calibrate.Part, "cuda", True)
    randn, empty = torch.randn, torch.empty
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: randn(1, 1, **options))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(1, 1, **options))
    part = calibrate.Part(CPU)
    calibrate.matrix_rates(part)
    block = ["with_bias", "with_bias", "with_bias_and_gelu", "with_bias_then_gelu", "with_bias"]
    assert timed == ["square", *3 * block]
    rows = [name.split("_")[4] for name in part.values if name.startswith("products_of")]
    assert rows == ["2", "128", "16"]
    assert {"square_of_8192_tflop_per_s", "gelu_in_fc1_128_rows_saves_us"} <= set(part.values)
    assert part.values["products_of_28_blocks_2_rows_ms"] == 4 * 28


def test_sustained_clocks(calibrate: ModuleType, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([("1980 MHz", "690.5 W", "[N/A]"), ("1755 MHz", "[N/A]", "[N/A]")])
    keys = ("clocks.sm", "power.draw", "temperature.gpu")
    monkeypatch.setattr(calibrate.environment, "clocks", lambda device: dict(zip(keys, next(seen, ("", "", "")), strict=True)))
    monkeypatch.setattr(calibrate, "SUSTAINED", 0.2)
    part = calibrate.Part(CPU)
    reading = calibrate.sustained_clocks(part)
    check_values(part.values)
    assert part.values["samples_count"] >= 2
    assert (part.values["sm_clock_least_mhz"], part.values["sm_clock_most_mhz"]) == (1755, 1980)
    assert part.values["power_median_w"] == 690.5
    assert not any("temperature" in name for name in part.values)
    assert reading.startswith("1868 MHz, ")


def test_read_bandwidth(calibrate: ModuleType, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import calibrate_kernels

    reads = []
    monkeypatch.setattr(calibrate_kernels, "read", lambda x, sums, passes: reads.append((x.nbytes, len(sums), passes)))
    monkeypatch.setattr(calibrate, "READ_MEGABYTES", (1, 2))
    part = calibrate.Part(CPU)
    assert calibrate.read_bandwidth(part).startswith("1 MB: ")
    check_values(part.values)
    block = 4 * calibrate_kernels.BLOCK
    assert {size for size, _, _ in reads} == {10**6 // block * block, 2 * 10**6 // block * block}
    assert {count for _, count, _ in reads} == {2 * calibrate_kernels.PROGRAMS}
    size, _, passes = reads[0]
    assert part.values["read_of_1_mb_gb_per_s"] == pytest.approx(1e-9 * size * passes / LAUNCH, rel=1e-3)


INTERPRETED = """
import torch, calibrate_kernels as k
x, sums = torch.randn(5 * k.BLOCK), torch.full((3,), float("nan"))
k.read(x, sums, 4)
torch.testing.assert_close(sums.double().sum(), 4 * x.double().sum(), rtol=1e-4, atol=1e-2)
"""


def test_the_kernel_reads_everything_16_bytes_at_a_time() -> None:
    """Every pass adds up all of x; compiled for sm_90, by loads of 16 bytes past L1, without a spill."""
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(BENCH), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = "import calibrate_kernels as k, triton; from triton.backends.compiler import GPUTarget; "
    compiled += "from triton.compiler import ASTSource; types = {'x_ptr': '*fp32', 'sum_ptr': '*fp32'}; "
    compiled += "types |= {'blocks': 'i32', 'passes': 'i32', 'BLOCK': 'constexpr'}; "
    compiled += "source = ASTSource(k._read_kernel, types, {(4,): k.BLOCK}, {(0,): [['tt.divisibility', 16]]}); "
    compiled += "made = triton.compile(source, GPUTarget('cuda', 90, 32), {'num_warps': k.NUM_WARPS}); print(made.asm['ptx'])"
    del environment["TRITON_INTERPRET"]
    done = subprocess.run([sys.executable, "-c", compiled], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loads = re.findall(r"ld\.global\S*", done.stdout)
    assert loads
    assert set(loads) == {"ld.global.cg.v4.b32"}
