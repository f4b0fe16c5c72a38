"""Everything to find out on a machine with a GPU, in one command under 9 minutes; installs and downloads nothing.

    python bench/gpu_suite.py --out DIR [--fresh] [--commit REVISION]
    python bench/gpu_suite.py --out DIR --dry-run        the plan, and what a CPU can do of it without a build

The stages run most valuable first, each with its own time limit; one that fails or runs over is recorded and the next begins.
Run again with the same DIR, it goes on with the stages that are not done. DIR gets at most 8 files of under 16 MB together:
summary.json, environment.json, build.txt, tests.txt, sanitizer.txt, bench.txt, rows.csv, rows.jsonl.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import platform
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
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "click",
    "tqdm",
    "PIL",
    "pytest",
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
    "test_ops",
    "test_mmd",
    "test_sampling",
    "test_objective",
    "test_adaln",
    "test_attention",
    "test_dit",
    "test_sampler",
)
DRY_TESTS = ("test_noise",)
#: Seconds at most, most valuable first. Together they may take longer than there is: a second run goes on.
GPU_BENCHES = {"mmd": 100, "attention": 60, "dit": 100, "sampler": 120, "objective": 300, "adaln": 40}
GPU_BENCHES |= {"flow_map_mmd": 30, "flow_step": 20, "noise": 30}
DRY_BENCHES = {name: GPU_BENCHES[name] for name in ("mmd", "flow_map_mmd", "flow_step", "noise")}
#: Runs benchmarks without the command line, which needs click.
BENCH = "import sys, torch; from pathlib import Path; from imm.benchmark import run; "
BENCH += "run(sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3]), quick=sys.argv[4] == 'quick')"


@dataclass(frozen=True)
class Stage:
    """command: what runs, or the reason why nothing does. file: where its output goes."""

    name: str
    limit: float
    file: str
    command: list[str] | str


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


def pytest_command(names: tuple[str, ...]) -> tuple[list[str] | str, list[str]]:
    """pytest over the files that can run here, or the reason why it cannot; and a line for each file left out."""
    if not importlib.util.find_spec("pytest"):
        return "pytest is not installed; bench/check_kernels.py and the benchmarks check results too", []
    paths = [ROOT / "tests" / f"{name}.py" for name in names]
    absent = {path: needs(path) for path in paths}
    notes = [f"{path.name} skipped: {', '.join(lacking)} not installed" for path, lacking in absent.items() if lacking]
    files = [str(path) for path, lacking in absent.items() if not lacking]
    # A test that starts a child for Triton's interpreter says nothing about a GPU.
    options = ["-p", "no:cacheprovider", "-k", "not interpreter", "-rs", "--durations=8"]
    return [sys.executable, "-m", "pytest", *files, *options] if files else "; ".join(notes), notes


def plan(options: argparse.Namespace, found: dict[str, Any]) -> tuple[list[Stage], list[str]]:
    """The stages in their order, and notes about tests left out."""
    python, gpu = sys.executable, found["gpu"] not in ("", "none") and not options.dry_run
    why_not = "dry run" if options.dry_run else "no GPU"
    script = [python, "bench/check_kernels.py"]
    build = [python, "bench/build_in_place.py", *(["--cuda"] if found["tools"]["nvcc"] else [])]
    memcheck: list[str] | str = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *script]
    if not found["tools"]["compute-sanitizer"]:
        memcheck = "compute-sanitizer not found"
    triton, notes = pytest_command(TRITON_TESTS)
    ops, more = pytest_command(OP_TESTS if gpu else DRY_TESTS)
    stages = [
        Stage("build", 90, "build.txt", build if gpu else why_not),
        Stage("kernels", 60, "tests.txt", script if gpu else why_not),
        Stage("triton tests", 80, "tests.txt", triton if gpu else why_not),
        Stage("op tests", 55, "tests.txt", ops),
        Stage("memcheck", 60, "sanitizer.txt", memcheck if gpu else why_not),
    ]
    where, effort = ("cuda", "full") if gpu else ("cpu", "quick")
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
    if options.fresh and (out / "summary.json").exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    done = json.loads(path.read_text())["stages"] if path.exists() else {}
    found = probe()
    stages, notes = plan(options, found)
    say(json.dumps(found, indent=2), *notes, sep="\n")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # The caching allocator hides accesses beyond a tensor from the sanitizer.
    strict = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if options.commit:
        environment["IMM_COMMIT"] = options.commit
    for stage in stages:
        what = stage.command if isinstance(stage.command, str) else " ".join(stage.command)
        say(f"plan: {stage.name}, {stage.limit:.0f} s: {what}")
    for stage in stages:
        if done.get(stage.name, {}).get("status") == "ok":
            say(f"{stage.name}: done before")
            continue
        left = TOTAL - (time.monotonic() - began)
        if left < LEAST and not isinstance(stage.command, str):
            stage = replace(stage, command="no time left; run again with the same folder")
        limit = min(stage.limit, options.limit, left)
        outcome, text = execute(stage, limit, strict if stage.name == "memcheck" else environment)
        done[stage.name] = outcome
        with (out / stage.file).open("a") as file:
            file.write(shorten(f"== {stage.name}: {outcome['status']}\n{text}"))
        total = round(time.monotonic() - began, 1)
        path.write_text(json.dumps({"machine": found, "notes": notes, "seconds": total, "stages": done}, indent=2) + "\n")
        say(f"{stage.name}: {outcome['status']} {outcome.get('seconds', '')} {outcome.get('reason', '')}", flush=True)
    return 1 if any(outcome["status"] in ("failed", "timed out") for outcome in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
