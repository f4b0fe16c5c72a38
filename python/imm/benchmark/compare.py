"""What moved between two results folders of one machine, beyond the spread of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from imm.benchmark.case import COPY, MATMUL
from imm.benchmark.environment import read as read_environment
from imm.benchmark.rows import OK, Row, Visits, beside, duration, flat, interval, joined, ours, quantile, read

#: How far medians differ at least: less of a difference two processes of the same code show as well (docs/bench.md).
LEAST = 0.1
#: What of an environment makes figures differ with the same code.
_TOLD = ("torch", "triton", "python", "capability", "dirty", "native")

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
        """Of rows with the same key, as of two commits, the last counts."""
        return cls(name, {row.key: row for row in rows}, environment)

    @classmethod
    def read(cls, folder: Path, name: str | None = None) -> Results:
        """Raises ValueError for a folder without results."""
        try:
            return cls.of(name or str(folder), read(folder / "rows.csv"), read_environment(folder))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"compare: expected a folder with rows.csv and environment.json, got {folder}") from error

    @cached_property
    def timed(self) -> dict[Key, tuple[Row, Row]]:
        """The rows with times, each with the copy of the same rounds, of which a slow peer has fewer."""
        copies = {key: self.rows.get((*key[:-1], COPY)) for key, row in self.rows.items() if row.samples}
        return {key: (self.rows[key], copy) for key, copy in copies.items() if copy and copy.samples}

    @property
    def machines(self) -> set[tuple[str, str, int]]:
        """Machine, device and threads of the rows."""
        return {(row.machine, row.device, row.threads) for row in self.rows.values()}

    @property
    def told(self) -> dict[str, Any]:
        """What a reader should know where it differs between two runs."""
        known = {name: self.environment.get(name) for name in _TOLD}
        return {**known, "native": isinstance(known["native"], dict)}


@dataclass(frozen=True)
class Pair:
    """One peer at one case in both folders, each with the copy of the same rounds.

    others: the median ratio, time after over time before, of the case's other peers that are not ours.
    """

    before: Row
    after: Row
    copies: tuple[Row, Row]
    others: float

    @property
    def ratio(self) -> float:
        """The median time after over the one before."""
        return _ratio(self.before.samples, self.after.samples)

    @property
    def moved(self) -> int:
        """1 for slower, -1 for faster, 0 where the two agree within their spread.

        The times must lie apart and, but for the copy, so must their ratios to the copy of the same round; the medians of both
        must differ, also from what became of the others: a machine that is slower for a while is slower at all of them.
        """
        sign = _apart(self.before.visits, self.after.visits)
        changes = [self.ratio]
        if self.after.peer != COPY:
            rows = zip((self.before, self.after), self.copies, strict=True)
            before, after = (beside(row.visits, copy.visits) for row, copy in rows)
            if _apart(before, after) != sign:
                return 0
            changes += [_ratio(flat(before), flat(after)), self.ratio / self.others]
        return sign if all(change**sign > 1 + LEAST for change in changes) else 0

    def __str__(self) -> str:
        row, times = self.after, f"{duration(_median(self.before.samples))} -> {duration(_median(self.after.samples))}"
        ceiling = "" if row.peer == COPY else f"; x copy {self.before.ratio_to_copy:.2f} -> {row.ratio_to_copy:.2f}"
        return f"{_words(row)}, {row.peer}: {times} ({self.ratio:.2f}x{ceiling})"


def _words(row: Row) -> str:
    return f"{row.op} {row.mode}, {row.shape}, {row.dtype}, {row.cache}"


def _others(row: Row) -> bool:
    """Whether a peer is not this project's: its parts and what is timed beside it, but for the ceilings, are its own code."""
    return row.peer in (COPY, MATMUL) or (row.error is not None and not ours(row.peer))


def _median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def _ratio(before: Sequence[float], after: Sequence[float]) -> float:
    return _median(after) / _median(before)


def _apart(before: Visits, after: Visits) -> int:
    """1 where the spread of ``after`` lies above that of ``before``, -1 below, 0 where they meet."""
    (low, high), (other_low, other_high) = interval(before), interval(after)
    return (other_low > high) - (other_high < low)


@dataclass(frozen=True)
class Comparison:
    """Two runs of one machine; ``compare`` makes it."""

    before: Results
    after: Results

    @cached_property
    def pairs(self) -> list[Pair]:
        """The rows timed in both, in the order of ``after``."""
        old, new = self.before.timed, self.after.timed
        ratios = {key: _ratio(old[key][0].samples, row.samples) for key, (row, _) in new.items() if key in old}
        made = []
        for key in ratios:
            others = [r for k, r in ratios.items() if k[:-1] == key[:-1] and k != key and _others(new[k][0])]
            copies = old[key][1], new[key][1]
            made.append(Pair(old[key][0], new[key][0], copies, _median(others) if others else 1.0))
        return made

    @cached_property
    def moved(self) -> list[Pair]:
        """The rows that do not agree within their spread, the slowest first."""
        return sorted((pair for pair in self.pairs if pair.moved), key=lambda pair: -pair.ratio)

    @property
    def slower(self) -> list[Row]:
        """The rows of ours that are slower, or that were timed before and are now refused or missing in their case."""
        found = [pair.after for pair in self.moved if pair.moved > 0 and ours(pair.after.peer)]
        new = self.after.timed
        cases = {key[:-1] for key in self.after.rows}
        lost = [row for key, (row, _) in self.before.timed.items() if key not in new and key[:-1] in cases and ours(row.peer)]
        return found + lost

    def __str__(self) -> str:
        old, new = self.before.timed, self.after.timed
        gone = [key for key in old if key not in new]
        refused = [key for key in gone if key in self.after.rows and self.after.rows[key].status != OK]
        vanished = [key for key in gone if key not in refused]
        agreeing = len(self.pairs) - len(self.moved)
        lines = [f"{self.before.name} -> {self.after.name}"]
        told = self.before.told, self.after.told
        lines += [
            f"note: {name} differs: {told[0][name]} and {told[1][name]}" for name in _TOLD if told[0][name] != told[1][name]
        ]
        lines.append(
            f"{len(self.pairs)} rows in both, {len(self.moved)} moved, {len(vanished)} vanished, {len(refused)} newly refused, "
            f"{len(new.keys() - old.keys())} new"
        )
        for word, sign in (("slower", 1), ("faster", -1)):
            lines += [f"  {word}: {pair}" for pair in self.moved if pair.moved == sign]
        cases = {key[:-1] for key in new}
        lines += [f"  vanished: {_words(old[key][0])}, {key[-1]}" for key in vanished if key[:-1] in cases]
        whole = Counter(_words(old[key][0]) for key in vanished if key[:-1] not in cases)
        lines += [f"  vanished: {words}: {count} rows" for words, count in whole.items()]
        lines += [f"  {self.after.rows[key].status} ({_words(old[key][0])}, {key[-1]})" for key in refused]
        copies = [pair.ratio for pair in self.pairs if pair.after.peer == COPY]
        lines.append(f"the copy itself took {min(copies):.2f} to {max(copies):.2f} times as long")
        share = 100 * agreeing // len(self.pairs)
        lines.append(f"{agreeing} of {len(self.pairs)} rows agree within their spread ({share} %)")
        return "\n".join(lines)


def compare(before: Results, after: Results) -> Comparison:
    """Raises ValueError for results of different machines, devices or threads, and for none in common."""
    if before.machines != after.machines:
        one, other = (sorted(results.machines) for results in (before, after))
        raise ValueError(f"compare: expected results of one machine, device and number of threads, got {one} and {other}")
    made = Comparison(before, after)
    if not made.pairs:
        raise ValueError("compare: expected rows with samples in common, got none")
    return made


def merged(name: str, first: Results, second: Results) -> Results:
    """Two runs of one side as one, of the visits of both. A row that has no time in one of them has none."""
    return Results.of(name, joined(first.rows.values(), second.rows.values()), first.environment)
