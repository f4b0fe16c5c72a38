"""bench/gpu_suite.py on a machine without a GPU: the plan, limits that are kept, what is written, going on where it stopped,
what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_suite as suite
import pytest

from harness import rows

SUITE = Path(suite.__file__)
FILES = {"summary.json", "environment.json", "build.txt", "tests.txt", "sanitizer.txt", "calibration.json"}
FILES |= {"bench.txt", "rows.csv"}


def stages(out: Path) -> dict[str, dict[str, Any]]:
    return json.loads((out / "summary.json").read_text())["stages"]


def planned(tools: bool = True) -> list[Any]:
    return suite.plan(Path("results"), {"tools": dict.fromkeys(suite.TOOLS, tools)}, cpu=False)


def test_a_dry_run_prints_order_and_seconds_and_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    out, lines = tmp_path / "out", {}
    monkeypatch.setattr(suite, "probe", lambda: {"gpu": "none", "tools": dict.fromkeys(suite.TOOLS, False)})
    for budget in (540, 240):
        options = ["--dry-run", f"--budget={budget}", f"--bundle={tmp_path}", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", *options])
        assert suite.main() == 0
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == f"budget {budget} s; the library takes 10 s of it"
        found = filter(None, (re.match(r"  ([\w' ]+?) +(\d+) s, from +(\d+)(.*)$", line) for line in rest))
        lines[budget] = [(m[1], float(m[2]), float(m[3]), m[4].strip()) for m in found]
    assert not out.exists()
    names = [line[0] for line in lines[540]]
    assert names[:5] == ["kernels", "calibrations", "bench attention", "bench dit", "bench sampler"]
    assert names.index("bench noise") < names.index("triton tests") < names.index("baselines dit") < names.index("racecheck")
    for budget, of_budget in lines.items():
        begin = 10.0
        for _, seconds, at, fits in of_budget:
            assert at == begin
            assert fits == ("" if at + seconds <= budget else "cut short" if at + 8 <= budget else "next command")
            begin += seconds
    assert {line[0] for line in lines[540] if not line[3]} >= {f"bench {op}" for op in ("attention", "dit", "sampler", "mmd")}


def test_what_was_not_tried_comes_before_what_is_repeated() -> None:
    done = {"kernels": "ok", "calibrations": "failed", "bench attention": "cut short", "bench dit": "skipped"}
    done |= {"bench sampler": suite.REFUSED}
    names = [stage.name for stage in suite.ordered(planned(), {name: {"status": status} for name, status in done.items()})]
    assert names[:3] == ["bench dit", "bench sampler", "bench mmd"]
    assert names[-2:] == ["bench attention", "calibrations"]
    assert len(names) == len(planned()) - 1  # without the kernels


def test_the_plan_has_every_benchmark_and_every_file_is_known() -> None:
    commands = {stage.name: stage.command for stage in planned()}
    ops = {path.stem[6:] for path in SUITE.parent.glob("bench_*.py")} - {"serve"}  # a program of its own
    assert set(suite.BENCHES) == ops
    assert commands.keys() >= {f"{kind} {op}" for op in ops for kind in ("bench", "baselines")}
    results = str(Path("results").resolve())
    for kind, peers in (("bench", "first"), ("baselines", "late")):
        assert commands[f"{kind} dit"][3:] == ["dit", "cuda", results, "full", peers]
    assert commands["racecheck"][:3] == ["compute-sanitizer", "--error-exitcode", "9"]
    assert commands["racecheck"][-1] == "--small"
    assert str(suite.WORKERS) in commands["triton tests"]
    bare = {stage.name: stage.command for stage in planned(tools=False)}
    assert bare["memcheck"] == bare["racecheck"] == "compute-sanitizer not found"
    assert bare["toolkit's ptxas"] == "nvcc not found"
    assert {stage.file for stage in planned()} <= FILES
    assert all((SUITE.parents[1] / "tests" / f"{name}.py").exists() for name in (*suite.OP_TESTS, *suite.TRITON_TESTS))


@pytest.mark.full
def test_a_rehearsal_runs_every_command(tmp_path: Path) -> None:
    """On the CPU, the sanitizer's in a stand-in's hands."""
    out, stand_in = tmp_path / "out", tmp_path / "compute-sanitizer"
    stand_in.write_text('#!/bin/sh\nwhile [ "${1%.py}" = "$1" ]; do last=$1; shift; done; exec "$last" "$@"\n')
    stand_in.chmod(0o755)

    def run(budget: int) -> str:
        command = [sys.executable, str(SUITE), "--out", str(out), "--cpu", f"--budget={budget}"]
        variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(450)
    assert {name for name, outcome in stages(out).items() if outcome["status"] != "ok"} == {
        *(f"{kind} {op}" for kind in ("bench", "baselines") for op in set(suite.BENCHES) - set(suite.ON_CPU)),
        *(() if shutil.which("nvcc") else ("toolkit's ptxas",)),
    }
    measured = {(row.op, row.status) for row in rows.read(out / "rows.csv")}
    assert measured == {(op, "ok") for op in ("mmd", "flow_map_mmd", "flow_step", "noise")}
    calibrated = json.loads((out / "calibration.json").read_text())["calibrations"]
    assert {entry["status"] for entry in calibrated.values()} == {"ok"}
    assert {path.name for path in out.iterdir()} <= FILES
    assert sum(path.stat().st_size for path in out.iterdir()) < 16e6
    assert re.findall(r"^([\w ]+): ok", run(60), re.MULTILINE) == []  # nothing is repeated


def command(monkeypatch: pytest.MonkeyPatch, out: Path, programs: dict[str, str], *options: str) -> int:
    """One command of the suite with stages that run these programs of Python in the place of its own."""
    files = {"kernels": "tests.txt", "op tests": "tests.txt", "racecheck": "sanitizer.txt"}

    def plan(*given: Any) -> list[Any]:
        run_by_python = lambda text: [sys.executable, "-c", text]
        return [suite.Stage(name, 1.0, files.get(name, "bench.txt"), run_by_python(text)) for name, text in programs.items()]

    monkeypatch.setattr(suite, "plan", plan)
    monkeypatch.setattr(suite, "probe", lambda: {"gpu": "a GPU", "tools": {}})
    monkeypatch.setattr(suite, "LIBRARY", "print('loaded')")
    monkeypatch.setattr(suite.Stage, "limit", 2.0)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(out), "--commit=abc", *options])
    return suite.main()


def test_a_stage_that_sleeps_or_crashes_leaves_the_others_results(tmp_path: Path, monkeypatch) -> None:
    programs = {
        "bench mmd": "import time; print('begun', flush=True); time.sleep(60)",
        "bench dit": "import os; print('begun', flush=True); os.abort()",
        "bench noise": "print('measured')",
    }
    statuses = lambda: [outcome["status"] for outcome in stages(tmp_path).values()]
    assert command(monkeypatch, tmp_path, programs) == 1
    found = stages(tmp_path)
    assert statuses() == ["cut short", "failed", "ok"]
    assert (found["bench mmd"]["reason"], found["bench dit"]["returncode"]) == ("begun", -6)
    assert len(suite.shorten("a" * 10_000_000)) < suite.TEXT_BYTES
    # Again: what was cut short, what failed, and not what was done.
    assert command(monkeypatch, tmp_path, {**programs, "bench mmd": "print('in time')"}) == 1
    assert statuses() == ["ok", "failed", "ok"]
    assert (tmp_path / "bench.txt").read_text().count("measured") == 1
    # Another commit begins anew.
    assert command(monkeypatch, tmp_path, {"bench adaln": "print('other')"}, "--commit=def") == 0
    assert list(stages(tmp_path)) == ["bench adaln"]
    # What was begun in the last seconds is cut short; what was not is left for the next command, which begins with it.
    monkeypatch.setattr(suite, "LEAST", 20.0)
    programs = {"bench mmd": "import time; time.sleep(60)", "bench dit": "print('measured')"}
    for second in ("skipped", "ok"):
        assert command(monkeypatch, tmp_path, programs, "--commit=ghi", "--budget=21") == 0
        assert (list(stages(tmp_path)), statuses()) == (list(programs), ["cut short", second])


def test_the_library_is_asked_for_and_without_one_the_suite_stops(tmp_path: Path, monkeypatch, capsys) -> None:
    ran, works, programs = [], [], {"bench mmd": "print()"}

    def execute(given: list[str], limit: float, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
        folder = Path(environment.get("IMM_NATIVE_DIR", "tree")).name
        ran.append("build" if "setup.py" in given else folder if given[2] == suite.LIBRARY else "stage")
        good = folder in works or ran[-1] in ("build", "stage")
        return {"status": "ok" if good else "failed", "seconds": 1.0}, "built for another torch\n" * (not good)

    monkeypatch.setattr(suite, "execute", execute)
    (tmp_path / "bundle").mkdir()
    for loads, expected, status in (
        (["bundle"], ["bundle", "stage"], 0),
        (["tree"], ["bundle", "tree", "stage"], 0),
        ([], ["bundle", "tree", "build", "tree"], 1),
    ):
        ran.clear()
        works[:] = loads
        options = f"--bundle={tmp_path / 'bundle'}", f"--commit={status}{len(expected)}"
        assert command(monkeypatch, tmp_path / "out", programs, *options) == status
        assert ran == expected
    output = capsys.readouterr().out
    assert "the bundle's: built for another torch" in output
    assert "stopped: without the native library" in output
    assert set(stages(tmp_path / "out")) == {"build"}


ROWS = """op,mode,shape,dtype,device,peer,status,median_us,samples_us
mmd,m,s,float32,cuda,imm out=,ok,1.0,1.0 1.0
mmd,m,s,float32,cuda,eager broadcast,ok,2.0,2.0 2.0
noise,m,s,float32,cuda,imm,ok,1.0,1.0 1.0
noise,m,s,float32,cuda,reference,refused: RuntimeError,,
"""


def test_a_failed_test_marks_the_rows_of_its_ops_and_refuses_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "given.csv").write_text(ROWS)
    rows.write(tmp_path, rows.read(tmp_path / "given.csv"))
    statuses = lambda: [row.status for row in rows.read(tmp_path / "rows.csv")]
    failing = "print('tests/test_mmd.py::test_a: FAILED'); raise SystemExit(1)"
    programs = {"op tests": failing, "bench mmd": "print('measured')"}
    assert command(monkeypatch, tmp_path, programs) == 1
    assert stages(tmp_path)["op tests"]["failed"] == ["tests/test_mmd.py::test_a"]
    assert stages(tmp_path)["bench mmd"]["status"] == "ok"
    marked = "unverified: tests/test_mmd.py::test_a (op tests)"
    assert statuses() == [marked, "ok", "ok", "refused: RuntimeError"]
    assert marked in rows.table(rows.read(tmp_path / "rows.csv")[:2])
    # Once they pass, the rows are good.
    assert command(monkeypatch, tmp_path, {**programs, "op tests": "print('1 passed')"}) == 0
    assert statuses() == ["ok", "ok", "ok", "refused: RuntimeError"]


def test_a_wrong_kernel_refuses_the_figures_of_its_ops(tmp_path: Path, monkeypatch) -> None:
    said = "imm::mmd_loss M=4: WRONG, largest error 1.0\\nimm::noise (1, 1): FAILED: RuntimeError"
    benches = {f"bench {op}": "print()" for op in ("mmd", "flow_map_mmd", "noise")}
    assert command(monkeypatch, tmp_path, {"kernels": f"print('{said}'); raise SystemExit(1)", **benches}) == 1
    found = stages(tmp_path)
    assert found["kernels"]["wrong"] == ["imm::mmd_loss M=4"]
    assert [found[name]["status"] for name in benches] == [suite.REFUSED, suite.REFUSED, "ok"]
    assert suite.unverified(found)["noise"] == "imm::noise (1, 1) (kernels)"


CHECKS = """imm::flow_step (3, 37) torch.float32: ok, largest error 1.0e-07
imm::sampling_step (3, 37) torch.float32: WRONG, largest error 1.0e+00
after imm::timestep_attention (2, 37, 2, 8) torch.float32: FAILED: the process ended with -6
"""
SANITIZER = """========= COMPUTE-SANITIZER
imm::flow_step (3, 37) torch.float32: ok, largest error 1.0e-07
========= Error: Race reported between Write access at _resident_kernel+0x1d0
=========     and Read access at _resident_kernel+0x2d0 [64 hazards]
imm::mmd_loss M=4 D=37 torch.float32: ok, largest error 1.0e-07
imm::mmd_gram M=4 D=37 torch.float32: ok, largest error 1.0e-07
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


def test_what_failed_is_read_from_the_output_and_concerns_the_benchmarks_that_rest_on_it() -> None:
    unknown = "========= COMPUTE-SANITIZER\n========= Error: Device not supported\nimm::noise (1, 1): FAILED: Error: 999\n"
    crashed, wrong = "after imm::timestep_attention (2, 37, 2, 8) torch.float32", "imm::sampling_step (3, 37) torch.float32"
    assert suite.failed("\ntests/test_dit.py::test_a[3: 4]: FAILED\nx\n") == ["tests/test_dit.py::test_a[3: 4]"]
    assert (suite.failed(CHECKS, "WRONG"), suite.failed(CHECKS)) == ([wrong], [crashed, wrong])
    assert suite.failed(SANITIZER) == ["imm::mmd_loss M=4 D=37 torch.float32"]
    for text in (
        SANITIZER.replace("Error: Race", "Warning: Race"),
        unknown,
        "= 12 passed =\ntests/test_mmd.py::test_a: PASSED\n",
    ):
        assert suite.failed(text) == []
    for name, benches in {
        "tests/test_ops.py::test_opcheck[mmd_loss-empty]": {"mmd", "flow_map_mmd", "objective"},
        "imm::gated_residual_adaln_bwd (2, 5, 37)": {"adaln", "dit", "sampler", "objective"},
        "triton noise (1, 1)": {"noise", "sampler", "tokens"},
        "tests/test_tokens_graphs.py::test_a": {"tokens"},
        "tests/test_flow_step.py::test_a": {"flow_step", "flow_map_mmd", "sampler", "objective"},
        "tests/test_seeds.py::test_conditional": set(),
    }.items():
        assert {op for op in suite.BENCHES if suite.concerning(op, [name])} == benches


def test_verdicts_are_said_and_what_passed_before_is_left_out(tmp_path: Path) -> None:
    """And a device that died ends the process: no other test fails."""
    (tmp_path / "test_dead.py").write_text(DEAD)
    dead = plugged(tmp_path, "test_dead.py")
    assert (dead.returncode, "test_dead.py::test_fine: PASSED" in dead.stdout) == (3, True), dead.stdout + dead.stderr
    assert "test_dead.py::test_illegal: FAILED: the device does not answer: an illegal access" in dead.stdout
    assert suite.failed(dead.stdout) == ["test_dead.py::test_illegal"]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_two.py").write_text("def test_a():\n    pass\n\ndef test_b():\n    assert False\n")
    (tmp_path / "tests" / "test_bad.py").write_text("import torch.no_such_thing\n")
    (tmp_path / "tests" / "test_name.py").write_text("from torch import no_such_name\n")
    first = plugged(tmp_path, "tests", "--continue-on-collection-errors", "-n2")
    assert suite.failed(first.stdout) == ["tests/test_name.py", "tests/test_two.py::test_b"]
    (tmp_path / "tests.txt").write_text(first.stdout)
    done = plugged(tmp_path, "tests/test_two.py", IMM_SUITE_TESTS=str(tmp_path / "tests.txt"))
    assert "1 failed, 1 deselected" in done.stdout, done.stdout + done.stderr


def plugged(folder: Path, *tests: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """pytest with the suite's plugin, in a folder."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    options = ["-c", os.devnull, "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "suite_plugin", *tests]
    variables = {**own, "PYTHONPATH": str(SUITE.parent), **environment}
    command = [sys.executable, "-m", "pytest", *options]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=folder)


DEAD = """import torch
def test_fine():
    assert not torch.cuda.is_initialized()
def test_illegal():
    def dead():
        raise RuntimeError("an illegal access\\nmore")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, dead
def test_after():
    assert False
"""
