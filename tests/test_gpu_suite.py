"""bench/gpu_suite.py on a machine without a GPU: the plan, limits that are kept, what is written, going on where it stopped,
what is refused; and the checks that it runs, bench/check_kernels.py, on the CPU."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from imm.ops import dispatch

SUITE = Path(__file__).parent.parent / "bench" / "gpu_suite.py"
NO_GPU = ("build", "kernels", "triton tests", "memcheck", "racecheck")
RUNS = ("op tests", "calibrations", "bench mmd", "bench flow_map_mmd", "bench flow_step", "bench noise")
FILES = {"summary.json", "environment.json", "build.txt", "tests.txt", "sanitizer.txt", "calibration.json"}
FILES |= {"bench.txt", "rows.csv"}


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", SUITE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_suite"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUITE), "--out", str(out), "--dry-run", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def stages(out: Path) -> dict[str, dict[str, str]]:
    return json.loads((out / "summary.json").read_text())["stages"]


def test_every_stage_is_recorded_within_its_limit(tmp_path: Path) -> None:
    result = run(tmp_path, "--limit", "0.5")
    assert result.returncode == 1
    assert not result.stderr
    found = stages(tmp_path)
    assert list(found) == [
        "build",
        "kernels",
        "triton tests",
        "op tests",
        "memcheck",
        "racecheck",
        "calibrations",
        "bench mmd",
        "bench flow_map_mmd",
        "bench flow_step",
        "bench noise",
    ]
    assert {found[name]["status"] for name in NO_GPU} == {"skipped"}
    for name in RUNS:  # importing torch and measuring takes longer
        assert found[name]["status"] == "timed out"
        assert float(found[name]["seconds"]) < 4.0
    assert {path.name for path in tmp_path.iterdir()} <= FILES
    assert "== op tests: timed out" in (tmp_path / "tests.txt").read_text()
    assert '"pytest": true' in result.stdout


def test_it_goes_on_where_it_stopped_and_writes_rows(tmp_path: Path) -> None:
    done = {name: {"status": "ok"} for name in RUNS[:-1] if name != "calibrations"}
    (tmp_path / "summary.json").write_text(json.dumps({"commit": "abc", "stages": done}))
    result = run(tmp_path, "--limit", "60", "--commit", "abc")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done before") == 4
    assert {entry["status"] for entry in stages(tmp_path).values()} == {"ok", "skipped"}
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"noise"}
    assert {row["status"] for row in rows} == {"ok"}
    names = {path.name for path in tmp_path.iterdir()}
    assert {"summary.json", "environment.json", "rows.csv", "bench.txt", "calibration.json"} <= names <= FILES
    measured = json.loads((tmp_path / "calibration.json").read_text())["calibrations"]
    assert {entry["status"] for entry in measured.values()} == {"ok"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 16e6
    assert "noise normal" in (tmp_path / "bench.txt").read_text()


def test_another_commit_begins_anew(suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"commit": "abc", "stages": {"op tests": {"status": "ok"}}}))
    (tmp_path / "rows.csv").write_text("")
    monkeypatch.setattr(suite, "TOTAL", 5.0)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), "--dry-run", "--commit", "def"])
    assert suite.main(lambda *words, **options: None) == 0
    assert stages(tmp_path)["op tests"]["status"] == "skipped"
    assert not (tmp_path / "rows.csv").exists()


def test_it_stops_in_time(suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "TOTAL", 5.0)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), "--dry-run"])
    assert suite.main(lambda *words, **options: None) == 0
    found = stages(tmp_path)
    assert {found[name]["reason"] for name in RUNS} == {"no time left; run again with the same folder"}


def test_the_plan_has_every_benchmark(suite: ModuleType) -> None:
    options = suite.argparse.Namespace(dry_run=False, out=Path("results"))
    found = {"gpu": "a GPU", "tools": dict.fromkeys(suite.TOOLS, True)}
    planned, _ = suite.plan(options, found)
    assert all(stage.limit < suite.TOTAL < 540 for stage in planned)
    assert all(isinstance(stage.command, list) for stage in planned)
    assert planned[0].command[-1] == "--cuda"
    benches = [stage for stage in planned if stage.name.startswith("bench ")]
    assert {stage.name for stage in benches} == {f"bench {path.stem[6:]}" for path in SUITE.parent.glob("bench_*.py")}
    assert all(stage.command[4:] == ["cuda", str(Path("results").resolve()), "full"] for stage in benches)
    bare, _ = suite.plan(options, {"gpu": "a GPU", "tools": dict.fromkeys(suite.TOOLS, False)})
    assert bare[0].command[-1] != "--cuda"
    commands = {stage.name: stage.command for stage in bare}
    assert commands["memcheck"] == commands["racecheck"] == "compute-sanitizer not found"
    racecheck = next(stage for stage in planned if stage.name == "racecheck")
    assert racecheck.command[:3] == ["compute-sanitizer", "--error-exitcode", "9"]
    assert racecheck.command[-1] == "--small"
    order = [stage.name for stage in planned]
    assert order[:7] == ["build", "kernels", "triton tests", "op tests", "memcheck", "racecheck", "calibrations"]
    assert set(suite.ABOUT) >= set(suite.GPU_BENCHES) | set(suite.CALIBRATED)
    assert len(FILES) == 8
    assert {stage.file for stage in planned} <= FILES


PYTEST = """
tests/test_mmd.py::test_a[3-4] PASSED                       [ 10%]
tests/test_mmd.py::test_a[4-4] FAILED                       [ 20%]
[gw1] [ 30%] FAILED tests/test_ops.py::test_opcheck[noise-sliced-torch.float32-cuda]
[gw0] [ 35%] PASSED tests/test_flow_step.py::test_b
=========================== short test summary info ============================
FAILED tests/test_mmd.py::test_a[4-4] - AssertionError: tests/test_adaln.py is innocent
ERROR tests/test_triton_adaln.py - ImportError: no such luck
"""
CHECKS = """imm::flow_step (3, 37) torch.float32: ok, largest error 1.0e-07
imm::sampling_step (3, 37) torch.float32: WRONG, largest error 1.0e+00
after imm::timestep_attention (2, 37, 2, 8) torch.float32: FAILED: the process ended with -6
"""
SANITIZER = """========= COMPUTE-SANITIZER
imm::flow_step (3, 37) torch.float32: ok, largest error 1.0e-07
========= Error: Race reported between Write access at _resident_kernel+0x1d0
=========     and Read access at _resident_kernel+0x2d0 [64 hazards]
=========
imm::mmd_loss M=4 D=37 torch.float32: ok, largest error 1.0e-07
imm::mmd_gram M=4 D=37 torch.float32: ok, largest error 1.0e-07
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_what_failed_is_read_from_the_output(suite: ModuleType) -> None:
    assert suite.failed(PYTEST) == [
        "tests/test_mmd.py::test_a[4-4]",
        "tests/test_ops.py::test_opcheck[noise-sliced-torch.float32-cuda]",
        "tests/test_triton_adaln.py",
    ]
    assert suite.failed("tests/test_dit.py::test_a Fatal Python error: Segmentation fault\n") == ["tests/test_dit.py::test_a"]
    assert suite.failed("\ntests/test_dit.py::test_a: FAILED: the device does not answer\n") == ["tests/test_dit.py::test_a"]
    assert suite.failed(CHECKS) == [
        "after imm::timestep_attention (2, 37, 2, 8) torch.float32",
        "imm::sampling_step (3, 37) torch.float32",
    ]
    assert suite.failed(SANITIZER) == ["imm::mmd_loss M=4 D=37 torch.float32"]
    assert suite.failed(SANITIZER.replace("Error: Race", "Warning: Race")) == []
    unknown = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\nimm::noise (1, 1): FAILED: Error: 999\n"
    assert suite.failed(unknown) == []
    assert suite.failed("= 12 passed in 3.21s =\ntests/test_mmd.py::test_a PASSED\n") == []


@pytest.mark.parametrize(
    ("name", "benches"),
    [
        ("tests/test_triton_mmd.py::test_a", {"mmd", "flow_map_mmd"}),
        ("tests/test_ops.py::test_opcheck[mmd_loss_grad-empty]", {"mmd", "flow_map_mmd"}),
        ("tests/test_attention.py::test_a", {"attention", "dit", "sampler"}),
        ("imm::gated_residual_adaln_bwd (2, 5, 37)", {"adaln", "dit", "sampler"}),
        ("triton noise (1, 1)", {"noise", "sampler"}),
        ("tests/test_sampler.py::test_a", {"sampler"}),
        ("tests/test_dit.py::test_a", {"dit", "sampler"}),
        ("tests/test_flow_step.py::test_a", {"flow_step", "flow_map_mmd", "sampler"}),
        ("tests/test_seeds.py::test_conditional", set()),
    ],
)
def test_a_failure_stops_the_benchmarks_that_rest_on_it(suite: ModuleType, name: str, benches: set[str]) -> None:
    done = {"op tests": {"status": "failed", "failed": [name]}, "kernels": {"status": "ok"}}
    assert {op for op in suite.GPU_BENCHES if suite.refusing(op, done)} == benches | suite_new(suite, name)


def suite_new(suite: ModuleType, name: str) -> set[str]:
    """Benchmarks that later files have added: what they rest on is theirs to say."""
    known = {"mmd", "attention", "dit", "sampler", "adaln", "flow_map_mmd", "flow_step", "noise"}
    return {op for op in set(suite.GPU_BENCHES) - known if suite.refusing(op, {"": {"failed": [name]}})}


def test_figures_of_an_op_whose_tests_failed_are_refused(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even those that were measured before; the calibrations run without the op."""
    (tmp_path / "summary.json").write_text(json.dumps({"stages": {"bench mmd": {"status": "ok"}}}))
    ran: list[str] = []

    def execute(stage: Any, limit: float, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
        ran.append(stage.name)
        if stage.name == "calibrations":
            assert stage.command[-2:] == ["--refused", "mmd"]
        bad = stage.name == "op tests"
        return {"status": "failed" if bad else "ok"}, "tests/test_mmd.py::test_a FAILED [ 10%]\n" if bad else "fine\n"

    monkeypatch.setattr(suite, "execute", execute)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path), "--dry-run"])
    assert suite.main(lambda *words, **options: None) == 1
    found = stages(tmp_path)
    assert found["op tests"]["failed"] == ["tests/test_mmd.py::test_a"]
    for name in ("bench mmd", "bench flow_map_mmd"):
        assert found[name] == {"status": "refused: tests failed", "reason": "tests/test_mmd.py::test_a"}
    assert found["bench noise"]["status"] == found["bench flow_step"]["status"] == "ok"
    assert not {"bench mmd", "bench flow_map_mmd"} & set(ran)
    # Mended, they are measured.
    monkeypatch.setattr(suite, "execute", lambda stage, *rest: (ran.append(stage.name) or {"status": "ok"}, "fine\n"))
    assert suite.main(lambda *words, **options: None) == 0
    assert {stages(tmp_path)[name]["status"] for name in ("bench mmd", "bench flow_map_mmd")} == {"ok"}


def test_a_device_that_died_ends_the_process_and_no_other_test_fails(suite: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_dead.py").write_text(DEAD)
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**own, "PYTHONPATH": str(SUITE.parent)}
    options = ["-c", os.devnull, "-p", "no:cacheprovider", "-p", "dead_device", "-vv", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "test_fine PASSED" in done.stdout
    assert "test_dead.py::test_illegal: FAILED: the device does not answer: an illegal access" in done.stdout
    assert "test_after" not in done.stdout
    assert suite.failed(done.stdout) == ["test_dead.py::test_illegal"]


DEAD = """
import torch

def test_fine():
    assert not torch.cuda.is_initialized()

def test_illegal():
    def dead():
        raise RuntimeError("an illegal access\\nmore")

    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, dead

def test_after():
    assert False
"""


@pytest.fixture
def check_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bench/check_kernels.py, comparing the CPU with itself."""
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(SUITE.parent))
    module = importlib.import_module("check_kernels")
    monkeypatch.setattr(module, "on", lambda device, values: values)
    for name in ("flow_step", "noise"):
        monkeypatch.setattr(importlib.import_module(f"imm_kernels.{name}"), name, getattr(torch.ops.imm, name))
    return module


@pytest.mark.parametrize("sizes", ["SMALL", "LARGE"])
def test_every_check_of_the_kernels(
    check_kernels: ModuleType, sizes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every op that has a kernel, and all of the checks whatever the number of processes."""
    monkeypatch.setattr(check_kernels, "MMD_SIZES", ((4, 37),))
    given = getattr(check_kernels, sizes)
    assert check_kernels.run_part(0, 1, given) == 0
    alone = capsys.readouterr().out.splitlines()
    assert all(": ok, largest error" in line for line in alone)
    assert sum(check_kernels.run_part(i, 3, given) for i in range(3)) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(alone)
    checked = {re.match(r"(?:imm::|triton )(\w+)", line)[1] for line in alone}
    with_kernels = {op for op in dispatch.names() if {"cuda", "triton"} & {i.name for i in dispatch._TABLE[op]}}
    assert {op for op in with_kernels if not op.endswith(".out")} <= checked | WITHOUT_A_CHECK


#: The backwards of these are torch's operations on every device.
WITHOUT_A_CHECK: set[str] = set()


def test_checks_end_where_the_device_does_not_answer(
    check_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("an illegal access")

    def dead() -> None:
        raise RuntimeError("an illegal access")

    checks = [("a", broken, (), torch.ones(1), 1.0), ("b", broken, (), torch.ones(1), 1.0)]
    monkeypatch.setattr(check_kernels, "groups", lambda sizes: iter([lambda: iter(checks)]))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert check_kernels.run_part(0, 1, {}) == 1
    assert capsys.readouterr().out.count("FAILED") == 2
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    assert check_kernels.run_part(0, 1, {}) == 1
    text = capsys.readouterr().out
    assert text.startswith("a: FAILED: RuntimeError: an illegal access\n")
    assert "b: " not in text
    wrong = ("c", lambda: torch.zeros(1), (), torch.ones(1), 1e-3)
    assert not check_kernels.check(*wrong)
    assert capsys.readouterr().out == "c: WRONG, largest error 1.0e+00\n"


def test_checks_in_several_processes(
    check_kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint('part', *sys.argv[1:], flush=True)\nos.abort() if '2' in sys.argv[1:3] else 0\n")
    monkeypatch.setattr(check_kernels, "__file__", str(script))
    assert check_kernels.share(2, small=False) == 0
    assert capsys.readouterr().out == "part --part 0 --jobs 2\npart --part 1 --jobs 2\n"
    assert check_kernels.share(3, small=False) == 1
    assert "after part --part 2 --jobs 3: FAILED: the process ended with -6" in capsys.readouterr().out


def test_files_that_lack_a_package_are_skipped_by_name(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    there = suite.importlib.util.find_spec
    without = lambda *absent: lambda name: None if name in absent else there(name)
    monkeypatch.setattr(suite.importlib.util, "find_spec", without("hypothesis"))
    command, notes = suite.pytest_command(("test_noise", "test_parametrizations", "test_mmd"))
    lacking = [n for n in ("test_noise", "test_parametrizations", "test_mmd") if "hypothesis" in _source(n)]
    assert notes == [f"{name}.py skipped: hypothesis not installed" for name in lacking]
    assert not any(name in " ".join(command) for name in lacking)
    monkeypatch.setattr(suite.importlib.util, "find_spec", without("pytest"))
    assert suite.pytest_command(("test_noise",))[0].startswith("pytest is not installed")


def _source(name: str) -> str:
    return (Path(__file__).parent / f"{name}.py").read_text()


def test_long_output_is_shortened(suite: ModuleType) -> None:
    text = suite.shorten("a" * 10_000_000 + "the end")
    assert len(text) < suite.TEXT_BYTES
    assert text.endswith("the end")
    assert suite.shorten("short") == "short"
