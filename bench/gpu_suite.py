"""Everything to find out on a machine with a GPU, in short commands; installs and downloads nothing.

    python bench/gpu_suite.py [--out DIR] [--budget SECONDS] [--commit REVISION] [--bundle DIR] [--fresh]
    python bench/gpu_suite.py --dry-run [--budget SECONDS]      print the order and the expected seconds, run nothing
    python bench/gpu_suite.py --cpu                             rehearse every stage's command in small, without a GPU

What gives figures runs first, what tests them after that, and baselines that compile for minutes last. A stage that fails or
runs over its limit is recorded, and the next begins. Run again with the same DIR and commit, the suite takes the stages that
were not tried before those to be repeated; a test that has passed is not run again. Another commit begins anew.

A copy of the tree may come without .git: then pass --commit, and keep DIR inside the tree, where a second command finds it. DIR
(build/gpu-suite unless given) gets at most 8 files of under 16 MB together: summary.json, environment.json, build.txt,
tests.txt, sanitizer.txt, calibration.json, bench.txt, rows.csv. Copy them to bench/results/ to publish them.

Only a wrong result of check_kernels.py stops the figures of an op. A failed test or a finding of the sanitizer marks its rows
``unverified: why``. The native library is that of the bundle (`make gpu-bundle`) where it fits, the tree's where it loads, or
is built; without one that has CUDA kernels the suite stops.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 540.0  # seconds
LEAST = 8.0  # seconds in which a stage can do something
TEXT_BYTES = 1_000_000  # of each text file
WORKERS = max(1, (os.cpu_count() or 1) - 1)  # processes that share the GPU; one core is for the suite itself
PACKAGES = ("torch", "triton", "numpy", "safetensors", "click", "tqdm", "PIL", "pytest", "xdist", "hypothesis", "setuptools")
PACKAGES += ("matplotlib",)
TOOLS = ("nvcc", "cmake", "ninja", "c++", "compute-sanitizer", "nvidia-smi")
#: Where kernels are; the rest of the tests says nothing new on a GPU.
TRITON_TESTS = ("test_triton_flow_step", "test_triton_mmd", "test_triton_adaln", "test_triton_attention")
OP_TESTS = ("test_sampler", "test_package", "test_bench_graphs", "test_dit", "test_adaln", "test_attention", "test_mmd")
OP_TESTS += ("test_flow_step", "test_noise", "test_ops", "test_objective", "test_sampling")
#: Expected seconds of a benchmark's cases without the baselines that compile, and with them; the first run replaces them. The
#: order is that of the questions in PENDING.md.
BENCHES = {"attention": (25, 40), "dit": (45, 100), "sampler": (60, 120), "mmd": (45, 60), "adaln": (20, 30)}
BENCHES |= {"flow_map_mmd": (10, 10), "flow_step": (6, 8), "noise": (6, 8), "objective": (150, 150)}
LATER = ("objective",)  # benchmarks that begin after the tests: they take as long as all others
#: What a benchmark rests on: words in the names of tests, checks, kernels and files.
ABOUT = {
    "mmd": ("mmd",),
    "attention": ("attention",),
    "dit": ("test_dit", "adaln", "attention", "timestep"),
    "sampler": (
        "test_sampl",
        "test_package",
        "sampling_step",
        "test_dit",
        "adaln",
        "attention",
        "timestep",
        "flow_step",
        "noise",
    ),
    "adaln": ("adaln",),
    "flow_map_mmd": ("mmd", "flow_step"),
    "flow_step": ("flow_step",),
    "noise": ("noise",),
    "objective": ("test_objective", "mmd", "flow_step", "test_dit", "adaln", "attention", "timestep"),
}
CALIBRATED = ("mmd", "attention")  # of our ops
REFUSED = "refused: wrong results"
CUT_SHORT = "cut short"
#: A test's verdict in pytest's output, before or after its name, or what comes in its place; a check's of check_kernels.py;
#: what the sanitizer says it has found.
_TEST = re.compile(r"\b(?:FAILED|ERROR)\b.*?(tests/test_\w+\.py\S*)|(tests/test_\w+\.py\S*).* (?:FAILED|ERROR)\b")
_CRASH = re.compile(r"(tests/test_\w+\.py::\S+)\s+Fatal Python error")
_CHECK = re.compile(r"^(.+?): (?:FAILED|WRONG)\b", re.MULTILINE)
_WRONG = re.compile(r"^(.+?): WRONG\b", re.MULTILINE)
_FOUND = re.compile(r"=========\s+(?:Invalid|Misaligned|Error: (?:Race|Potential))")
#: Runs benchmarks without the command line, which needs click.
BENCH = (
    "import sys, torch; from pathlib import Path; from imm.benchmark import run; "
    "run(sys.argv[1], torch.device(sys.argv[2]), Path(sys.argv[3]), quick=sys.argv[4] == 'quick', resume=True, tests=False,"
    " late=sys.argv[5] == 'late')"
)
#: Whether a library is loaded, with kernels for the device: its folder and status are asked, never remembered.
LIBRARY = (
    "import sys, torch; from imm.ops import native; "
    "there = torch._C._dispatch_has_kernel_for_dispatch_key('imm::flow_step', sys.argv[1]); "
    "print(native.status() or (f'loaded, with {sys.argv[1]} kernels' if there else f'loaded, without {sys.argv[1]} kernels')); "
    "sys.exit(native.status() is not None or not there)"
)


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
    code += "print(torch.__version__, torch.__path__[0], name, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    found["torch"], found["torch_folder"], found["gpu"] = (*done.stdout.strip().split("|"), "", "", "")[:3]
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


def pytest_command(names: Sequence[str], marks: str, *more: str) -> tuple[list[str] | str, list[str]]:
    """pytest over the files that can run here, or the reason why it cannot; and a line for each file left out.

    marks: an expression of pytest's -m.
    """
    if not importlib.util.find_spec("pytest"):
        return "pytest is not installed; bench/check_kernels.py and the benchmarks check results too", []
    paths = [ROOT / "tests" / f"{name}.py" for name in names]
    absent = {path: needs(path) for path in paths}
    notes = [f"{path.name} skipped: {', '.join(lacking)} not installed" for path, lacking in absent.items() if lacking]
    files = [str(path.relative_to(ROOT)) for path, lacking in absent.items() if not lacking]
    # A test that starts a child for Triton's interpreter says nothing about a GPU, nor does one of the processor's time. Every
    # verdict is printed as it falls, for :func:`failed` to read where the time runs out.
    options = ["-p", "no:cacheprovider", "-p", "suite_plugin", "-k", "not interpreter and not costs"]
    options += ["-m", marks, "-vv", "-rs", "--durations=8", *more]
    if importlib.util.find_spec("xdist") and "--collect-only" not in more:
        options += ["-n", str(WORKERS), "--dist", "worksteal"]
    return [sys.executable, "-m", "pytest", *files, *options] if files else "; ".join(notes), notes


def plan(out: Path, found: Mapping[str, Any], cpu: bool) -> tuple[list[Stage], list[str]]:
    """The stages in their order, and notes about tests left out. cpu: each in its smallest form, on the CPU."""
    python, where = sys.executable, "cpu" if cpu else "cuda"
    check = [python, "bench/check_kernels.py"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "40"]
    # What libraries try in vain is no error of ours.
    memcheck: list[str] | str = [*sanitizer, "--tool", "memcheck", "--report-api-errors", "no", *check]
    # It follows every access to shared memory, and takes 10 to 100 times as long.
    racecheck: list[str] | str = [*sanitizer, "--tool", "racecheck", *check, "--small"]
    if not found["tools"]["compute-sanitizer"]:
        memcheck = racecheck = "compute-sanitizer not found"
    toolkit: list[str] | str = [*check, "--ptxas", "toolkit", "--jobs", str(WORKERS)]
    if not found["tools"]["nvcc"]:
        toolkit = "nvcc not found"
    small = ("--collect-only",) if cpu else ()
    triton, notes = pytest_command(TRITON_TESTS, "not full", *small)
    ops, more = pytest_command(("test_noise",) if cpu else OP_TESTS, "not full" if cpu else "cuda and not full")
    small_ops = ("mmd", "flow_map_mmd", "flow_step", "noise")  # of those that a CPU measures in seconds

    def bench(op: str, late: bool) -> Stage:
        words = [op, where, str(out.resolve()), "quick" if cpu else "full", "late" if late else "first"]
        command = "minutes on a CPU" if cpu and op not in small_ops else [python, "-c", BENCH, *words]
        seconds = 90.0 if cpu else BENCHES[op][late]  # a CPU visits its cases three times
        return Stage(f"{'baselines' if late else 'bench'} {op}", seconds, "bench.txt", command)

    calibrate = [python, "bench/calibrate.py", "--out", str(out.resolve()), "--device", where]
    first = [op for op in BENCHES if op not in LATER]
    stages = [
        Stage("kernels", 45, "tests.txt", [*check, "--jobs", str(WORKERS)]),
        Stage("calibrations", 60, "bench.txt", calibrate),
        *(bench(op, late=False) for op in first),
        Stage("triton tests", 100, "tests.txt", triton),
        Stage("op tests", 120, "tests.txt", ops),
        Stage("equal bits", 30, "tests.txt", [*check, "--repeat", "100", "--jobs", str(WORKERS)]),
        Stage("toolkit's ptxas", 45, "tests.txt", toolkit),
        Stage("memcheck", 60, "sanitizer.txt", memcheck),
        *(bench(op, late=True) for op in first),
        *(bench(op, late) for op in LATER for late in (False, True)),
        Stage("racecheck", 60, "sanitizer.txt", racecheck),
    ]
    return stages, notes + more


def with_measured(stages: Sequence[Stage], done: Mapping[str, Any]) -> list[Stage]:
    """The stages, with the seconds that those took that have ended in an earlier run in the place of what was expected: in DIR,
    or in published results."""
    runs = [json.loads(path.read_text())["stages"] for path in sorted(ROOT.glob("bench/results/*/summary.json"))]
    ended = {name: outcome for run in [*runs, done] for name, outcome in run.items() if outcome["status"] == "ok"}
    took = {name: outcome["seconds"] for name, outcome in ended.items() if "seconds" in outcome}
    return [replace(stage, expected=took.get(stage.name, stage.expected)) for stage in stages]


def ordered(stages: Sequence[Stage], done: Mapping[str, Any]) -> list[Stage]:
    """What is left to do: stages that were never tried, then those that were cut short, then those that failed."""

    def tries(stage: Stage) -> int:
        status = done.get(stage.name, {}).get("status", "")
        return 0 if status in ("", "skipped") or status == REFUSED else 1 if status == CUT_SHORT else 2

    return sorted((stage for stage in stages if done.get(stage.name, {}).get("status") != "ok"), key=tries)


def described(stages: Sequence[Stage], budget: float, before: float) -> list[str]:
    """A line a stage: its expected seconds, when it begins, and whether that is within the budget."""
    lines, at = [f"budget {budget:.0f} s; the library takes {before:.0f} s of it"], before
    for stage in stages:
        if isinstance(stage.command, str):
            lines.append(f"  {stage.name:22s}     -  skipped: {stage.command}")
            continue
        fits = "" if at + stage.expected <= budget else "  cut short" if at + LEAST <= budget else "  next command"
        lines.append(f"  {stage.name:22s} {stage.expected:5.0f} s, from {at:5.0f}{fits}")
        at += stage.expected
    return lines


def execute(command: list[str], limit: float, environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """Run a command; its outcome for the summary, and its output."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if process.wait(timeout=max(limit, 0.1)) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the command's own session: it and its children
            process.wait()
            status = CUT_SHORT
        output.seek(0)
        text = output.read()
    outcome = {"status": status, "seconds": round(time.monotonic() - start, 1), "returncode": process.returncode}
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


def concerning(op: str, names: Sequence[str]) -> list[str]:
    """Those of the names that a benchmark rests on."""
    return [name for name in names if any(word in name for word in ABOUT.get(op, (op,)))]


def wrong(done: Mapping[str, Any]) -> list[str]:
    """The kernels whose results are wrong."""
    return [name for outcome in done.values() for name in outcome.get("wrong", ())]


def unverified(done: Mapping[str, Any]) -> dict[str, str]:
    """By op the first test or check that failed of those it rests on, and the stage."""
    names = {name: stage for stage, outcome in done.items() for name in outcome.get("failed", ())}
    found = {op: concerning(op, list(names)) for op in BENCHES}
    return {op: f"{of_op[0]} ({names[of_op[0]]})" for op, of_op in found.items() if of_op}


def shorten(text: str) -> str:
    """At most half of TEXT_BYTES from either end."""
    half = TEXT_BYTES // 8  # a character is at most 4 bytes
    return text if len(text) <= 2 * half else f"{text[:half]}\n... shortened ...\n{text[-half:]}"


class Suite:
    """One command: what is known of DIR, the environment of the stages, and the time that is left."""

    def __init__(self, options: argparse.Namespace, commit: str) -> None:
        self.began, self.options, self.out = time.monotonic(), options, options.out
        self.found = probe()
        self.path = self.out / "summary.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.anew = bool(kept) and (options.fresh or kept.get("commit") != commit)  # figures of one commit are not another's
        self.done: dict[str, Any] = {} if self.anew else kept.get("stages", {})
        self.commit = commit
        if options.dry_run:  # the plan is of a machine that has them
            self.found["tools"] = dict.fromkeys(TOOLS, True)
        stages, self.notes = plan(self.out, self.found, options.cpu)
        self.stages = ordered(with_measured(stages, self.done), self.done)
        folders = (ROOT / "python", ROOT, ROOT / "bench", os.environ.get("PYTHONPATH", ""))
        own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(map(str, folders)), "IMM_COMMIT": commit}
        own["IMM_SUITE_TESTS"] = str((self.out / "tests.txt").resolve())
        self.environment = {**os.environ, **own}

    @property
    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.began)

    def keep(self) -> None:
        total = round(time.monotonic() - self.began, 1)
        text = {"commit": self.commit, "machine": self.found, "notes": self.notes, "seconds": total, "stages": self.done}
        self.path.write_text(json.dumps(text, indent=2) + "\n")

    def record(self, name: str, file: str, outcome: dict[str, Any], text: str) -> None:
        self.done[name] = outcome
        with (self.out / file).open("a") as output:
            output.write(shorten(f"== {name}: {outcome['status']}\n{text}"))
        self.keep()

    def variables(self, stage: Stage) -> dict[str, str]:
        if stage.name == "memcheck":  # the caching allocator hides accesses beyond a tensor
            return {**self.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if stage.file == "tests.txt":  # several processes share the cores
            return {**self.environment, "OMP_NUM_THREADS": "1"}
        return self.environment

    def library(self) -> tuple[bool, str]:
        """Whether there is a native library with kernels for the device, and which: the bundle's, the tree's or one that was
        built now."""
        device = "CPU" if self.options.cpu else "CUDA"
        ask = [sys.executable, "-c", LIBRARY, device]
        bundle: dict[str, str] = {}
        if self.options.bundle.is_dir():
            # Its program was linked where torch was elsewhere.
            torch_folder = Path(self.found.get("torch_folder", ""))
            libraries = [torch_folder / "lib", *torch_folder.parent.glob("nvidia/*/lib")]
            bundle["IMM_NATIVE_DIR"] = str(self.options.bundle.resolve())
            bundle["LD_LIBRARY_PATH"] = os.pathsep.join([*map(str, libraries), os.environ.get("LD_LIBRARY_PATH", "")])
        said = []
        for name, more in {"the bundle's": bundle, "the tree's": {}}.items():
            if name == "the bundle's" and not more:
                continue
            outcome, text = execute(ask, 60, {**self.environment, **more})
            said.append(f"{name}: {text.strip().splitlines()[-1] if text.strip() else 'no answer'}")
            if outcome["status"] == "ok":
                self.environment.update(more)
                return True, "; ".join(said)
        build = [sys.executable, "bench/build_in_place.py", *(["--cuda"] if not self.options.cpu else [])]
        outcome, text = execute(build, min(200.0, self.left - LEAST), self.environment)
        self.record("build", "build.txt", outcome, text)
        asked, text = execute(ask, 60, self.environment)
        said.append(f"built in {outcome['seconds']} s: {text.strip().splitlines()[-1] if text.strip() else 'no answer'}")
        return asked["status"] == "ok", "; ".join(said)

    def run(self, stage: Stage) -> None:
        op = stage.name.partition(" ")[2] if stage.name.startswith(("bench ", "baselines ")) else ""
        if isinstance(stage.command, str):
            outcome, text = {"status": "skipped", "reason": stage.command}, ""
        elif op and (reasons := concerning(op, wrong(self.done))):
            outcome, text = {"status": REFUSED, "reason": ", ".join(reasons[:3])}, ""
        elif self.left < LEAST:
            outcome, text = {"status": "skipped", "reason": "no time left; run again with the same folder"}, ""
            if stage.name in self.done:  # what an earlier command found out about it stands
                return
        else:
            command = stage.command
            if stage.name == "calibrations":
                command = [*command, "--refused", ",".join(name for name in CALIBRATED if concerning(name, wrong(self.done)))]
            outcome, text = execute(command, min(stage.limit, self.left - 2), self.variables(stage))
        if stage.file in ("tests.txt", "sanitizer.txt"):
            outcome |= {"failed": names} if (names := failed(text)) else {}
            outcome |= {"wrong": names} if stage.name == "kernels" and (names := _WRONG.findall(text)) else {}
        self.record(stage.name, stage.file, outcome, text)

    def mark(self) -> None:
        """Mark the rows whose tests fail, or unmark them."""
        if (self.out / "rows.csv").exists():
            sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
            from imm.benchmark.rows import mark

            mark(self.out, unverified(self.done))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-suite", help="results folder")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for the whole command; default {BUDGET:.0f}")
    parser.add_argument("--commit", help="where git cannot say it")
    parser.add_argument("--bundle", type=Path, default=ROOT / "build" / "gpu-bundle", help="what make gpu-bundle made")
    parser.add_argument("--fresh", action="store_true", help="forget what DIR has")
    parser.add_argument("--dry-run", action="store_true", help="print the order and the expected seconds")
    parser.add_argument("--cpu", action="store_true", help="rehearse the commands in small, without a GPU")
    options = parser.parse_args()
    suite = Suite(options, options.commit or revision())
    print(
        *described(suite.stages, options.budget, 10.0 if options.bundle.is_dir() else 75.0), *suite.notes, sep="\n", flush=True
    )
    if options.dry_run:
        return 0
    if suite.found["gpu"] in ("", "none") and not options.cpu:
        print("stopped: no GPU; --cpu rehearses")
        return 1
    if suite.anew:
        shutil.rmtree(suite.out)
    suite.out.mkdir(parents=True, exist_ok=True)
    there, said = suite.library()
    print(json.dumps(suite.found), f"library: {said}", sep="\n", flush=True)
    suite.found["library"] = said
    suite.keep()
    if not there:
        print("stopped: without the native library every figure would be of another program")
        return 1
    for stage in suite.stages:
        suite.run(stage)
        outcome = suite.done[stage.name]
        print(f"{stage.name}: {outcome['status']} {outcome.get('seconds', '')} {outcome.get('reason', '')}", flush=True)
    suite.mark()
    return 1 if any(outcome["status"] in ("failed", REFUSED) or "failed" in outcome for outcome in suite.done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
