"""``report.html`` of a results folder: one file that needs no other, with the summary, the figures and every row.

python -m imm.benchmark.report FOLDER      (figures with matplotlib, the extra "plots")
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from imm.benchmark import docs, plots
from imm.benchmark.case import COPY, MATMUL, load
from imm.benchmark.environment import read as read_environment
from imm.benchmark.rows import (
    HEADINGS,
    OK,
    UNVERIFIED,
    Row,
    cases,
    cells,
    dtype_of,
    fastest,
    floor,
    grouped,
    line,
    ours,
    paired,
    ratios,
    read,
    title,
)

_CSS = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --paper: #fff; --line: #d7dce1; --tint: #eaf3fa;
  --bar: #7fb4d8; --won: #05683c; --lost: #a8320a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --paper: #14181d; --line: #343c45;
  --tint: #1b2f3f; --bar: #3a7ba6; --won: #6fd3a0; --lost: #ff9d73; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem 1rem 4rem; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; } p, li, figcaption { max-width: 50rem; }
nav a { margin-right: 1rem; } a { color: inherit; } small, .soft { color: var(--soft); font-size: .8rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { vertical-align: bottom; color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, .words th { text-align: left; } td small { display: block; }
.summary th:nth-child(2), .claims th:nth-child(2) { text-align: left; }
td.text, td.rival, td.share { white-space: normal; } td.text { min-width: 8rem; }
tbody th { text-align: left; padding-top: 1rem; white-space: normal; font-weight: 400; } tbody th b { color: var(--ink); }
tr.ours td { background: var(--tint); } tr.ours td:first-child { font-weight: 600; } tr.ceiling td { color: var(--soft); }
td.share { background: linear-gradient(var(--bar), var(--bar)) no-repeat left bottom / var(--share) 5px; }
.won { color: var(--won); } .lost { color: var(--lost); }
figure { margin: 2rem 0; } figure img { max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
"""
_INTRO = """Ops of imm, an engine for Inductive Moment Matching (few-step image generation), each beside other ways to do the
same work on the same machine. Peers whose names begin with imm are the engine's own: "out=" writes into memory that was there
before, "as a user calls it" includes autograd. The others are plain torch, torch.compile and libraries."""
_SUMMARY = """One line a case, with cold buffers where both kinds were measured: our fastest peer, how many times as long the
fastest peer with torch.compile and the fastest of the other peers take, and the floor over our time. The floor is the slower of
a copy of as many bytes and, for work made of products, one product of as many flops, both timed in the same run; a way
that is faster than that gives more than 100 %. Green and red are more than 2 % apart. Every peer, with its error, is in the
tables."""
_LEGEND = """Ours are tinted. Grey lines are not compared with float64: ceilings, and what does a part of the work only."""


class _Markup(str):
    """Text that is HTML already; everything else is escaped."""


def make(folder: Path, say: Callable[[str], Any] = print) -> Path:
    """Draw the figures of a results folder and write its ``report.html``; one line to ``say`` where matplotlib is missing.

    Raises ValueError for a folder without rows.
    """
    rows, _ = _load(folder)
    try:
        figures = plots.draw(rows, folder)
    except ImportError as error:
        say(f"no figures: {error} (pip install matplotlib, or imm with its extra plots)")
        figures = []
    return write(folder, figures)


def write(folder: Path, figures: Sequence[plots.Figure]) -> Path:
    """Write ``report.html`` from the rows of the folder and these figures. Raises ValueError for a folder without rows."""
    rows, environment = _load(folder)
    path = folder / "report.html"
    path.write_text(_page(rows, environment, figures), encoding="utf-8")
    return path


def _load(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the last run's commit, and its environment: figures of two commits do not belong on one page."""
    if not all((folder / name).is_file() for name in ("rows.csv", "environment.json")):
        raise ValueError(f"results: expected a folder with rows.csv and environment.json, got {folder}")
    environment = read_environment(folder)
    rows = [row for row in read(folder / "rows.csv") if row.commit == environment["commit"]]
    if not any(row.median_us is not None for row in rows):
        raise ValueError(f"results: expected timed rows of commit {environment['commit'][:10]}, got none in {folder}")
    return rows, environment


def _page(rows: Sequence[Row], environment: dict[str, Any], figures: Sequence[plots.Figure]) -> str:
    refused = [row for row in rows if not row.status.startswith((OK, UNVERIFIED))]
    asked = _claims(rows) if environment["device"] == "cpu" else []
    sections = [
        ("summary", "Summary", [_paragraph(_SUMMARY), _summary(rows)]),
        ("method", "How it was measured", [_paragraph(docs.PROTOCOL), _machine(environment)]),
        ("figures", "Figures", [_figure(figure) for figure in figures] or [_paragraph("None: matplotlib is not installed.")]),
        *([("claims", "Published ratios", asked)] if asked else []),
        ("tables", "Every row", [_paragraph(_LEGEND), *_tables(rows)]),
        ("refused", "Refused", [_refused(refused)]),
    ]
    head = f"imm bench: {docs.machine(environment).partition(': ')[2]}"
    timed = sum(row.median_us is not None for row in rows)
    count = f"{len(cases(rows))} cases of {len(grouped(rows, 'op'))} ops, {timed} rows timed, {len(refused)} refused."
    links = "".join(f'<a href="#{name}">{escape(text)}</a>' for name, text, _ in sections)
    parts = [f'<h2 id="{name}">{escape(text)}</h2>\n' + "\n".join(inner) for name, text, inner in sections]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            f"<title>{escape(head)}</title><style>{_CSS}</style></head><body>",
            f"<h1>{escape(head)}</h1>",
            _paragraph(_INTRO),
            _paragraph(f"{count} {docs.versions(environment)}."),
            f"<nav>{links}</nav>",
            *parts,
            "</body></html>\n",
        ]
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _cell(value: str, tag: str = "td") -> str:
    return value if isinstance(value, _Markup) else f"<{tag}>{escape(value)}</{tag}>"


def _line(values: Iterable[str], kind: str = "", tag: str = "td") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<tr{attribute}>{''.join(_cell(value, tag) for value in values)}</tr>"


def _table(headings: Iterable[str], body: Iterable[str], caption: str = "", kind: str = "") -> str:
    """A table of lines that are HTML, which scrolls sideways on a narrow screen."""
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = f"<thead>{_line(headings, tag='th')}</thead>"
    text = "\n".join(body)
    return f'<div class="wide"><table class="{kind}">{above}{head}\n<tbody>{text}</tbody></table></div>'


def _text(value: str) -> _Markup:
    """A cell of words."""
    return _Markup(f'<td class="text">{escape(value)}</td>')


def _small(value: str, below: str, cell: str = "", kind: str = "") -> _Markup:
    """A cell with a second, smaller line."""
    return _Markup(f'<td class="{cell}"><span class="{kind}">{escape(value)}</span><small>{escape(below)}</small></td>')


def _ratio(slow: Row, fast: Row) -> float:
    """The first's time over the second's, round by round."""
    return paired(slow.visits, fast.visits)


def _about(row: Row) -> str:
    return f"{row.mode}, {row.dtype}, {row.cache}"


def _described(op: str) -> str:
    """What an op is, in the words of its file; nothing outside a checkout."""
    try:
        return " ".join((load(op).__doc__ or "").split())
    except (FileNotFoundError, ValueError):
        return ""


def _summary(rows: Sequence[Row]) -> str:
    body = []
    for of_op in grouped(rows, "op"):
        op = of_op[0].op
        body.append(f'<tr><th colspan="8"><b>{escape(op)}</b> {escape(_described(op))}</th></tr>')
        for of_case in grouped(of_op, "mode", "shape", "dtype", "device"):
            kinds = cases(of_case)
            if all(row.median_us is None and row.status.startswith(OK) for row in of_case):
                continue  # memory alone
            body.append(_summary_line(next((case for case in kinds if case[0].cache == "cold"), kinds[0])))
    headings = ("case", "our fastest", "time", "torch.compile takes", "others take", "floor / time", "peak", "error")
    return _table(headings, body, kind="summary")


def _summary_line(case: Sequence[Row]) -> str:
    peers = [row for row in case if row.error is not None]
    best = fastest(row for row in peers if ours(row.peer))
    if best is None:
        return _line([_small(case[0].shape, _about(case[0])), _text("not timed"), *6 * [""]])
    rivals = [row for row in peers if not ours(row.peer)]
    compiled = fastest(row for row in rivals if "torch.compile" in row.peer)
    other = fastest(row for row in rivals if "torch.compile" not in row.peer)
    texts: list[str] = [_small(best.shape, _about(best)), _text(best.peer)]
    shown = dict(zip(HEADINGS, line(best, case), strict=True))
    texts.append(_small(shown["median"], shown["spread"]))
    for rival in (compiled, other):
        if rival is None:
            texts.append("")
            continue
        ratio = _ratio(rival, best)
        texts.append(_small(f"{ratio:.2f} x", rival.peer, "rival", "won" if ratio > 1.02 else "lost" if ratio < 0.98 else ""))
    texts += [_share(floor(case), best), shown["peak"], shown["error"]]
    return _line(texts)


def _share(least: Row | None, best: Row) -> str:
    if least is None:
        return ""
    share = 100 * _ratio(least, best)
    name = {COPY: "copy", MATMUL: "product"}[least.peer]
    if dtype_of(best.peer, best.dtype) != least.dtype:
        name += f" in {least.dtype}"
    return _Markup(f'<td class="share" style="--share: {min(share, 100):.0f}%">{share:.0f} %<small>{escape(name)}</small></td>')


def _machine(environment: dict[str, Any]) -> str:
    """Machine, versions and choices as a table, and which implementation each op took."""
    native = environment["native"]
    cuda = environment["cuda"] or {}
    lines = [
        ("machine", docs.machine(environment)),
        ("processor", f"{environment['cpu']}, {environment['capability']}"),
        ("versions", docs.versions(environment)),
        ("native library", ", ".join(f"{k} {v}" for k, v in native.items()) if isinstance(native, dict) else str(native)),
    ]
    if cuda:
        named = lambda clocks: ", ".join(f"{k} {v}" for k, v in (clocks or {}).items()) or "unknown"
        lines += [
            ("GPU", f"capability {cuda['capability']}, {cuda['multiprocessors']} multiprocessors, CUDA {cuda['runtime']}"),
            ("before the first row", named(cuda["before"])),
            ("after the last row", named(environment["after"]["clocks"])),
        ]
    chosen = ", ".join(f"{op}: {choice}" for op, choice in environment["implementations"].items())
    body = [_line([name, _text(text)]) for name, text in [*lines, ("implementations", chosen)]]
    return _table(("what", "value"), body, kind="words")


def _figure(figure: plots.Figure) -> str:
    data = base64.b64encode(figure.path.read_bytes()).decode()
    image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{escape(figure.caption)}</figcaption></figure>"


def _claims(rows: Sequence[Row]) -> list[str]:
    """The published ratios, a line per ratio and case that it is about; nothing outside a checkout."""
    found, verdicts = [], []
    for of_op in grouped(rows, "op"):
        try:
            asked = getattr(load(of_op[0].op), "CLAIMS", ())
        except (FileNotFoundError, ValueError):
            continue
        body = []
        for claim in asked:
            for case in cases(of_op):
                for _, ratio in ratios(case, (claim,)):
                    holds = ratio is not None and claim.holds(ratio)
                    kind, verdict = ("", "not measured") if ratio is None else ("won", "holds") if holds else ("lost", "missed")
                    verdicts.append(verdict)
                    number = "" if ratio is None else f"{ratio:.2f}"
                    name = _small(f"{claim.slow} / {claim.fast}", claim.bound)
                    body.append(
                        _line([name, _small(case[0].shape, _about(case[0]), "text"), number, _small(verdict, "", "", kind)])
                    )
        if body:
            found.append(_table(("ratio of times", "case", "measured", ""), body, of_op[0].op, "claims"))
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))
    text = "Ratios that the project has published, with their bounds, in the cases that they are about"
    return [_paragraph(f"{text}: {counts}."), *found] if found else []


def _tables(rows: Sequence[Row]) -> list[str]:
    found = []
    for of_op in grouped(rows, "op"):
        found.append(f"<h3>{escape(of_op[0].op)}</h3>")
        for case in cases(of_op):
            headings, *lines = cells(case)
            body = []
            for row, texts in zip(case, lines, strict=True):
                kind = "ours" if ours(row.peer) else "ceiling" if row.status == OK and row.error is None else ""
                if row.median_us is None and not row.status.startswith(OK):
                    text = _Markup(f'<td class="text" colspan="{len(headings) - 1}">{escape(row.status)}</td>')
                    body.append(_line([row.peer, text], kind))
                else:
                    body.append(_line(texts, kind))
            found.append(_table(headings, body, title(case[0]), "rows"))
    return found


def _refused(refused: Sequence[Row]) -> str:
    if not refused:
        return _paragraph("No peer was refused: all ran, and all were right to the accuracy asked of them.")
    body = [_line([row.op, *map(_text, (f"{row.shape}, {_about(row)}", row.peer, row.status))]) for row in refused]
    return _table(("op", "case", "peer", "reason"), body, kind="words refused")


if __name__ == "__main__":
    try:
        for argument in sys.argv[1:]:
            print(make(Path(argument)))
    except ValueError as error:
        sys.exit(str(error))
