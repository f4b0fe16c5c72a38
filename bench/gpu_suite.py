"""Everything to find out on a machine with a GPU, in short commands; installs and downloads nothing.

    python bench/gpu_suite.py [--out DIR] [--budget SECONDS] [--commit REVISION] [--bundle DIR]
    python bench/gpu_suite.py --dry-run [--budget SECONDS]      print the order and the expected seconds, run nothing
    python bench/gpu_suite.py --cpu                             rehearse every stage's command in small, without a GPU

What gives figures runs first, what tests them after that, and baselines that compile for minutes last. A stage that fails or
runs over its limit is recorded, and the next begins. Run again with the same DIR and commit, the suite takes the stages that
were not tried before those to be repeated; a test that has passed is not run again. Another commit begins anew.

A copy of the tree may come without .git: then pass --commit, and keep DIR inside the tree. DIR (build/gpu-suite unless given)
gets at most 8 files of under 16 MB together; copy them to bench/results/ to publish them. Only a wrong result of
check_kernels.py stops the figures of an op; a failed test or a finding of the sanitizer marks its rows ``unverified: why``. The
native library is that of the bundle (`make gpu-bundle`), the tree's, or is built; without CUDA kernels the suite stops.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0  # seconds
LEAST = 8.0  # seconds in which a stage can do something
TEXT_BYTES = 1_000_000  # of each text file
WORKERS = max(1, (os.cpu_count() or 1) - 1)  # processes that share the GPU; one core is for the suite itself
TOOLS = ("nvcc", "cmake", "ninja", "c++", "compute-sanitizer", "nvidia-smi")
#: Where kernels are; the rest of the tests says nothing new on a GPU.
TRITON_TESTS = (
    "test_triton_noise",
    "test_triton_mmd",
    "test_triton_energy_score",
    "test_triton_adaln",
    "test_triton_attention",
)
OP_TESTS = ("test_sampler_graphs", "test_tokens_graphs", "test_sampler", "test_package", "test_bench_graphs", "test_dit")
OP_TESTS += ("test_adaln", "test_attention", "test_mmd", "test_energy_score", "test_flow_step", "test_noise", "test_ops")
OP_TESTS += ("test_objective", "test_sampling", "test_tangents")
_DIT = ("test_dit", "adaln", "attention", "timestep")
#: Expected seconds of a benchmark's cases without the baselines that compile, and with them; the first run replaces them. Then
#: what it rests on: words in the names of tests, checks, kernels and files. The order is that of the questions in PENDING.md.
BENCHES: dict[str, tuple[float, float, tuple[str, ...]]] = {
    "attention": (30, 60, ("attention",)),
    "dit": (55, 220, _DIT),
    "sampler": (60, 120, ("test_sampl", "test_package", "sampling_step", "flow_step", "noise", *_DIT)),
    "mmd": (45, 60, ("mmd",)),
    "energy_score": (15, 30, ("energy_score",)),
    "adaln": (20, 30, ("adaln",)),
    "flow_map_mmd": (10, 10, ("mmd", "flow_step")),
    "flow_step": (6, 8, ("flow_step",)),
    "noise": (6, 8, ("noise",)),
    "tokens": (230, 300, ("test_tokens", "noise")),
    "objective": (150, 150, ("test_objective", "mmd", "flow_step", *_DIT)),
}
LATER = ("tokens", "objective")  # benchmarks that begin after the tests: each takes as long as all others
ON_CPU = ("mmd", "flow_map_mmd", "flow_step", "noise")  # of those that a CPU measures in seconds
REFUSED = "refused: wrong results"
CUT_SHORT = "cut short"
#: What the sanitizer says it has found.
_FOUND = re.compile(r"=========\s+(?:Invalid|Misaligned|Error: (?:Race|Potential))")
#: Runs benchmarks without the command line, which needs click.
BENCH = """import sys, torch; from pathlib import Path; from harness.measure import run
_, op, device, out, form, peers = sys.argv
run(op, torch.device(device), Path(out), quick=form == "quick", resume=True, tests=False, late=peers == "late")"""
#: Whether a library is loaded, with kernels for the device: its folder and status are asked, never remembered.
LIBRARY = """import sys, torch; from imm.ops import native
there = torch._C._dispatch_has_kernel_for_dispatch_key("imm::flow_step", sys.argv[1])
print(native.status() or f"loaded, {'with' if there else 'without'} {sys.argv[1]} kernels")
sys.exit(native.status() is not None or not there)"""


@dataclass(frozen=True)
class Stage:
    """command: what runs, or the reason why nothing does. expected: seconds. file: where its output goes."""

    name: str
    expected: float
    file: str
    command: list[str] | str

    @property
    def limit(self) -> float:
        return max(20.0, 1.6 * self.expected)


def probe() -> dict[str, Any]:
    """Tools, torch and the GPU of this machine."""
    code = "import torch as t; name = t.cuda.get_device_name() if t.cuda.is_available() else 'none'; "
    code += "print(t.__version__, t.__path__[0], name, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found = dict(zip(("torch", "torch_folder", "gpu"), (*done.stdout.strip().split("|"), "", "", ""), strict=False))
    return {**found, "tools": {name: shutil.which(name) is not None for name in TOOLS}}


def pytest_command(names: Sequence[str], marks: str, *more: str) -> list[str] | str:
    """pytest over these files and the tests with these marks, or the reason why it cannot run."""
    if not importlib.util.find_spec("pytest"):
        return "pytest is not installed; bench/check_kernels.py and the benchmarks check results too"
    # A test that starts a child for Triton's interpreter says nothing about a GPU, nor does one of the processor's time.
    options = ["-p", "no:cacheprovider", "-p", "suite_plugin", "-k", "not interpreter and not costs", "-m", marks, "-rs"]
    options += ["--durations=8", "--continue-on-collection-errors", *more]
    if importlib.util.find_spec("xdist") and "--collect-only" not in more:
        options += ["-n", str(WORKERS), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", *(f"tests/{name}.py" for name in names), *options]


def plan(out: Path, found: Mapping[str, Any], cpu: bool) -> list[Stage]:
    """The stages in their order. cpu: each in its smallest form, on the CPU."""
    python, where = sys.executable, "cpu" if cpu else "cuda"
    check, jobs = [python, "bench/check_kernels.py"], ["--jobs", str(WORKERS)]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "40", "--tool"]

    def needing(tool: str, command: list[str]) -> list[str] | str:
        return command if found["tools"][tool] else f"{tool} not found"

    def bench(op: str, late: bool) -> Stage:
        words = [op, where, str(out.resolve()), "quick" if cpu else "full", "late" if late else "first"]
        command = "minutes on a CPU" if cpu and op not in ON_CPU else [python, "-c", BENCH, *words]
        seconds = 90.0 if cpu else BENCHES[op][late]  # a CPU visits its cases three times
        return Stage(f"{'baselines' if late else 'bench'} {op}", seconds, "bench.txt", command)

    triton = pytest_command(TRITON_TESTS, "not full", *["--collect-only"] * cpu)
    ops = pytest_command(("test_noise",) if cpu else OP_TESTS, "not full" if cpu else "cuda and not full")
    # What libraries try in vain is no error of ours. Racecheck follows every access to shared memory, 10 to 100 times as slow.
    memcheck = needing("compute-sanitizer", [*sanitizer, "memcheck", "--report-api-errors", "no", *check])
    racecheck = needing("compute-sanitizer", [*sanitizer, "racecheck", *check, "--small"])
    calibrate = [python, "bench/calibrate.py", "--out", str(out.resolve()), "--device", where]
    first = [op for op in BENCHES if op not in LATER]
    return [
        Stage("kernels", 45, "tests.txt", [*check, *jobs]),
        Stage("calibrations", 60, "bench.txt", calibrate),
        *(bench(op, late=False) for op in first),
        Stage("triton tests", 100, "tests.txt", triton),
        Stage("op tests", 120, "tests.txt", ops),
        Stage("equal bits", 30, "tests.txt", [*check, "--repeat", "100", *jobs]),
        Stage("toolkit's ptxas", 45, "tests.txt", needing("nvcc", [*check, "--ptxas", "toolkit", *jobs])),
        Stage("memcheck", 60, "sanitizer.txt", memcheck),
        *(bench(op, late=True) for op in first),
        *(bench(op, late) for op in LATER for late in (False, True)),
        Stage("racecheck", 60, "sanitizer.txt", racecheck),
    ]


def ordered(stages: Sequence[Stage], done: Mapping[str, Any]) -> list[Stage]:
    """What is left to do: stages that were never tried, then those that were cut short, then those that failed. Those that
    have ended in published results have their seconds."""
    runs = [json.loads(path.read_text())["stages"] for path in sorted(ROOT.glob("bench/results/*/summary.json"))]
    took = {name: outcome["seconds"] for run in runs for name, outcome in run.items() if outcome["status"] == "ok"}
    status = lambda stage: done.get(stage.name, {}).get("status", "")
    tries = {"": 0, "skipped": 0, REFUSED: 0, CUT_SHORT: 1}
    left = [replace(stage, expected=took.get(stage.name, stage.expected)) for stage in stages if status(stage) != "ok"]
    return sorted(left, key=lambda stage: tries.get(status(stage), 2))


def described(stages: Sequence[Stage], budget: float, before: float) -> list[str]:
    """A line a stage: its expected seconds, when it begins, and whether that is within the budget."""
    lines, at = [f"budget {budget:.0f} s; the library takes {before:.0f} s of it"], before
    for stage in stages:
        fits = "" if at + stage.expected <= budget else "  cut short" if at + LEAST <= budget else "  next command"
        skipped = isinstance(stage.command, str)
        what = f"    -  skipped: {stage.command}" if skipped else f"{stage.expected:5.0f} s, from {at:5.0f}{fits}"
        lines.append(f"  {stage.name:22s} {what}")
        at += 0.0 if skipped else stage.expected
    return lines


def execute(command: list[str], limit: float, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Run a command; its outcome for the summary, and its output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        to = {"stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **to)
        try:
            status = "ok" if process.wait(timeout=max(limit, 0.1)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the command's own session: it and its children
            process.wait()
            status = CUT_SHORT
        output.seek(0)
        text = output.read()
    outcome = {"status": status, "seconds": round(time.monotonic() - start, 1), "returncode": process.returncode}
    return outcome if status == "ok" else {**outcome, "reason": last_line(text)}, text


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no answer"])[-1][:200]


def failed(text: str, verdicts: str = "FAILED|WRONG") -> list[str]:
    """The tests and checks that a stage's output says have failed; of the sanitizer's, during which it found something."""
    if not text.startswith("========= COMPUTE-SANITIZER"):
        names = re.findall(rf"^(.+?): (?:{verdicts})\b", text, re.MULTILINE)
        return sorted({name[:160] for name in names})[:100]
    names, found = [], False  # a check that the sanitizer makes fail says nothing: it may not know the device
    for line in text.splitlines():
        if line.startswith("="):
            found = found or bool(_FOUND.match(line))
        elif found:  # a check prints its line when its kernels have ended
            names.append(line.partition(": ")[0])
            found = False
    return sorted(set(names))[:100]


def concerning(op: str, names: Sequence[str]) -> list[str]:
    """Those of the names that a benchmark rests on."""
    return [name for name in names if any(word in name for word in BENCHES[op][2])]


def unverified(done: Mapping[str, Any]) -> dict[str, str]:
    """By op the first test or check that failed of those it rests on, and the stage."""
    names = {name: stage for stage, outcome in done.items() for name in outcome.get("failed", ())}
    return {op: f"{of_op[0]} ({names[of_op[0]]})" for op in BENCHES if (of_op := concerning(op, list(names)))}


def shorten(text: str, most: int = TEXT_BYTES // 4) -> str:
    """Half of so many characters, of at most 4 bytes each, from either end."""
    return text if len(text) <= most else f"{text[: most // 2]}\n... shortened ...\n{text[-most // 2 :]}"


class Suite:
    """One command: what is known of DIR, the environment of the stages, and the time that is left."""

    def __init__(self, options: argparse.Namespace, commit: str) -> None:
        self.began, self.options, self.out, self.commit = time.monotonic(), options, options.out, commit
        self.found, self.path = probe(), options.out / "summary.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.anew = bool(kept) and kept.get("commit") != commit  # figures of one commit are not another's
        self.done: dict[str, Any] = {} if self.anew else kept.get("stages", {})
        if options.dry_run:  # the plan is of a machine that has them
            self.found["tools"] = dict.fromkeys(TOOLS, True)
        self.stages = ordered(plan(self.out, self.found, options.cpu), self.done)
        folders = (ROOT / "python", ROOT, ROOT / "bench", os.environ.get("PYTHONPATH", ""))
        own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(map(str, folders)), "IMM_COMMIT": commit}
        self.environment = {**os.environ, **own, "IMM_SUITE_TESTS": str((self.out / "tests.txt").resolve())}

    @property
    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.began)

    def record(self, name: str, file: str, outcome: dict[str, Any], text: str) -> None:
        self.done[name] = outcome
        with (self.out / file).open("a") as output:
            output.write(shorten(f"== {name}: {outcome['status']}\n{text}"))
        kept = {"commit": self.commit, "machine": self.found, "stages": self.done}
        self.path.write_text(json.dumps(kept, indent=2) + "\n")

    def library(self) -> tuple[bool, str]:
        """Whether there is a native library with kernels for the device, and which: the bundle's, the tree's or one that was
        built now."""
        ask = [sys.executable, "-c", LIBRARY, "CPU" if self.options.cpu else "CUDA"]
        ways: dict[str, dict[str, str]] = {"the tree's": {}}
        if self.options.bundle.is_dir():
            # Its program was linked where torch was elsewhere.
            torch_folder = Path(self.found.get("torch_folder", ""))
            libraries = [torch_folder / "lib", *torch_folder.parent.glob("nvidia/*/lib")]
            path = os.pathsep.join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")])
            ways = {"the bundle's": {"IMM_NATIVE_DIR": str(self.options.bundle.resolve()), "LD_LIBRARY_PATH": path}, **ways}
        said = []
        for name, more in ways.items():
            outcome, text = execute(ask, 60, {**self.environment, **more})
            said.append(f"{name}: {last_line(text)}")
            if outcome["status"] == "ok":
                self.environment.update(more)
                return True, "; ".join(said)
        settings = {"IMM_BUILD_NATIVE": "1", "IMM_BUILD_CUDA": "0" if self.options.cpu else "1"}
        build = [sys.executable, "setup.py", "build_ext", "--inplace"]
        outcome, text = execute(build, min(200.0, self.left - LEAST), {**self.environment, **settings})
        self.record("build", "build.txt", outcome, text)
        asked, text = execute(ask, 60, self.environment)
        return asked["status"] == "ok", "; ".join([*said, f"built in {outcome['seconds']} s: {last_line(text)}"])

    def run(self, stage: Stage) -> None:
        kind, _, op = stage.name.partition(" ")
        wrong = self.done.get("kernels", {}).get("wrong", [])
        reasons = concerning(op, wrong) if kind in ("bench", "baselines") else []
        text, command, environment = "", stage.command, dict(self.environment)
        if stage.name == "memcheck":  # the caching allocator hides accesses beyond a tensor
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        if stage.file == "tests.txt":  # several processes share the cores
            environment["OMP_NUM_THREADS"] = "1"
        if isinstance(command, str):
            outcome: dict[str, Any] = {"status": "skipped", "reason": command}
        elif reasons:
            outcome = {"status": REFUSED, "reason": ", ".join(reasons[:3])}
        elif self.left < LEAST:
            outcome = {"status": "skipped", "reason": "no time left; run again with the same folder"}
            if stage.name in self.done:  # what an earlier command found out about it stands
                return
        else:
            outcome, text = execute(command, min(stage.limit, self.left - 2), environment)
        if stage.file in ("tests.txt", "sanitizer.txt") and (names := failed(text)):
            outcome["failed"] = names
        if stage.name == "kernels" and (names := failed(text, "WRONG")):
            outcome["wrong"] = names
        self.record(stage.name, stage.file, outcome, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-suite", help="results folder")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for the whole command; default {BUDGET:.0f}")
    parser.add_argument("--commit", help="where git cannot say it")
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "gpu-bundle", help="what make gpu-bundle made")
    parser.add_argument("--dry-run", action="store_true", help="print the order and the expected seconds")
    parser.add_argument("--cpu", action="store_true", help="rehearse the commands in small, without a GPU")
    options = parser.parse_args()
    said = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout
    suite = Suite(options, options.commit or said.strip() or "unknown")
    print(*described(suite.stages, options.budget, 10.0 if options.bundle.is_dir() else 75.0), sep="\n", flush=True)
    if options.dry_run:
        return 0
    if suite.found["gpu"] in ("", "none") and not options.cpu:
        print("stopped: no GPU; --cpu rehearses")
        return 1
    if suite.anew:
        shutil.rmtree(suite.out)
    suite.out.mkdir(parents=True, exist_ok=True)
    there, suite.found["library"] = suite.library()
    print(json.dumps(suite.found), flush=True)
    if not there:
        print("stopped: without the native library every figure would be of another program")
        return 1
    for stage in suite.stages:
        suite.run(stage)
        outcome = suite.done[stage.name]
        print(f"{stage.name}: {outcome['status']} {outcome.get('seconds', '')} {outcome.get('reason', '')}", flush=True)
    if (suite.out / "rows.csv").exists():
        sys.path[:0] = [str(ROOT / "python"), str(ROOT), str(ROOT / "bench")]
        from harness.rows import mark

        mark(suite.out, unverified(suite.done))
    return 1 if any(outcome["status"] in ("failed", REFUSED) or "failed" in outcome for outcome in suite.done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
