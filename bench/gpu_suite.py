"""Everything to find out on a machine with a GPU, in one command under 9 minutes; installs and downloads nothing.

    python bench/gpu_suite.py --out DIR [--fresh] [--commit REVISION]
    python bench/gpu_suite.py --out DIR --dry-run        the plan, and what a CPU can do of it without a build

The stages run most valuable first, each with its own time limit; one that fails or runs over is recorded and the next begins.
What is timed was tested first: an op whose tests failed is left out of the calibrations, and its benchmarks are recorded as
refused. Run again with the same DIR and commit, it goes on with the stages that are not done; another commit begins anew.
DIR gets at most 8 files of under 16 MB together: summary.json, environment.json, build.txt, tests.txt, sanitizer.txt,
calibration.json, bench.txt, rows.csv.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 525.0  # seconds; under 9 minutes with the starts of the processes
LEAST = 10.0  # seconds in which a stage can do something
TEXT_BYTES = 1_000_000  # of each text file
WORKERS = 8  # processes that share the GPU in tests
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "click",
    "tqdm",
    "PIL",
    "pytest",
    "xdist",
    "hypothesis",
    "setuptools",
    "matplotlib",
)
TOOLS = ("nvcc", "cmake", "ninja", "c++", "compute-sanitizer", "nvidia-smi")
#: Where kernels are; the rest of the suite says nothing new on a GPU.
TRITON_TESTS = ("test_triton_flow_step", "test_triton_mmd", "test_triton_adaln", "test_triton_attention")
OP_TESTS = (
    "test_flow_step",
    "test_noise",
    "test_mmd",
    "test_sampling",
    "test_objective",
    "test_adaln",
    "test_attention",
    "test_dit",
    "test_sampler",
    "test_bench_graphs",
    "test_ops",
)
DRY_TESTS = ("test_noise",)
#: Seconds at most, most valuable first. Together they may take longer than there is: a second run goes on.
GPU_BENCHES = {"mmd": 100, "attention": 60, "dit": 100, "sampler": 120, "objective": 300, "adaln": 40}
GPU_BENCHES |= {"flow_map_mmd": 30, "flow_step": 20, "noise": 30}
DRY_BENCHES = {name: GPU_BENCHES[name] for name in ("mmd", "flow_map_mmd", "flow_step", "noise")}
#: What a benchmark rests on: words in the names of tests, checks, kernels and files. One that failed with such a word stops it.
ABOUT = {
    "mmd": ("mmd",),
    "attention": ("attention",),
    "dit": ("test_dit", "adaln", "attention", "timestep"),
    "sampler": ("test_sampl", "sampling_step", "test_dit", "adaln", "attention", "timestep", "flow_step", "noise"),
    "adaln": ("adaln",),
    "flow_map_mmd": ("mmd", "flow_step"),
    "flow_step": ("flow_step",),
    "noise": ("noise",),
    "objective": ("test_objective", "test_training", "mmd", "flow_step", "test_dit", "adaln", "attention", "timestep"),
}
CALIBRATED = ("mmd", "attention")  # of our ops
REFUSED = "refused: tests failed"
#: A test's verdict in pytest's output, before or after its name, or what comes in its place; a check's of check_kernels.py;
#: what the sanitizer says it has found.
_TEST = re.compile(r"\b(?:FAILED|ERROR)\b.*?(tests/test_\w+\.py\S*)|(tests/test_\w+\.py\S*).* (?:FAILED|ERROR)\b")
_CRASH = re.compile(r"(tests/test_\w+\.py::\S+)\s+Fatal Python error")
_CHECK = re.compile(r"^(.+?): (?:FAILED|WRONG)\b", re.MULTILINE)
_FOUND = re.compile(r"=========\s+(?:Invalid|Misaligned|Error: (?:Race|Potential))")
#: Runs benchmarks without the command line, which needs click.
BENCH = "import sys, torch; from pathlib import Path; from imm.benchmark import run; "
BENCH += (
    "run(sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3]), quick=sys.argv[4] == 'quick', resume=True, tests=False)"
)


@dataclass(frozen=True)
class Stage:
    """command: what runs, or the reason why nothing does. file: where its output goes."""

    name: str
    limit: float
    file: str
    command: list[str] | str


def revision() -> str:
    """The checkout's commit, or "unknown"."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def probe() -> dict[str, Any]:
    """Packages, tools and the GPU of this machine."""
    found: dict[str, Any] = {"python": platform.python_version()}
    found["packages"] = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    found["tools"] = {name: shutil.which(name) is not None for name in TOOLS}
    code = "import torch; there = torch.cuda.is_available(); name = torch.cuda.get_device_name() if there else 'none'; "
    code += "print(torch.__version__, name, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found["torch"], _, found["gpu"] = done.stdout.strip().partition("|")
    return found


def needs(path: Path) -> list[str]:
    """The packages of PACKAGES that a test file imports at its top and that are not here."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return [name for name in PACKAGES if name in names and importlib.util.find_spec(name) is None]


def pytest_command(names: tuple[str, ...], marks: str = "not full") -> tuple[list[str] | str, list[str]]:
    """pytest over the files that can run here, or the reason why it cannot; and a line for each file left out.

    marks: an expression of pytest's -m.
    """
    if not importlib.util.find_spec("pytest"):
        return "pytest is not installed; bench/check_kernels.py and the benchmarks check results too", []
    paths = [ROOT / "tests" / f"{name}.py" for name in names]
    absent = {path: needs(path) for path in paths}
    notes = [f"{path.name} skipped: {', '.join(lacking)} not installed" for path, lacking in absent.items() if lacking]
    files = [str(path) for path, lacking in absent.items() if not lacking]
    # A test that starts a child for Triton's interpreter says nothing about a GPU, nor does one of the processor's time. Every
    # verdict is printed as it falls, for :func:`failed` to read where the time runs out. Most of the time goes to compiling
    # kernels, which takes processors.
    options = ["-p", "no:cacheprovider", "-p", "dead_device", "-k", "not interpreter and not costs"]
    options += ["-m", marks, "-vv", "-rs", "--durations=8"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", *files, *options] if files else "; ".join(notes), notes


def plan(options: argparse.Namespace, found: dict[str, Any]) -> tuple[list[Stage], list[str]]:
    """The stages in their order, and notes about tests left out."""
    python, gpu = sys.executable, found["gpu"] not in ("", "none") and not options.dry_run
    why_not = "dry run" if options.dry_run else "no GPU"
    script = [python, "bench/check_kernels.py"]
    build = [python, "bench/build_in_place.py", *(["--cuda"] if found["tools"]["nvcc"] else [])]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "40"]
    # What libraries try in vain is no error of ours.
    memcheck: list[str] | str = [*sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *script]
    # It follows every access to shared memory, and takes 10 to 100 times as long.
    racecheck: list[str] | str = [*sanitizer, "--tool", "racecheck", *script, "--small"]
    if not found["tools"]["compute-sanitizer"]:
        memcheck = racecheck = "compute-sanitizer not found"
    triton, notes = pytest_command(TRITON_TESTS)
    ops, more = pytest_command(OP_TESTS, "cuda and not full") if gpu else pytest_command(DRY_TESTS)
    stages = [
        Stage("build", 150, "build.txt", build if gpu else why_not),
        Stage("kernels", 60, "tests.txt", [*script, "--jobs", str(WORKERS)] if gpu else why_not),
        Stage("triton tests", 80, "tests.txt", triton if gpu else why_not),
        Stage("op tests", 120, "tests.txt", ops),
        Stage("memcheck", 60, "sanitizer.txt", memcheck if gpu else why_not),
        Stage("racecheck", 45, "sanitizer.txt", racecheck if gpu else why_not),
    ]
    where, effort = ("cuda", "full") if gpu else ("cpu", "quick")
    calibrate = [python, "bench/calibrate.py", "--out", str(options.out.resolve()), "--device", where]
    stages.append(Stage("calibrations", 65, "bench.txt", calibrate))
    slower = 1 if gpu else 3
    for op, limit in (GPU_BENCHES if gpu else DRY_BENCHES).items():
        command = [python, "-c", BENCH, op, where, str(options.out.resolve()), effort]
        stages.append(Stage(f"bench {op}", slower * limit, "bench.txt", command))
    return stages, notes + more


def execute(stage: Stage, limit: float, environment: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Run a stage; its outcome for the summary, and its output."""
    if isinstance(stage.command, str):
        return {"status": "skipped", "reason": stage.command}, f"skipped: {stage.command}\n"
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = {0: "ok"}.get(process.wait(timeout=max(limit, 0.1)), "failed")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the stage's own session: it and its children
            process.wait()
            status = "timed out"
        output.seek(0)
        text = output.read()
    seconds = round(time.monotonic() - start, 1)
    outcome = {"status": status, "seconds": seconds, "limit": round(limit, 1), "returncode": process.returncode}
    if status != "ok":
        outcome["reason"] = text.strip().splitlines()[-1][:200] if text.strip() else ""
    return outcome, text


def failed(text: str) -> list[str]:
    """The tests and checks that a stage's output says have failed; of the sanitizer's, during which it found something."""
    names: list[str] = []
    if text.startswith("========= COMPUTE-SANITIZER"):  # a check that it makes fail says nothing: it may not know the device
        found = False
        for line in text.splitlines():
            if line.startswith("="):
                found = found or bool(_FOUND.match(line))
            elif found:  # a check prints its line when its kernels have ended
                names.append(line.partition(": ")[0])
                found = False
    else:
        names = [one or other for one, other in _TEST.findall(text)] + _CRASH.findall(text) + _CHECK.findall(text)
    return sorted({name.strip(" :")[:160] for name in names})[:100]


def refusing(op: str, done: dict[str, Any]) -> list[str]:
    """What failed, in the stages that are done, that a benchmark rests on."""
    names = [name for outcome in done.values() for name in outcome.get("failed", ())]
    return [name for name in names if any(word in name for word in ABOUT.get(op, (op,)))]


def shorten(text: str) -> str:
    """At most half of TEXT_BYTES from either end."""
    half = TEXT_BYTES // 8  # a character is at most 4 bytes
    return text if len(text) <= 2 * half else f"{text[:half]}\n... shortened ...\n{text[-half:]}"


def main(say: Callable[..., None] = print) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--fresh", action="store_true", help="forget what DIR has")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; run what needs no GPU and no build")
    parser.add_argument("--limit", type=float, default=TOTAL, help="seconds at most for each stage, for tests of this file")
    parser.add_argument("--commit", help="where git cannot say it")
    options = parser.parse_args()
    began, out = time.monotonic(), options.out
    path, commit = out / "summary.json", options.commit or revision()
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept and (options.fresh or kept.get("commit") != commit):  # tests of one commit say nothing about another's figures
        shutil.rmtree(out)
        kept = {}
    out.mkdir(parents=True, exist_ok=True)
    done = kept.get("stages", {})
    found = probe()
    stages, notes = plan(options, found)
    say(json.dumps(found, indent=2), *notes, sep="\n")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    folders = (ROOT / "python", ROOT, ROOT / "bench", os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    # The caching allocator hides accesses beyond a tensor from the sanitizer.
    strict = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    shared = {**environment, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // WORKERS))}
    environments = {"memcheck": strict, "kernels": shared, "triton tests": shared, "op tests": shared}
    environment["IMM_COMMIT"] = commit

    def keep() -> None:
        total = round(time.monotonic() - began, 1)
        path.write_text(
            json.dumps({"commit": commit, "machine": found, "notes": notes, "seconds": total, "stages": done}, indent=2) + "\n"
        )

    for stage in stages:
        what = stage.command if isinstance(stage.command, str) else " ".join(stage.command)
        say(f"plan: {stage.name}, {stage.limit:.0f} s: {what}")
    for stage in stages:
        op = stage.name.removeprefix("bench ") if stage.name.startswith("bench ") else ""
        if op and (reasons := refusing(op, done)):
            done[stage.name] = {"status": REFUSED, "reason": ", ".join(reasons[:3])}
            keep()
            say(f"{stage.name}: {REFUSED}: {done[stage.name]['reason']}", flush=True)
            continue
        if done.get(stage.name, {}).get("status") == "ok":
            say(f"{stage.name}: done before")
            continue
        if stage.name == "calibrations" and not isinstance(stage.command, str):
            untimed = ",".join(name for name in CALIBRATED if refusing(name, done))
            stage = replace(stage, command=[*stage.command, "--refused", untimed])
        left = TOTAL - (time.monotonic() - began)
        if left < LEAST and not isinstance(stage.command, str):
            stage = replace(stage, command="no time left; run again with the same folder")
        limit = min(stage.limit, options.limit, left)
        outcome, text = execute(stage, limit, environments.get(stage.name, environment))
        if stage.file in ("tests.txt", "sanitizer.txt") and (names := failed(text)):
            outcome["failed"] = names
        done[stage.name] = outcome
        with (out / stage.file).open("a") as file:
            file.write(shorten(f"== {stage.name}: {outcome['status']}\n{text}"))
        keep()
        say(f"{stage.name}: {outcome['status']} {outcome.get('seconds', '')} {outcome.get('reason', '')}", flush=True)
    return 1 if any(outcome["status"] in ("failed", "timed out") for outcome in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
