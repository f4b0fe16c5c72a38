"""Figures of a run of ``imm bench``: the times of every op beside the ceilings of the same run.

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
from harness.rows import Row, cases, compared, first_cases, grouped, ours

_OURS, _OTHERS, _PARTS = "#0072b2", "#d98b5f", "#b0b0b0"
_CEILINGS = {COPY: "--", MATMUL: "-."}
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
        return [_times(of_mode, target) for of_mode in grouped(timed, "op", "mode")]


def overview(rows: Sequence[Row], path: Path) -> None:
    """One picture of a run: for the first case of each op and mode, how many times as long as ours the fastest plain and the
    fastest compiled baseline take, and the roofline of the same run. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        chosen = [entry for entry in map(compared, first_cases(rows)) if entry is not None]
        figure = Canvas(figsize=(9.4, 0.42 * len(chosen) + 1.2), layout="constrained")
        axis = figure.subplots()
        kinds = (("roofline", "#333333"), ("torch.compile", _PARTS), ("eager torch", _OTHERS))
        for index, entry in enumerate(chosen):
            axis.scatter([1], [index], color=_OURS, s=70, zorder=3, label="imm" if index == 0 else None)
            for (name, color), ratio in zip(kinds, entry.ratios, strict=True):
                if ratio is not None:
                    shown = name if name not in axis.get_legend_handles_labels()[1] else None
                    mark = "|" if name == "roofline" else "o"
                    axis.scatter(
                        [max(ratio, 0.09)],
                        [index],
                        color=color,
                        s=120 if mark == "|" else 45,
                        marker=mark,
                        zorder=2,
                        label=shown,
                    )
        axis.set_xscale("log")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
        axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(0.08, 60)
        names = [f"{entry.best.op}, {entry.best.mode}, {entry.best.dtype}" for entry in chosen]
        axis.set_yticks(range(len(chosen)), names)
        axis.set_ylim(len(chosen) - 0.4, -0.6)
        axis.set_xlabel("time relative to imm: right of 1x is slower, left of it faster")
        axis.legend(loc="lower right", frameon=True)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None}, facecolor="white")


def _times(rows: Sequence[Row], folder: Path) -> Figure:
    """The peers of every case of an op and mode as bars, with lines at the ceilings; of both kinds of buffers the cold."""
    from matplotlib.figure import Figure as Canvas

    both = [cases(of_shape) for of_shape in grouped(rows, "shape", "dtype")]
    chosen = [next((case for case in of_shape if case[0].cache == "cold"), of_shape[0]) for of_shape in both]
    first, bars = chosen[0][0], [[row for row in case if row.peer not in _CEILINGS] for case in chosen]
    threads = f", {first.threads} threads" if first.device == "cpu" else ""
    title = f"{first.op}, {first.mode}: time of a call ({first.machine}{threads}, commit {first.commit[:10]})"
    heights = [0.75 + 0.22 * len(case) for case in bars]
    figure = Canvas(figsize=(9.4, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
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
    # Without the time and the version, so that the same rows give the same bytes.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    path = folder / f"{re.sub('[^a-z0-9]+', '-', f'times-{first.op}-{first.mode}'.lower())}.png"
    path.write_bytes(buffer.getvalue())
    return Figure(path, title, caption)
