"""``imm bench OP --base REV``: the working tree beside another commit, on one machine.

Each side is measured by its own benchmark in processes of its own, in the order base, tree, base, tree: what slows the machine
down for a while is seen on both sides, and the spread of a side includes what differs from one process to the next.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from imm.benchmark.case import folder as bench_folder
from imm.benchmark.compare import Comparison, Results, compare, merged
from imm.ops import native

_MEASURING = tuple(
    f"python/imm/benchmark/{name}.py" for name in ("case", "harness", "losses", "memory", "networks", "steps", "timing")
)


def run(command: Sequence[str], folder: Path, changes: Mapping[str, str]) -> str:
    """What the command prints, with these changes to the environment. What it started does not outlive an interrupt.

    Raises ChildProcessError with its last line where it fails.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as a git hook sets them
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**inherited, **changes},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):  # none of them is left
                for number in (signal.SIGTERM, *[0] * 200, signal.SIGKILL):  # ninja ends its compilers only where it is asked
                    os.killpg(process.pid, number)
                    process.poll()
                    time.sleep(0.02)
            raise
    if process.returncode:
        lines = output.strip().splitlines() or [f"exit status {process.returncode}"]
        raise ChildProcessError(lines[-1])
    return output


def _git(root: Path, *arguments: str) -> str:
    return run(["git", "-c", f"core.hooksPath={os.devnull}", *arguments], root, {}).strip()


@contextlib.contextmanager
def checkout(root: Path, commit: str) -> Iterator[Path]:
    """A detached worktree of ``commit`` in a temporary folder; gone afterwards, also where the process is asked to end."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with tempfile.TemporaryDirectory(prefix="imm-base-") as name:
            tree = Path(name) / "tree"
            try:
                _git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
                yield tree
            finally:
                with contextlib.suppress(ChildProcessError):  # it was not added
                    _git(root, "worktree", "remove", "--force", str(tree))
    finally:
        signal.signal(signal.SIGTERM, previous)


def newer_source(root: Path) -> Path | None:
    """A source that was changed after the native library in ``root`` was built, or None; csrc/cuda counts where it is built."""
    built = [path.stat().st_mtime for path in (root / "python" / "imm" / "_native").glob("*.so")]
    sources = [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")]
    cuda = bool((native.build_info() or {}).get("cuda"))
    newer = [
        path for path in sources if path.stat().st_mtime > max(built, default=math.inf) and (cuda or "cuda" not in path.parts)
    ]
    return newer[0].relative_to(root) if newer else None


def build(tree: Path) -> str | None:
    """Build the native library in ``tree`` as this process has one; why that cannot be, or None."""
    built = native.build_info()
    if built is None or not (tree / "CMakeLists.txt").is_file():
        return None
    script = tree / "bench" / "build_in_place.py"
    if not script.is_file():
        return "it has no bench/build_in_place.py"
    tools = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # cmake and ninja of this Python
    try:
        run([sys.executable, str(script), *["--cuda"] * bool(built["cuda"])], tree, {"PATH": tools})
    except ChildProcessError as error:
        return str(error)
    return None


def measure(side: Path, op: str, options: Sequence[str], out: Path, changes: Mapping[str, str]) -> Results:
    """``imm bench`` of one checkout, in a process of its own. Raises ChildProcessError where it fails."""
    path = os.pathsep.join([str(side / "python"), str(side)])
    run([sys.executable, "-m", "imm", "bench", op, *options, f"--out={out}"], side, {"PYTHONPATH": path, **changes})
    return Results.read(out)


def against(revision: str, op: str, options: Sequence[str], out: Path | None, say: Callable[[str], None]) -> Comparison:
    """Measure an op ("all": every one) at ``revision`` and in the working tree, each twice, in turns.

    ``options`` are those of ``imm bench``, given to both. ``out`` keeps the four results folders.

    Raises ValueError for a revision that is not there or cannot be measured, ChildProcessError where a run fails,
    FileNotFoundError outside a checkout.
    """
    root = bench_folder().parent
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except (ChildProcessError, OSError) as error:
        raise ValueError(f"base: expected a commit of this checkout, got {revision!r}: {error}") from error
    kept = out and out.resolve()  # each side runs in a folder of its own
    if kept and any((kept / f"{side}-{repeat}").exists() for side in ("base", "tree") for repeat in "12"):
        raise ValueError(f"out: expected a folder without an earlier comparison, got {out}")
    measured = "bench" if op == "all" else f"bench/bench_{op}.py"
    with tempfile.TemporaryDirectory() as temporary, checkout(root, commit) as tree:
        for needed in ("python/imm/benchmark/rows.py", measured):
            if not (tree / needed).exists():
                raise ValueError(f"base: expected a commit with {needed}, got {revision!r}, which has none")
        if _git(root, "diff", "--name-only", commit, "--", *_MEASURING, measured):
            say("note: the harness or what it measures differs between the two; each side is measured by its own")
        reason = build(tree)
        if reason is not None:
            say(f"note: both sides run without the native library, which cannot be built for {revision}: {reason}")
        elif source := newer_source(root):
            say(f"note: {source} is newer than the native library of the working tree; build that first (make)")
        common = {} if reason is None else {"IMM_NATIVE": "0"}
        titles = (f"{revision} ({commit[:10]})", "the working tree")
        sides = {"base": (tree, {**common, "IMM_NATIVE_DIR": ""}), "tree": (root, common)}
        runs: dict[str, list[Results]] = {side: [] for side in sides}
        for repeat in "12":
            for side, (folder, changes) in sides.items():
                say(f"{side}, run {repeat} of 2")
                runs[side].append(measure(folder, op, options, (kept or Path(temporary)) / f"{side}-{repeat}", changes))
        if any(run.environment["commit"] != commit for run in runs["base"]):
            raise ValueError(f"base: expected imm of {revision} to be measured, got another: is PYTHONPATH overruled?")
        return compare(*(merged(title, *found) for title, found in zip(titles, runs.values(), strict=True)))
