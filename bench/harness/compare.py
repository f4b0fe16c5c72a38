"""What moved between two results folders of one machine, beyond the spread of both; and between two commits.

``imm bench OP --base REV`` measures each side by its own benchmark in processes of its own, in the order base, tree, base,
tree: what slows the machine down for a while is seen on both sides.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.case import COPY, MATMUL, ROOT
from harness.environment import read as read_environment
from harness.rows import Row, Visits, beside, duration, flat, interval, joined, ours, quantile, read
from imm.ops import native

#: How far medians differ at least: less of a difference two processes of the same code show as well (docs/internals/bench.md).
LEAST = 0.1
#: What of an environment makes figures differ with the same code.
_TOLD = ("torch", "triton", "python", "capability", "dirty")

#: Op, mode, shape, dtype, device, cache and peer: what names a row of one run.
Key = tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """The rows of a results folder (in their order) and its environment; ``name`` is for the reader."""

    name: str
    rows: dict[Key, Row]
    environment: dict[str, Any]

    @classmethod
    def of(cls, name: str, rows: Iterable[Row], environment: dict[str, Any]) -> Results:
        return cls(name, {row.key: row for row in rows}, environment)  # of two commits the last counts

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Raises ValueError for a folder without results."""
        try:
            return cls.of(str(folder), read(folder / "rows.csv"), read_environment(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"compare: expected a folder with rows.csv and environment.json, got {folder}") from error

    @property
    def timed(self) -> dict[Key, Row]:
        """The rows with times whose copy has some as well."""
        copies = {key[:-1] for key, row in self.rows.items() if row.samples_us and key[-1] == COPY}
        return {key: row for key, row in self.rows.items() if row.samples_us and key[:-1] in copies}


def _median(visits: Visits) -> float:
    return quantile(flat(visits), 0.5)


def _apart(before: Visits, after: Visits) -> int:
    """1 where the spread of ``after`` lies above that of ``before``, -1 below, 0 where they meet."""
    (low, high), (other_low, other_high) = interval(before), interval(after)
    return (other_low > high) - (other_high < low)


def _words(row: Row) -> str:
    return f"{row.op} {row.mode}, {row.shape}, {row.dtype}, {row.cache}, {row.peer}"


class Comparison:
    """Two runs of one machine. ratios: time after over time before, of the rows timed in both. moved: of those that do not
    agree within their spread, the slowest first, 1 for slower and -1 for faster.

    Raises ValueError for results of different machines, devices or threads, and for none in common.
    """

    def __init__(self, before: Results, after: Results) -> None:
        one, other = (sorted({(r.machine, r.device, r.threads) for r in side.rows.values()}) for side in (before, after))
        if one != other:
            raise ValueError(f"compare: expected results of one machine, device and number of threads, got {one} and {other}")
        self.before, self.after = before, after
        old, new = before.timed, after.timed
        self.ratios = {key: _median(row.visits) / _median(old[key].visits) for key, row in new.items() if key in old}
        if not self.ratios:
            raise ValueError("compare: expected rows with samples in common, got none")
        slowest = sorted(self.ratios, key=lambda key: -self.ratios[key])
        self.moved = {key: sign for key in slowest if (sign := self._moved(key))}
        self.refused = [after.rows[key] for key in old if key not in new and key in after.rows]
        self.vanished = [row for key, row in old.items() if key not in after.rows]
        self.young = len(new.keys() - old.keys())

    def _moved(self, key: Key) -> int:
        """The times must lie apart and, but for the copy, so must their ratios to the copy of the same round; the medians of
        both must differ, also from what became of the case's other peers that are not this project's: a machine that is slower
        for a while is slower at all of them."""
        copy = (*key[:-1], COPY)
        sides = [(side.rows[key].visits, side.rows[copy].visits) for side in (self.before, self.after)]
        sign, changes = _apart(sides[0][0], sides[1][0]), [self.ratios[key]]
        if key[-1] != COPY:
            before, after = (beside(*side) for side in sides)
            if _apart(before, after) != sign:
                return 0
            others = {k: self.after.rows[k] for k in self.ratios if k[:-1] == key[:-1] and k != key}
            foreign = [k for k, row in others.items() if k[-1] in (COPY, MATMUL) or (row.whole and not ours(k[-1]))]
            changes += [_median(after) / _median(before)]
            changes += [self.ratios[key] / quantile([self.ratios[k] for k in foreign], 0.5)] if foreign else []
        return sign if all(change**sign > 1 + LEAST for change in changes) else 0

    @property
    def slower(self) -> list[Row]:
        """The rows of ours that are slower, or that were timed before and are now refused or missing in their case."""
        found = [self.after.rows[key] for key, sign in self.moved.items() if sign > 0]
        cases = {key[:-1] for key in self.after.rows}
        return [row for row in [*found, *self.refused, *self.vanished] if ours(row.peer) and row.key[:-1] in cases]

    def __str__(self) -> str:
        sides = self.before, self.after
        told = [(name, *(side.environment.get(name) for side in sides)) for name in _TOLD]
        lines = [f"note: {name} differs: {a} and {b}" for name, a, b in told if a != b]
        counts = f"{len(self.vanished)} vanished, {len(self.refused)} newly refused, {self.young} new"
        lines.append(f"{len(self.ratios)} rows in both, {len(self.moved)} moved, {counts}")
        for key, sign in self.moved.items():
            times = " -> ".join(duration(_median(side.rows[key].visits)) for side in sides)
            word = "slower" if sign > 0 else "faster"
            lines.append(f"  {word}: {_words(self.after.rows[key])}: {times} ({self.ratios[key]:.2f}x)")
        lines += [f"  vanished: {_words(row)}" for row in self.vanished]
        lines += [f"  {row.status} ({_words(row)})" for row in self.refused]
        copies = [ratio for key, ratio in self.ratios.items() if key[-1] == COPY]
        lines.append(f"the copy itself took {min(copies):.2f} to {max(copies):.2f} times as long")
        agreeing, every = len(self.ratios) - len(self.moved), len(self.ratios)
        lines.append(f"{agreeing} of {every} rows agree within their spread ({100 * agreeing // every} %)")
        return "\n".join([f"{self.before.name} -> {self.after.name}", *lines])


def merged(name: str, first: Results, second: Results) -> Results:
    """Two runs of one side as one, of the visits of both. A row that has no time in one of them has none."""
    return Results.of(name, joined(first.rows.values(), second.rows.values()), first.environment)


def run(command: Sequence[str], folder: Path, changes: Mapping[str, str]) -> str:
    """What the command prints, with these changes to the environment. Raises ChildProcessError with its last line where it
    fails."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as a git hook sets them
    done = subprocess.run(command, cwd=folder, env={**inherited, **changes}, text=True, capture_output=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise ChildProcessError(said[-1] if said else f"exit status {done.returncode}")
    return done.stdout


def _git(root: Path, *arguments: str) -> str:
    return run(["git", "-c", f"core.hooksPath={os.devnull}", *arguments], root, {}).strip()


@contextlib.contextmanager
def checkout(root: Path, commit: str) -> Iterator[Path]:
    """A detached worktree of ``commit`` in a temporary folder; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="imm-base-") as name:
        tree = Path(name) / "tree"
        _git(root, "worktree", "add", "--quiet", "--detach", str(tree), commit)
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def build(tree: Path) -> str | None:
    """Build the native library in ``tree`` as this process has one; why that cannot be, or None."""
    if (built := native.build_info()) is not None and (tree / "CMakeLists.txt").is_file():
        settings = {"IMM_BUILD_NATIVE": "1", "IMM_BUILD_CUDA": "1" if built["cuda"] else "0"}
        try:
            run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree, settings)
        except ChildProcessError as error:
            return str(error)
    return None


def measure(side: Path, op: str, options: Sequence[str], out: Path, changes: Mapping[str, str]) -> Results:
    """``imm bench`` of one checkout, in a process of its own. Raises ChildProcessError where it fails."""
    path = os.pathsep.join([str(side / "python"), str(side)])
    run([sys.executable, "-m", "imm", "bench", op, *options, f"--out={out}"], side, {"PYTHONPATH": path, **changes})
    return Results.read(out)


def against(
    revision: str, op: str, options: Sequence[str], out: Path | None, say: Callable[[str], None], root: Path = ROOT
) -> Comparison:
    """Measure an op ("all": every one) at ``revision`` and in the working tree, each twice, interleaved. ``options`` of ``imm
    bench`` are given to both; ``out`` keeps the four results folders.

    Raises ValueError for a revision that is not there or cannot be measured, ChildProcessError where a run fails.
    """
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except (ChildProcessError, OSError) as error:
        raise ValueError(f"base: expected a commit of this checkout, got {revision!r}: {error}") from error
    kept = out and out.resolve()  # each side runs in a folder of its own
    if kept and any((kept / f"{side}-{repeat}").exists() for side in ("base", "tree") for repeat in "12"):
        raise ValueError(f"out: expected a folder without an earlier comparison, got {out}")
    measured = "bench" if op == "all" else f"bench/bench_{op}.py"
    with tempfile.TemporaryDirectory() as temporary, checkout(root, commit) as tree:
        for needed in ("python/imm/cli/bench.py", measured):
            if not (tree / needed).exists():
                raise ValueError(f"base: expected a commit with {needed}, got {revision!r}, which has none")
        if _git(root, "diff", "--name-only", commit, "--", "bench/harness", "python/imm/benchmark", measured):
            say("note: the harness or what it measures differs between the two; each side is measured by its own")
        if reason := build(tree):
            say(f"note: both sides run without the native library, which cannot be built for {revision}: {reason}")
        common = {"IMM_NATIVE": "0"} if reason else {}
        titles = (f"{revision} ({commit[:10]})", "the working tree")
        sides = {"base": (tree, {**common, "IMM_NATIVE_DIR": ""}), "tree": (root, common)}
        runs: dict[str, list[Results]] = {side: [] for side in sides}
        for repeat in "12":
            for side, (folder, changes) in sides.items():
                say(f"{side}, run {repeat} of 2")
                runs[side].append(measure(folder, op, options, (kept or Path(temporary)) / f"{side}-{repeat}", changes))
        if any(run.environment["commit"] != commit for run in runs["base"]):
            raise ValueError(f"base: expected imm of {revision} to be measured, got another: is PYTHONPATH overruled?")
        return Comparison(*(merged(title, *found) for title, found in zip(titles, runs.values(), strict=True)))
