"""Figures of a run of ``imm bench``: the times of every op beside the ceilings of the same run, and a roofline.

Needs matplotlib (the extra "plots"), imported when something is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.case import COPY, MATMUL
from harness.rows import Row, cases, fastest, grouped, ours

_OURS, _OTHERS, _PARTS = "#0072b2", "#d98b5f", "#b0b0b0"
_CEILINGS = {COPY: "--", MATMUL: "-."}
#: Apart for readers with any common colour blindness (Okabe and Ito).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5f3f", "#6b7280", "#8a4fc4")
_STYLE: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 9, "axes.grid": True, "axes.axisbelow": True}
_STYLE |= {"grid.color": "#dddddd", "legend.frameon": False, "text.parse_math": False}  # a peer's name may have a $


@dataclass(frozen=True)
class Figure:
    """A picture that was written, what it shows, and one sentence on how to read it."""

    path: Path
    title: str
    caption: str


def draw(rows: Sequence[Row], folder: Path) -> list[Figure]:
    """Write the figures of these rows into the folder ``plots`` of ``folder``. Raises ImportError without matplotlib."""
    import matplotlib

    timed = [row for row in rows if row.median_us is not None]
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own settings change no figure
        matplotlib.rcParams.update(_STYLE)
        return [*_roofline(timed, target), *(_times(of_mode, target) for of_mode in grouped(timed, "op", "mode"))]


def _canvas(heights: Sequence[float], title: str, row: Row, width: float) -> tuple[Any, list[Any], str]:
    """A figure with a panel for each height (in inches), one below the other, and its title, which says where a row is from."""
    from matplotlib.figure import Figure as Canvas

    threads = f", {row.threads} threads" if row.device == "cpu" else ""
    title = f"{title} ({row.machine}{threads}, commit {row.commit[:10]})"
    figure = Canvas(figsize=(width, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, list(axes.flat), title


def _saved(figure: Any, folder: Path, name: str, title: str, caption: str) -> Figure:
    """Written without the time and the version, so that the same rows give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    path = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
    path.write_bytes(buffer.getvalue())
    return Figure(path, title, caption)


def _times(rows: Sequence[Row], folder: Path) -> Figure:
    """The peers of every case of an op and mode as bars, with lines at the ceilings; of both kinds of buffers the cold."""
    both = [cases(of_shape) for of_shape in grouped(rows, "shape", "dtype")]
    chosen = [next((case for case in of_shape if case[0].cache == "cold"), of_shape[0]) for of_shape in both]
    first, bars = chosen[0][0], [[row for row in case if row.peer not in _CEILINGS] for case in chosen]
    heights = [0.75 + 0.22 * len(case) for case in bars]
    figure, axes, title = _canvas(heights, f"{first.op}, {first.mode}: time of a call", first, 9.4)
    for axis, case, drawn in zip(axes, chosen, bars, strict=True):
        axis.set_title(f"{case[0].shape}, {case[0].dtype}, {case[0].cache} buffers", loc="left")
        for y, row in enumerate(drawn):
            low, median, high = (1e-3 * (us or 0.0) for us in (row.p20_us, row.median_us, row.p80_us))
            color = _OURS if ours(row.peer) else _OTHERS if row.whole else _PARTS
            ends = [[median - low], [high - median]]
            axis.barh(y, median, 0.7, color=color, xerr=ends, error_kw={"elinewidth": 0.9, "capsize": 2})
        for row in case:
            if row.peer in _CEILINGS:
                axis.axvline(1e-3 * (row.median_us or 0.0), color="#333333", linestyle=_CEILINGS[row.peer], linewidth=1.4)
        axis.set_yticks(range(len(drawn)), [row.peer for row in drawn])
        axis.set_ylim(len(drawn) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
    axes[-1].set_xlabel("time of a call (ms)")
    caption = (
        "Shorter is better: ours are blue, other ways orange, what does a part of the work grey. The dashed line is a copy of "
        "as many bytes, the other one product of as many flops; bars end at the median, whiskers at the 20 and 80 % quantiles."
    )
    return _saved(figure, folder, f"times-{first.op}-{first.mode}", title, caption)


def _roofline(rows: Sequence[Row], folder: Path) -> list[Figure]:
    """Arithmetic intensity against GFLOP/s, a panel per dtype: our best peer of every case under the run's own ceilings."""
    best = [found for case in cases(rows) if (found := fastest(r for r in case if r.whole and ours(r.peer) and r.flops))]
    if not best:
        return []
    colors = dict(zip(dict.fromkeys(row.op for row in best), [*_COLORS, *_COLORS], strict=False))
    panels = grouped(best, "dtype")
    figure, axes, title = _canvas([3.6] * len(panels), "Roofline: our fastest peer of every case", best[0], 7.5)
    xs = sorted(row.flops / row.bytes for row in best)
    for axis, points in zip(axes, panels, strict=True):
        for cache, line, fill in (("cold", "-", "full"), ("warm", "--", "none")):
            ceilings = [row for row in rows if row.cache == cache and row.dtype == points[0].dtype and not row.whole]
            bandwidth = max((row.gb_per_s or 0.0 for row in ceilings), default=0.0)
            peak = max((row.gflop_per_s or 0.0 for row in ceilings), default=0.0)
            label = f"{cache}: copy {bandwidth:,.0f} GB/s, product {peak:,.0f} GFLOP/s"
            axis.plot(xs, [min(bandwidth * x, peak or bandwidth * x) for x in xs], line, color="#444444", label=label)
            for of_op in grouped([row for row in points if row.cache == cache], "op"):
                where = zip(*((row.flops / row.bytes, row.flops / (row.median_us or 1.0) * 1e-3) for row in of_op), strict=True)
                label = f"{of_op[0].op}, {cache}"
                axis.plot(*where, "o", color=colors[of_op[0].op], fillstyle=fill, label=label)
        axis.set(title=points[0].dtype, xscale="log", yscale="log", ylabel="GFLOP/s", xlabel="arithmetic intensity (flop/byte)")
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter("{x:g}")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    caption = (
        "On the slope of its line a point is as fast as the fastest copy of this run, on the flat part as its fastest product."
    )
    return [_saved(figure, folder, "roofline", title, caption)]
