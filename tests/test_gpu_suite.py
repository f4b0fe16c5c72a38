"""bench/gpu_suite.py on a machine without a GPU: the plan, limits that are kept, what is written, going on where it stopped."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SUITE = Path(__file__).parent.parent / "bench" / "gpu_suite.py"
NO_GPU = ("build", "kernels", "triton tests", "memcheck")
RUNS = ("op tests", "bench mmd", "bench flow_map_mmd", "bench flow_step", "bench noise")
FILES = {"summary.json", "environment.json", "build.txt", "tests.txt", "sanitizer.txt", "bench.txt", "rows.csv", "rows.jsonl"}


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
    done = {name: {"status": "ok"} for name in RUNS[:-1]}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": done}))
    result = run(tmp_path, "--limit", "60", "--commit", "abc")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("done before") == 4
    assert {entry["status"] for entry in stages(tmp_path).values()} == {"ok", "skipped"}
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"noise"}
    assert {row["status"] for row in rows} == {"ok"}
    names = {path.name for path in tmp_path.iterdir()}
    assert {"summary.json", "environment.json", "rows.csv", "bench.txt"} <= names <= FILES
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 16e6
    assert "noise normal" in (tmp_path / "bench.txt").read_text()


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
    assert {stage.name: stage.command for stage in bare}["memcheck"] == "compute-sanitizer not found"


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
