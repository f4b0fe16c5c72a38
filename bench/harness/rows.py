"""Rows, their files and the tables made of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from harness.case import COPY, MATMUL, Case, Claim, words
from imm.files import write_text

OK = "ok"
#: What the status of one of our rows begins with while tests of its op fail; its figures stand, marked.
UNVERIFIED = "unverified"
#: The mode of the row of an op that was not timed since its tests fail.
TESTS = "tests"
#: Visit by visit the times of its rounds.
Visits = Sequence[Sequence[float]]


@dataclass
class Row:
    """One peer at one case. Times in microseconds; None where there is none: refused, or not applicable.

    cache: "cold" or "warm". error: the largest relative error against float64. peak_bytes: inputs, what the peer keeps and the
    most that a step allocates. ratio_to_copy: the median of the ratios to the copy of the same round. do_bench_us: of earlier
    results. samples_us: every round's time, with spaces between, and a semicolon between two visits.
    """

    op: str
    mode: str
    shape: str
    dtype: str
    device: str
    cache: str = ""
    peer: str = ""
    status: str = ""
    method: str = ""
    threads: int = 0
    rounds: int = 0
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    bytes: int = 0
    gb_per_s: float | None = None
    ratio_to_copy: float | None = None
    do_bench_us: float | None = None
    flops: int = 0
    gflop_per_s: float | None = None
    error: float | None = None
    peak_bytes: int | None = None
    machine: str = ""
    commit: str = ""
    samples_us: str = ""

    @classmethod
    def of(cls, case: Case, device: torch.device, **values: Any) -> Row:
        """A row of a case, not timed yet."""
        known = {"bytes": case.bytes, "flops": case.flops, "threads": torch.get_num_threads(), **values}
        return cls(case.op, case.mode, case.size, words(case.dtype), device.type, **known)

    def timed(self, seconds: Visits, copy: Visits) -> None:
        """Fill in the times, from this peer's samples and those of the copy (none where it failed), round by round, in
        seconds. Rates are those of peers, which do the case's work, and of the ceiling that is made of it."""
        every = flat(seconds)
        p20, median, p80 = (quantile(every, q) for q in (0.2, 0.5, 0.8))
        self.rounds = len(every)
        self.p20_us, self.median_us, self.p80_us = (round(1e6 * t, 3) for t in (p20, median, p80))
        self.samples_us = "; ".join(" ".join(f"{1e6 * t:.5g}" for t in visit) for visit in seconds)
        self.ratio_to_copy = round(paired(seconds, copy), 4) if copy else None
        self.gb_per_s = round(self.bytes / median * 1e-9, 4) if self.whole or self.peer == COPY else None
        self.gflop_per_s = round(self.flops / median * 1e-9, 4) if self.whole or self.peer == MATMUL else None

    @property
    def whole(self) -> bool:
        """Whether it does the work of its case, as a peer does; a ceiling or a part is not compared with float64."""
        return self.error is not None

    @property
    def visits(self) -> list[list[float]]:
        """Every round's time in microseconds, visit by visit; of a row without a time none."""
        return [[float(word) for word in visit.split()] for visit in self.samples_us.split(";") if visit]

    @property
    def key(self) -> tuple[str, ...]:
        """What names it among the rows of one commit, the peer last."""
        return self.op, self.mode, self.shape, self.dtype, self.device, self.cache, self.peer


def flat(visits: Visits) -> list[float]:
    """The rounds of all visits."""
    return [time for visit in visits for time in visit]


def quantile(values: Sequence[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


def interval(visits: Visits) -> tuple[float, float]:
    """The 20 % to the 80 % quantile of each visit, together; of one visit, of its first and of its second half."""
    if len(visits) == 1:
        (only,) = visits
        visits = [half for half in (only[: len(only) // 2], only[len(only) // 2 :]) if half]
    return min(quantile(visit, 0.2) for visit in visits), max(quantile(visit, 0.8) for visit in visits)


def beside(times: Visits, others: Visits) -> list[list[float]]:
    """Times over others of the same visit and round, as many as both have: what slows a machine down slows both."""
    return [[time / other for time, other in zip(*visit, strict=False)] for visit in zip(times, others, strict=False)]


def paired(times: Visits, others: Visits) -> float:
    """The median of times over others of the same visit and round."""
    return quantile(flat(beside(times, others)), 0.5)


def joined(first: Iterable[Row], second: Iterable[Row]) -> list[Row]:
    """The rows of ``first`` with the visits of ``second`` after their own. One without a time in either has none; one that has
    a time and is missing in ``second`` is left out."""
    later = {row.key: row for row in second}
    made: list[Row] = []
    for row in first:
        other = later.get(row.key)
        if row.median_us is None:
            made.append(row)
        elif other is not None:
            both = replace(row, samples_us=f"{row.samples_us}; {other.samples_us}")
            made.append(other if other.median_us is None else both)
    copies = {row.key[:-1]: row.visits for row in made if row.peer == COPY}
    in_seconds = lambda visits: [[1e-6 * us for us in visit] for visit in visits]
    for row in made:
        if row.median_us is not None:
            row.timed(in_seconds(row.visits), in_seconds(copies.get(row.key[:-1], ())))
    return made


COLUMNS = tuple(field.name for field in fields(Row))


def _parsed(kind: Any, text: str | None) -> Any:
    """A cell as a field of a row; ``kind`` is the field's type."""
    if text is None:
        raise ValueError("a line ends early")
    if kind == "str":
        return text
    return None if "None" in kind and not text else float(text) if "float" in kind else int(text)


def _last(rows: Iterable[Row]) -> list[Row]:
    """Of rows with the same key and commit the last, in the place of the first."""
    return list({(*row.key, row.commit): row for row in rows}.values())


def read(path: Path) -> list[Row]:
    """The rows of a ``rows.csv``, a column that it lacks at its default; of rows with the same key and commit the last. Raises
    ValueError for another file."""
    with path.open(newline="") as file:
        parse = lambda line: {f.name: _parsed(f.type, line[f.name]) for f in fields(Row) if f.name in line}
        try:
            return _last(Row(**parse(line)) for line in csv.DictReader(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"results: expected rows as imm bench writes them, got {path}: {error}") from error


def written(folder: Path) -> list[Row]:
    """The rows of the folder, none where it has no ``rows.csv``. Raises ValueError for one that cannot be added to."""
    path = folder / "rows.csv"
    if path.exists() and path.read_text().partition("\n")[0] != ",".join(COLUMNS):
        raise ValueError(f"out: expected a folder whose rows.csv has this version's columns, got {folder}")
    return read(path) if path.exists() else []


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Write rows to ``rows.csv`` of the folder, which is whole at any moment: in the place of what it has of the same name and
    commit, or after the others. Raises ValueError where it cannot be added to."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in _last([*written(folder), *rows]))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "rows.csv", text.getvalue())


def mark(folder: Path, reasons: Mapping[str, str]) -> None:
    """Mark our timed rows in the folder's ``rows.csv`` as unverified, with the reason of their op, or as OK without one."""
    rows = written(folder)
    for row in rows:
        if ours(row.peer) and row.median_us is not None:
            row.status = f"{UNVERIFIED}: {reasons[row.op]}" if row.op in reasons else OK
    write(folder, rows)


def grouped(rows: Iterable[Row], *columns: str) -> list[list[Row]]:
    """Rows with the same values in these columns together, in the order of each group's first row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, column) for column in columns), []).append(row)
    return list(groups.values())


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case together, one with cold and with warm buffers apart."""
    return grouped(rows, "op", "mode", "shape", "dtype", "device", "cache")


def ours(peer: str) -> bool:
    """Whether a peer is this project's own; "triton" is its kernel without the op around it."""
    return peer.startswith("imm") or peer == "triton"


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the least median; None without a timed one."""
    return min((row for row in rows if row.median_us), key=lambda row: row.median_us or 0.0, default=None)


def floor(rows: Iterable[Row]) -> Row | None:
    """The roofline of a case: the slower of the copy and, where it was timed, the matmul."""
    ceilings = [row for row in rows if row.peer in (COPY, MATMUL) and row.median_us and row.flops]
    return max(ceilings, key=lambda row: row.median_us or 0.0, default=None)


def duration(us: float | None) -> str:
    """A time with a unit that suits it."""
    return "-" if us is None else f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"


def dtype_of(peer: str, dtype: str) -> str:
    """The dtype that a peer computes in: its name says so where it is not the case's."""
    return next((name for name in ("bfloat16", "float32") if name in peer), dtype)


def share_of_floor(row: Row, case: Iterable[Row]) -> float | None:
    """Of a row's time, what the roofline of its case takes; None for a part of the work and in another dtype."""
    least = floor(case)
    if least is None or row.median_us is None or not (row.whole or row is least):
        return None
    return paired(least.visits, row.visits) if dtype_of(row.peer, row.dtype) == least.dtype else None


@dataclass(frozen=True)
class Compared:
    """Our fastest peer of a case; over its time those of the roofline, the fastest compiled and the fastest plain baseline."""

    best: Row
    ratios: tuple[float | None, float | None, float | None]


def compared(case: Sequence[Row]) -> Compared | None:
    """None for a case where nothing of ours was timed."""
    peers, least = [row for row in case if row.whole], floor(case)
    best = fastest(row for row in peers if ours(row.peer))
    if best is None:
        return None
    rivals = [
        fastest(row for row in peers if not ours(row.peer) and ("torch.compile" in row.peer) == compiled)
        for compiled in (True, False)
    ]
    over = [None if row is None else paired(row.visits, best.visits) for row in (least, *rivals)]
    return Compared(best, (over[0], over[1], over[2]))


def first_cases(rows: Sequence[Row]) -> list[list[Row]]:
    """The first case of each op, mode and dtype, with cold buffers where it has them."""
    found = []
    for of_mode in grouped([row for row in rows if row.median_us is not None], "op", "mode", "dtype"):
        of_shape = cases(grouped(of_mode, "shape")[0])
        found.append(next((case for case in of_shape if case[0].cache == "cold"), of_shape[0]))
    return found


def overview(rows: Sequence[Row]) -> str:
    """A Markdown table of a run: one line for the first case of each op, mode and dtype."""
    lines = ["| op | case | imm | torch.compile | eager torch | roofline |", "|---|---|---|---|---|---|"]
    for case in first_cases(rows):
        entry = compared(case)
        if entry is not None:
            least, compiled, eager = entry.ratios
            times = ["" if ratio is None else f"{ratio:.1f}x" for ratio in (compiled, eager)]
            share = "" if least is None else f"{least:.0%}"
            best = entry.best
            about = f"{best.mode}, {best.shape}, {best.dtype}"
            lines.append(f"| {best.op} | {about} | {duration(best.median_us)} | {' | '.join(times)} | {share} |")
    return "\n".join(lines)


HEADINGS = ("peer", "median", "spread", "x imm", "GB/s", "x copy", "of roofline", "error", "peak")


def line(row: Row, case: Sequence[Row]) -> list[str]:
    """A row as text, under HEADINGS; ``case`` has its ceilings and our fastest peer."""
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f} MB"
    if row.median_us is None:
        return [row.peer, row.status, *6 * [""], peak if row.status.startswith(OK) else ""]
    share, best = share_of_floor(row, case), fastest(r for r in case if r.whole and ours(r.peer))
    low, high = interval(row.visits)
    rate = row.gb_per_s if row.whole or row.peer == COPY else None
    to_copy = row.ratio_to_copy if row.whole or row.peer in (COPY, MATMUL) else None
    return [
        row.peer + (f" ({row.status})" if row.status.startswith(UNVERIFIED) else ""),
        duration(row.median_us),
        f"{duration(low)} to {duration(high)}",
        "" if best is None else f"{paired(row.visits, best.visits):.2f}",
        "" if rate is None else f"{rate:.1f}",
        "" if to_copy is None else f"{to_copy:.2f}",
        "" if share is None else f"{share:.0%}",
        "" if row.error is None else f"{row.error:.0e}",
        peak,
    ]


def cells(case: Sequence[Row]) -> list[list[str]]:
    """The rows of a case as text below a line of headings, without the columns that none of them has."""
    lines = [list(HEADINGS), *(line(row, case) for row in case)]
    kept = [i for i in range(len(HEADINGS)) if any(texts[i] for texts in lines[1:])]
    return [[texts[i] for i in kept] for texts in lines]


def title(row: Row) -> str:
    """What the rows of a case share, in words."""
    where = f"{row.device}, {row.threads} threads" if row.device == "cpu" else row.device
    found = f"{row.op} {row.mode}, {row.shape}, {row.dtype}, {where}"
    return f"{found}, {row.cache} buffers, {row.bytes / 1e6:.1f} MB compulsory" if row.bytes else found


def aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Lines of cells, ``left`` columns of words to the left and numbers to the right. What is alone behind a name, such as a
    reason, is longer than a number and has its line to itself."""
    widths = [max(len(line[i]) for line in lines if i != left or any(line[left + 1 :])) for i in range(len(lines[0]))]
    side = lambda i, cell: cell.ljust(widths[i]) if i < left else cell.rjust(widths[i])
    return "\n".join("  ".join(["", *(side(i, cell) for i, cell in enumerate(line))]).rstrip() for line in lines)


def table(rows: Sequence[Row]) -> str:
    """The rows of one case, aligned."""
    return f"{title(rows[0])}\n{aligned(cells(rows))}"


def ratios(rows: Sequence[Row], asked: Sequence[Claim]) -> list[tuple[Claim, float | None]]:
    """The claims about a case, each with its measured ratio, round by round; None where one of the two was not timed."""
    times = {row.peer: row.visits for row in rows}
    found: list[tuple[Claim, float | None]] = []
    for claim in asked:
        if claim.slow in times and claim.fast in times and claim.concerns(rows[0].mode, rows[0].shape, rows[0].cache):
            slow, fast = times[claim.slow], times[claim.fast]
            found.append((claim, paired(slow, fast) if slow and fast else None))
    return found


def claims(rows: Sequence[Row], asked: Sequence[Claim]) -> str:
    """The published ratios of one case, a line each; they are about the CPU."""
    lines = []
    for claim, ratio in ratios(rows, asked) if rows[0].device == "cpu" else []:
        verdict = "not measured" if ratio is None else f"{ratio:.2f} ({'holds' if claim.holds(ratio) else 'DOES NOT HOLD'})"
        lines.append(f"  {claim.slow} / {claim.fast}, {claim.bound}: {verdict}")
    return "\n".join([*lines, ""])
