"""``report.html`` of a results folder: one file that needs no other, with the figures, a summary and every row.

PYTHONPATH=bench python -m harness.report FOLDER      (figures with matplotlib, the extra "plots")
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from harness import plots
from harness.case import COPY, load, operations
from harness.environment import read as read_environment
from harness.rows import Row, aligned, cases, claims, duration, fastest, floor, grouped, ours, paired, read, table

_CSS = """
:root { color-scheme: light dark; } body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; padding: 1rem; }
p, figcaption { max-width: 50rem; } nav a { margin-right: 1rem; } pre { font-size: .85rem; overflow-x: auto; }
figure img { max-width: 100%; background: #fff; }
"""
_INTRO = """Ops of imm, an engine for Inductive Moment Matching (few-step image generation), each beside other ways to do the
same work on the same machine. Peers whose names begin with imm are the engine's own: "out=" writes into memory that was there
before, "as a user calls it" includes autograd. The others are plain torch, torch.compile and libraries."""
_SUMMARY = """One line a case: our fastest peer, how many times as long the fastest peer with torch.compile and the fastest of
the other peers take, and the roofline over our time: the slower of a copy of as many bytes and, for matmul-like work, one
matmul of as many flops, both timed in the same run."""
_METHOD = """Every row is the median of some calls; peers are interleaved (A B C A B C ...) in one process, after the op's own
tests. On the CPU the list of cases is visited more than once (visits), since a shared machine changes within minutes. Cold
buffers rotate, so that inputs and preallocated outputs are read from memory and written to it; warm buffers are the same at
each call. "spread" is from the lowest 20 % quantile of a visit to the highest 80 % quantile; of a single visit, of its two
halves. GB/s counts the bytes that the algorithm must move, whatever the peer moves. A ratio is the median of each round's: "x
imm" to our fastest peer, "x copy" to a copy that moves as many bytes, "of roofline" the share of the time that the roofline
takes. "error" is the largest difference from float64, relative to the largest number; a peer that is wrong is not timed.
"peak" is inputs, what the peer keeps and the most that a step allocates, without the weights that were there before. Lines
without an error are not compared with float64: ceilings, and what does a part of the work only."""


def make(folder: Path, say: Callable[[str], Any] = print) -> Path:
    """Draw the figures of a results folder and write its ``report.html``; one line to ``say`` where matplotlib is missing. The
    rows are those of the last run's commit: figures of two commits do not belong on one page.

    Raises ValueError for a folder without rows.
    """
    if not all((folder / name).is_file() for name in ("rows.csv", "environment.json")):
        raise ValueError(f"results: expected a folder with rows.csv and environment.json, got {folder}")
    environment = read_environment(folder)
    rows = [row for row in read(folder / "rows.csv") if row.commit == environment["commit"]]
    if not any(row.median_us is not None for row in rows):
        raise ValueError(f"results: expected timed rows of commit {environment['commit'][:10]}, got none in {folder}")
    try:
        figures = plots.draw(rows, folder)
    except ImportError as error:
        say(f"no figures: {error} (pip install matplotlib, or imm with its extra plots)")
        figures = []
    path = folder / "report.html"
    path.write_text(_page(rows, environment, figures), encoding="utf-8")
    return path


def _page(rows: Sequence[Row], environment: dict[str, Any], figures: Sequence[plots.Figure]) -> str:
    refused = [row for row in rows if row.median_us is None]
    reasons = [f"{row.op} {_about(row)}, {row.peer}: {row.status}" for row in refused]
    head = ["case", "our fastest", "time", "torch.compile takes", "others take", "roofline / time", "error"]
    lines = [head, *filter(None, map(_summary, cases(rows)))]
    known = {name: value for name, value in environment.items() if name != "system"}
    sections = {
        "summary": [_text("p", _SUMMARY), _text("pre", aligned(lines, left=2))],
        "figures": [_figure(figure) for figure in figures] or [_text("p", "None: matplotlib is not installed.")],
        "rows": [part for of_op in grouped(rows, "op") for part in _of_op(of_op)],
        "refused": [_text("pre", "\n".join(reasons))],
        "method": [_text("p", _METHOD), _text("pre", json.dumps(known, indent=2))],
    }
    where = f"{environment['machine']}, {environment['threads']} threads, commit {environment['commit'][:10]}"
    title = f"imm bench: {where}{' with changes' if environment['dirty'] else ''}"
    timed = sum(row.median_us is not None for row in rows)
    count = f"{len(cases(rows))} cases of {len(grouped(rows, 'op'))} ops, {timed} rows timed, {len(refused)} refused."
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    top = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"{_text('title', title)}<style>{_CSS}</style></head><body>",
        *(_text("h1", title), _text("p", _INTRO), _text("p", count)),
        "<nav>" + "".join(f'<a href="#{name}">{name}</a>' for name in sections) + "</nav>",
    ]
    parts = [f'<h2 id="{name}">{name.capitalize()}</h2>\n' + "\n".join(inner) for name, inner in sections.items()]
    return "\n".join([*top, *parts, "</body></html>\n"])


def _text(tag: str, text: str) -> str:
    return f"<{tag}>{escape(text)}</{tag}>"


def _about(row: Row) -> str:
    return f"{row.mode}, {row.shape}, {row.dtype}, {row.cache}"


def _summary(case: Sequence[Row]) -> list[str]:
    """Our fastest peer of a case beside the others and the roofline; nothing for a case that has none."""
    peers, least = [row for row in case if row.whole], floor(case)
    best = fastest(row for row in peers if ours(row.peer))
    if best is None:
        return []
    texts = [f"{best.op} {_about(best)}", best.peer, duration(best.median_us)]
    for compiled in (True, False):
        rival = fastest(row for row in peers if not ours(row.peer) and ("torch.compile" in row.peer) == compiled)
        texts.append("" if rival is None else f"{paired(rival.visits, best.visits):.2f} x ({rival.peer})")
    share = "" if least is None else f"{100 * paired(least.visits, best.visits):.0f} %"
    name = "" if least is None else " (copy)" if least.peer == COPY else f" (product in {least.dtype})"
    return [*texts, share + name, f"{best.error:.0e}"]


def _figure(figure: plots.Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _of_op(of_op: Sequence[Row]) -> list[str]:
    """What the op is, in the words of its file, and for every case its rows and the published ratios about it."""
    op = of_op[0].op
    module = load(op) if op in operations() else None
    tables = [f"{table(case)}\n{claims(case, getattr(module, 'CLAIMS', ()))}" for case in cases(of_op)]
    return [_text("h3", op), _text("p", (module.__doc__ or "") if module else ""), _text("pre", "\n".join(tables))]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(make(Path(argument)))
