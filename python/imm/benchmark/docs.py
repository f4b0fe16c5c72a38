"""docs/performance.md from committed rows: nothing in it is typed by hand.

python -m imm.benchmark.docs [FOLDER ...] > docs/performance.md      (default: every folder of bench/results)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from imm.benchmark.case import Claim, load
from imm.benchmark.case import folder as bench_folder
from imm.benchmark.environment import read as read_environment
from imm.benchmark.rows import Row, cases, cells, grouped, ratios, read, title

#: How rows come about and what their columns say; for every page made of them.
PROTOCOL = """\
Every row is the median of some calls; peers take turns (A B C A B C ...) in one process with a fixed number of threads, after
the op's own tests. On the CPU the list of cases is gone through more than once (visits), since a shared machine changes within
minutes. Cold buffers rotate, so that they come from memory and go there, as where other work lies between two calls: inputs,
and outputs that were allocated before ("out="). Outputs that a peer allocates itself rotate on a GPU; on the CPU they lie
where the allocator puts them. Warm buffers are the same at each call, as in a loop. "spread" is from the lowest 20 % quantile
of a visit to the highest 80 % quantile; of a single visit, of its two halves. "x imm" is how many times as long as our fastest
peer of the case. GB/s counts the bytes that the algorithm must move, whatever the peer moves. A ratio is the median of each
round's: what slows the machine down for a while slows both down. "x copy" is that to a copy that moves as many bytes: 1 is the
ceiling for work limited by memory. "of floor" is the share of the time that the slower of this copy and, for work that is
products, one product of as many flops takes. "error" is the largest difference from float64, relative to the largest number; a
peer that is wrong is not timed, and a line without an error does a part of the work. "peak" is inputs, what the peer keeps and
the most that a step allocates, without the weights that were there before."""

_HEAD = f"""# Performance

Made by `python -m imm.benchmark.docs > docs/performance.md` from the rows in `bench/results`; figures are not edited by hand.

{PROTOCOL}
`imm bench all` measures your machine.
"""


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, f"|{'---|' * (first.count('|') - 1)}", *rest])


def _claims(of_op: Sequence[Sequence[Row]]) -> str:
    """The published ratios of an op, one line per case that they are about; empty for an op without any."""
    asked = getattr(load(of_op[0][0].op), "CLAIMS", ())
    measured = [(rows[0], dict(ratios(rows, asked))) for rows in of_op]
    shown = [claim for claim in asked if any(claim in found for _, found in measured)]
    lines = [["mode", "shape", "dtype", "buffers", *(f"{claim.slow} / {claim.fast}, {claim.bound}" for claim in shown)]]
    for row, found in measured:
        if found:
            texts = [_verdict(claim, found[claim]) if claim in found else "" for claim in shown]
            lines.append([row.mode, row.shape, row.dtype, row.cache, *texts])
    return _markdown(lines) if shown else ""


def _verdict(claim: Claim, ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{ratio:.2f}{'' if claim.holds(ratio) else ' (missed)'}"


def machine(e: dict[str, Any]) -> str:
    """The machine of an ``environment.json``, in words."""
    if e["cuda"]:
        return f"GPU: {e['cuda']['name']}, driver {(e['cuda']['before'] or {}).get('driver_version', 'unknown')}"
    return f"CPU: {e['machine']}, {e['threads']} threads of {e['cores']} cores, {e['capability']}"


def versions(e: dict[str, Any]) -> str:
    """What ran there and when, in words."""
    dirty = " with changes" if e["dirty"] else ""
    packages = f"torch {e['torch']}, triton {e['triton'] or 'none'}, Python {e['python']}, imm {e['imm']}"
    busy = f"load average {e['load']} before the first row, {e['after']['load']} after the last"
    return f"{packages}, commit {e['commit'][:10]}{dirty}, {e['time'][:10]}, {busy}"


def section(folder: Path) -> str:
    """One results folder: the machine, then per op the published ratios and a table per case."""
    e = read_environment(folder)
    parts = [f"## {machine(e)}, commit {e['commit'][:10]}", f"{versions(e)}."]
    for of_op in grouped(read(folder / "rows.csv"), "op"):
        found = cases(of_op)
        parts.append(f"### {of_op[0].op}")
        if e["device"] == "cpu" and (text := _claims(found)):
            parts.append(text)
        for rows in found:
            parts += [f"#### {title(rows[0])}", _markdown(cells(rows))]
    return "\n\n".join(parts) + "\n"


def render(folders: Sequence[Path]) -> str:
    """The page for these results folders."""
    measured = {read_environment(folder)["device"] for folder in folders}
    names = {"cpu": "CPU", "cuda": "GPU"}
    absent = [f"## {name}\n\nnot measured\n" for device, name in names.items() if device not in measured]
    return "\n".join([_HEAD, *map(section, folders), *absent])


def committed() -> list[Path]:
    """The results folders of the checkout."""
    return sorted(path.parent for path in (bench_folder() / "results").glob("*/rows.csv"))


if __name__ == "__main__":
    print(render([Path(argument) for argument in sys.argv[1:]] or committed()), end="")
