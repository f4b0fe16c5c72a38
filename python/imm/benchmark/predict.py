"""A model of a machine, the roofline: no case is faster than its bytes through the memory, or its flops through the units that
do them. ``imm bench --predict=NAME`` prints it without the machine, and beside measured rows where there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import torch

from imm.benchmark.case import COPY, MATMUL, Case, load, operations, product_shape
from imm.benchmark.docs import committed
from imm.benchmark.environment import read as read_environment
from imm.benchmark.machines import MEMORY, Machine, find, from_rows
from imm.benchmark.rows import OK, Row, cases, dtype_of, duration, fastest, grouped, ours, read
from imm.benchmark.timing import ROTATED_BYTES


@dataclass(frozen=True)
class Floor:
    """The least time, in seconds: of the memory, and of the arithmetic on ``unit`` (0 where no flops are counted)."""

    memory: float
    arithmetic: float
    unit: str

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic)

    @property
    def bound(self) -> str:
        """What takes that time."""
        return self.unit if self.arithmetic > self.memory else MEMORY


def unit(dtype: str, products: bool) -> str:
    """What does the arithmetic of a dtype: products run at its own rate; sums and exponentials of 16 bits are float32's."""
    return f"products {dtype}" if products else f"vector {'float64' if dtype == 'float64' else 'float32'}"


def floor(machine: Machine, size: float, flops: float, unit: str) -> Floor | None:
    """The floor of ``size`` bytes and ``flops`` on a unit; None where the machine's rate for one of them is not known."""
    memory, rate = machine.rate(MEMORY), machine.rate(unit)
    if memory is None or (flops > 0 and rate is None):
        return None
    return Floor(size / memory, flops / rate if rate else 0.0, unit)


def case_floor(machine: Machine, case: Case) -> Floor | None:
    """The floor of a case."""
    return floor(machine, case.bytes, case.flops, unit(_words(case.arithmetic or case.dtype), case.products))


def kernel_bound(machine: Machine, case: Case) -> tuple[float, str] | None:
    """Seconds that our kernel of the case needs at least of L2 or of issue slots, and which; None where neither is known."""
    times = {unit: amount / rate for unit, amount in case.kernel.items() if (rate := machine.rate(unit))}
    return max((seconds, unit) for unit, seconds in times.items()) if times else None


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(lines: Sequence[Sequence[str]], words: int) -> str:
    """A table: the first columns to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    cells = [
        [c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))] for line in lines
    ]
    return "\n".join("  ".join(["", *line]).rstrip() for line in cells)


def table(machine: Machine, cases: Iterable[Case]) -> str:
    """A line per case: op, mode, shape, dtype, what is the bound, bytes, flops, times, the floor, and that of our kernel."""
    lines = [["op", "mode", "shape", "dtype", "bytes", "flops", "memory", "arithmetic", "floor", "our kernel", "bound"]]
    for case in cases:
        line = [case.op, case.mode, case.size, _words(case.dtype)]
        line += [f"{case.bytes / 1e6:.2f} MB", f"{case.flops / 1e9:.2f} GF" if case.flops else "-"]
        found = case_floor(machine, case)
        own = kernel_bound(machine, case)
        times = ("-", "-", "-", "-", "a rate is not known")
        if found is not None:
            inside = " (in L2)" if machine.l2 is not None and case.bytes <= machine.l2 else ""
            counted = duration(1e6 * found.arithmetic) if case.flops else "-"
            ours, bound = "-", f"{found.bound}{inside}"
            if own is not None:
                ours = duration(1e6 * max(own[0], found.seconds))
                bound += f"; our kernel: {own[1] if own[0] > found.seconds else found.bound}"
            times = (duration(1e6 * found.memory), counted, duration(1e6 * found.seconds), ours, bound)
        lines.append([*line, *times])
    return _aligned([[*line[:4], line[-1], *line[4:-1]] for line in lines], 5)


@dataclass(frozen=True)
class Compared:
    """A measured row beside its prediction. kind: copy, product or imm."""

    kind: str
    row: Row
    floor: Floor

    @property
    def error(self) -> float:
        """Predicted over measured, less 1: negative where the row is slower than its floor."""
        return 1e6 * self.floor.seconds / (self.row.median_us or float("nan")) - 1


@cache
def _declared(op: str, device: str) -> dict[str, str]:
    """By mode the dtype of an op's arithmetic, where its cases declare one."""
    found = load(op).cases(torch.device(device), False) if op in operations() else ()
    return {case.mode: _words(case.arithmetic) for case in found if case.arithmetic is not None}


def _arithmetic(row: Row) -> str:
    """The dtype that a peer computes in: what its case declares, or what its name says."""
    return _declared(row.op, row.device).get(row.mode) or dtype_of(row.peer, row.dtype)


def _subjects(rows: Sequence[Row], products: bool) -> list[tuple[str, Row, float, float, str]]:
    """Of one case and cache: kind, row, bytes, flops and unit of the two ceilings and of our fastest peer."""
    found: list[tuple[str, Row, float, float, str]] = []
    for row in rows:
        if row.peer == COPY:
            found.append(("copy", row, row.bytes, 0.0, unit("float32", False)))
        elif row.peer == MATMUL:
            count, side = product_shape(row.flops)
            size = (2 * count + side) * side * getattr(torch, row.dtype).itemsize
            # On a GPU torch multiplies float32 in full precision unless it is told otherwise: not in TF32.
            full = row.device == "cuda" and row.dtype == "float32"
            found.append(("product", row, size, row.flops, unit(row.dtype, not full)))
    if (best := fastest(row for row in rows if ours(row.peer))) is not None:
        found.append(("imm", best, best.bytes, best.flops, unit(_arithmetic(best), products)))
    return found


def compare(rows: Sequence[Row], machines: Mapping[str, Machine]) -> tuple[list[Compared], int, int]:
    """The copies, products and fastest peers of ours among the rows, each beside what the op's machine predicts.

    Returns:
        Those, how many rows were left out because their buffers may have stayed in a cache, and how many because a rate is not
        known.
    """
    found: list[Compared] = []
    cached = unknown = 0
    timed = [row for row in rows if row.status == OK and row.median_us]
    for case in grouped(timed, "op", "mode", "shape", "dtype"):
        products = any(row.peer == MATMUL for row in case)
        for of_cache in cases(case):
            for kind, row, size, flops, arithmetic in _subjects(of_cache, products):
                machine = machines[row.op]
                predicted = floor(machine, size, flops, arithmetic)
                if predicted is None:
                    unknown += 1
                elif predicted.bound == MEMORY and row.cache == "warm" and size <= (machine.l2 or ROTATED_BYTES):
                    cached += 1
                else:
                    found.append(Compared(kind, row, predicted))
    return found, cached, unknown


def summary(found: Sequence[Compared]) -> str:
    """The errors in a line: per kind how many, the median of their sizes and the largest."""
    texts = []
    for kind in ("copy", "product", "imm"):
        of_kind = [one for one in found if one.kind == kind]
        if of_kind:
            worst = max(of_kind, key=lambda one: abs(one.error))
            middle = median(abs(one.error) for one in of_kind)
            where = f"{worst.row.op} {worst.row.mode}, {worst.row.shape}, {worst.row.dtype}, {worst.row.cache}"
            texts.append(f"{kind}: {len(of_kind)} rows, median error {middle:.0%}, worst {worst.error:+.0%} ({where})")
    return "; ".join(texts) or "nothing to compare"


def check(machine: Machine, folder: Path, ops: Sequence[str], *, source: bool) -> str:
    """The ops' measured rows of a folder beside predictions. Where the folder is the ``source`` of the machine's own rates,
    each op is predicted with those of the other ops, so that no row is judged by itself."""
    rows, recorded = read(folder / "rows.csv"), read_environment(folder)
    machines, rule = dict.fromkeys(ops, machine), "rates: those above, which are not of these rows"
    if source:
        machines = {op: from_rows([row for row in rows if row.op != op], recorded, folder.name) for op in ops}
        rule = "held out: each op is predicted with the copies and products of the other ops, never with its own"
    found, cached, unknown = compare([row for row in rows if row.op in ops], machines)
    lines = [["op", "mode", "shape", "dtype", "cache", "row", "bound", "measured", "predicted", "error"]]
    for one in found:
        row = one.row
        what = one.kind if one.kind != "imm" else row.peer
        times = [duration(row.median_us), duration(1e6 * one.floor.seconds), f"{one.error:+.0%}"]
        lines.append([row.op, row.mode, row.shape, row.dtype, row.cache, what, one.floor.bound, *times])
    left = f"left out: {cached} warm rows whose bytes may stay in a cache, {unknown} of an unknown rate"
    head = f"check against {folder.name}: {recorded['machine']}, {recorded['threads']} threads"
    told = "error = predicted / measured - 1: below 0 the row is slower than its floor, above 0 faster: the rate is too low"
    return "\n".join([head, f"  {rule}", f"  {told}", _aligned(lines, 7), f"  {left}", f"  {summary(found)}"])


def report(op: str, name: str, *, quick: bool, say: Callable[[str], None] = print) -> None:
    """Print the floors of an op's cases ("all": every op's) on a machine, then how measured rows of such a machine compare.

    Raises ValueError for an unknown op or machine, FileNotFoundError outside a checkout.
    """
    machine = find(name)
    ops = operations() if op == "all" else [op]
    modules = [load(one) for one in ops]
    say(machine.description)
    say("  floor: the larger of bytes / memory and flops / the rate of the unit that does them: no kernel is faster")
    say("  our kernel: the larger of that and of what its machine code needs of L2 and issue slots, where it was counted; a")
    say("  lower bound too, since loads, arithmetic and stores overlap in part only")
    if machine.l2 is not None:
        say("  in L2: all that the case moves fits there, so that warm buffers can be faster than the memory's time")
    say(table(machine, (case for module in modules for case in module.cases(torch.device(machine.device), quick))))
    own = Path(name).resolve()
    folders = {folder.resolve(): folder for folder in committed() if machine.matches(read_environment(folder))}
    if (own / "rows.csv").is_file():
        folders.setdefault(own, Path(name))
    for path, folder in folders.items():
        say(check(machine, folder, ops, source=path == own))
    if not folders:
        say(f"measured rows of {machine.name}: not measured")
