"""Figures of a run of ``imm bench``, made of its rows.

Throughput beside the ceilings of the same run, a roofline of all ops, memory over M, latency over the batch, and the parts of a
call. A figure is made where there are rows for it. Needs matplotlib (the extra "plots"), imported when something is drawn.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from imm.benchmark.case import COPY, MATMUL
from imm.benchmark.rows import OK, Row, cases, dtype_of, duration, fastest, floor, grouped, ours

PART = "part: "
#: Values that span more are on a logarithmic axis.
_DECADE = 8.0
#: Series in one panel; more are split over several.
MOST = 8
BATCH = ("rows", "images", "batch")
_WIDTH, _PANEL_HEIGHT, _DPI = 9.4, 2.7, 120  # inches, inches, pixels an inch
#: Blues are ours. All others are apart for readers with any common colour blindness (Okabe and Ito), and have other markers.
_OURS = ("#0072b2", "#56b4e9", "#1b2a6b", "#7b8fd4")
_OTHERS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f5f3f", "#6b7280", "#8c8c00", "#8a4fc4")
_OUR_MARKERS, _OTHER_MARKERS = "osDh", "^vXPd<>*"
_LINES = {COPY: {"color": "#444444", "linestyle": "--"}, MATMUL: {"color": "#000000", "linestyle": "-."}}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.titlesize": 10.5,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,  # a peer's name may have a $
}


@dataclass(frozen=True)
class Figure:
    """A picture that was written, what it shows, and one sentence on how to read it."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Look:
    """How a peer is drawn, in every figure alike."""

    color: str
    marker: str
    ours: bool

    def line(self, place: int) -> dict[str, Any]:
        """Arguments of a line with markers. Ours are thick, and thinner one after another; thin ones lie on thick ones, so that
        equal values show."""
        width, size = (max(3.0 - 0.8 * place, 1.2), max(9.0 - 1.5 * place, 4.5)) if self.ours else (1.1, 5.5)
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 3 + 0.1 * place + (not self.ours)}
        return {"color": self.color, "marker": self.marker, "linewidth": width, "markersize": size, **edge}


def looks(groups: Iterable[Iterable[str]], others: Sequence[str] = _OTHERS) -> dict[str, Look]:
    """A look for every name. Within a group colours differ as long as there are enough of them."""
    found: dict[str, Look] = {}
    for group in groups:
        names = list(dict.fromkeys(group))
        for name in names:
            if name in found:
                continue
            colors, markers = (_OURS, _OUR_MARKERS) if ours(name) else (others, _OTHER_MARKERS)
            near = [found[other].color for other in names if other in found]
            color = min(colors, key=near.count)
            earlier = sum(look.color == color for look in found.values())
            found[name] = Look(color, markers[(colors.index(color) + earlier) % len(markers)], ours(name))
    return found


def draw(rows: Sequence[Row], folder: Path) -> list[Figure]:
    """Write the figures that these rows allow into the folder ``plots`` of ``folder``.

    Raises ImportError without matplotlib.
    """
    import matplotlib

    timed = [row for row in rows if row.median_us is not None]
    drawn = [row for row in timed if not _ceiling(row) or row.peer.startswith(PART)]
    look = looks([row.peer for row in of_op] for of_op in grouped(drawn, "op"))
    target = folder / "plots"
    target.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own settings change no figure
        matplotlib.rcParams.update(_STYLE)
        made = [figure for make in (_rooflines, _throughput, _latency, _memory, _parts) for figure in make(timed, look, target)]
    return made


# What rows say.


def _sizes(shape: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", shape)}


def _size_of(name: str) -> Callable[[Sequence[Row]], int]:
    return lambda case: _sizes(case[0].shape)[name]


def _without(shape: str, name: str) -> str:
    return " ".join(part for part in shape.split() if not part.startswith(f"{name}="))


def _ceiling(row: Row) -> bool:
    """Whether a row was timed and not checked, since it does a part of the work only."""
    return row.error is None


def _peers(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not _ceiling(row)]


def _batch(row: Row) -> str | None:
    """The name of the size that says how many images or rows a call takes."""
    return next((name for name in BATCH if name in _sizes(row.shape)), None)


def _where(rows: Sequence[Row]) -> str:
    threads = f", {rows[0].threads} threads" if rows[0].device == "cpu" else ""
    return f"{rows[0].machine}{threads}, commit {rows[0].commit[:10]}"


def _spread(row: Row, value: Callable[[Row, float], float]) -> tuple[float, float, float]:
    """The value at the median, and its least and greatest at the quantiles."""
    assert row.median_us is not None
    assert row.p20_us is not None
    assert row.p80_us is not None
    ends = value(row, row.p20_us), value(row, row.p80_us)
    return value(row, row.median_us), min(ends), max(ends)


def _gb_per_s(row: Row, us: float) -> float:
    return row.bytes / us * 1e-3


def _gflop_per_s(row: Row, us: float) -> float:
    return row.flops / us * 1e-3


def _milliseconds(row: Row, us: float) -> float:
    return us * 1e-3


def _splits(rows: Sequence[Row]) -> list[list[str]]:
    """The peers, ours first, then the others from fast to slow, in panels of at most MOST; from the second panel on our best is
    there for comparison."""
    names = list(dict.fromkeys(row.peer for row in rows))
    own, rest = [name for name in names if ours(name)], [name for name in names if not ours(name)]

    def slowness(name: str) -> float:
        found = sorted(row.ratio_to_copy or 0.0 for row in rows if row.peer == name)
        return found[len(found) // 2]

    rest.sort(key=slowness)
    best = sorted(own, key=lambda name: (-sum(row.peer == name for row in rows), slowness(name)))[:1]
    count = max(1, math.ceil(len(rest) / max(1, MOST - len(own))))
    bounds = [round(i * len(rest) / count) for i in range(count + 1)]
    return [(own if i == 0 else best) + rest[bounds[i] : bounds[i + 1]] for i in range(count)]


def _part(i: int, splits: Sequence[Any]) -> str:
    return f", peers {i + 1} of {len(splits)}" if len(splits) > 1 else ""


# What all figures share.


def _grid(count: int, title: str, y: str, height: float = _PANEL_HEIGHT, *, same_y: bool = True) -> tuple[Any, list[Any]]:
    """A figure of ``count`` panels, two in a row, with ``y`` along the vertical axis; ``same_y``: one axis for all of them."""
    from matplotlib.figure import Figure as Canvas

    columns = min(2, count)
    lines = math.ceil(count / columns)
    width = 0.72 * _WIDTH if columns == 1 and y else _WIDTH  # bars, which have no y, have words at both ends
    figure = Canvas(figsize=(width, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharey=same_y)
    figure.suptitle(textwrap.fill(title, int(11 * width)), x=0.01, ha="left", fontweight="bold")
    for i, axis in enumerate(axes.flat):
        axis.set_ylabel("" if same_y and i % columns else y)
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.remove()
    return figure, flat[:count]


def _scale(axes: Sequence[Any], name: str, values: Sequence[float], *, span: float = _DECADE, ticks: bool = False) -> None:
    """Logarithmic where the values span more than a factor ``span``, otherwise linear and, for y, from 0.

    ticks: one at each value where they are not too near.
    """
    from matplotlib import ticker

    low, high = min(values), max(values)
    logarithmic = low > 0 and high > span * low
    at = sorted(set(values))
    place = [math.log(value) if logarithmic else value for value in at]
    apart = all(b - a > 0.1 * (place[-1] - place[0]) for a, b in pairwise(place))
    for axis in axes:
        one = getattr(axis, f"{name}axis")
        one.set_major_formatter(text := ticker.FuncFormatter(lambda value, _: _number(value)))
        if logarithmic:
            room = (high / low) ** 0.06
            getattr(axis, f"set_{name}scale")("log")
            getattr(axis, f"set_{name}lim")(low / room, high * room)
            steps = ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=30)
            one.set_major_locator(steps if high > 6 * low else ticker.MaxNLocator(5))
            one.set_major_formatter(text)
            one.set_minor_locator(ticker.LogLocator(subs=range(2, 10), numticks=30))
            one.set_minor_formatter(ticker.NullFormatter())
        else:
            room = 0.08 * (high - low) or 0.5 * high or 0.5
            getattr(axis, f"set_{name}lim")(0.0 if name == "y" else low - room, high + room)
            one.set_major_locator(ticker.MaxNLocator(6))
        if ticks and apart:
            one.set_major_locator(ticker.FixedLocator(at))
            one.set_minor_locator(ticker.NullLocator())


def _number(value: float) -> str:
    """At most four digits, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if value == round(value, 1) else f"{value:.3g}"


def _curve(axis: Any, points: Sequence[tuple[float, tuple[float, float, float]]], label: str, look: Look, place: int) -> None:
    """One peer's values with error bars; points: x and (middle, least, greatest)."""
    xs, middles = [x for x, _ in points], [y[0] for _, y in points]
    errors = [[y[0] - y[1] for _, y in points], [y[2] - y[0] for _, y in points]]
    axis.errorbar(xs, middles, errors, label=label, capsize=2.5, elinewidth=0.9, **look.line(place))


def _finish(figure: Any, path: Path, title: str, caption: str, note: str | None = None) -> Figure:
    """Add the legend below the panels, each entry once, with a note above it, and write the file."""
    from matplotlib.container import ErrorbarContainer
    from PIL import Image

    entries: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
    entries = dict(sorted(entries.items(), key=lambda entry: not entry[0].startswith(("ceiling", "floor", "roof"))))
    longest = max(map(len, entries), default=0)
    across = max(1, min(4, int(17 * figure.get_figwidth() / (longest + 10))))
    rows = math.ceil(len(entries) / across)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows + 0.4 + (0.25 if note else 0.0))
    keys = {"title": note, "title_fontproperties": {"style": "italic", "size": 8.5}}
    legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=across, handlelength=2.8, **keys)
    for text in legend.get_texts():
        text.set_fontweight("bold" if ours(text.get_text()) else "normal")
    figure.savefig(drawn := io.BytesIO(), dpi=_DPI)
    # As a palette: half the bytes, and no difference to the eye.
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(dither=Image.Dither.NONE).save(path, optimize=True)
    return Figure(path, title, caption)


def _file(folder: Path, *words: str) -> Path:
    return folder / (re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") + ".png")


# The figures.


def _throughput(rows: Sequence[Row], look: dict[str, Look], folder: Path) -> list[Figure]:
    """Per op and mode: GB/s of what is limited by memory, GFLOP/s of products, over the bytes of the cases."""
    found = []
    for of_mode in grouped([row for row in rows if _batch(row) is None], "op", "mode"):
        for products in (False, True):
            chosen = [case for case in cases(of_mode) if products == any(row.peer == MATMUL for row in case)]
            if any(_peers(case) for case in chosen):
                found.append(_throughput_figure(chosen, look, folder, products))
    return found


def _throughput_figure(chosen: Sequence[list[Row]], look: dict[str, Look], folder: Path, products: bool) -> Figure:
    value, unit = (_gflop_per_s, "GFLOP/s") if products else (_gb_per_s, "GB/s")
    first = chosen[0][0]
    shapes = {row.shape: (row.bytes, row.flops) for case in chosen for row in case}
    letters = {shape: chr(ord("a") + i) for i, shape in enumerate(sorted(shapes, key=lambda shape: shapes[shape]))}
    panels = []
    for dtype in dict.fromkeys(case[0].dtype for case in chosen):
        of_dtype = [case for case in chosen if case[0].dtype == dtype]
        splits = _splits([row for case in of_dtype for row in _peers(case)])
        caches = dict.fromkeys(case[0].cache for case in of_dtype)
        for (i, split), cache in product(enumerate(splits), caches):
            panels.append((f"{dtype}, {cache} buffers{_part(i, splits)}", [c for c in of_dtype if c[0].cache == cache], split))
    title = f"{first.op}, {first.mode}: {unit} ({_where(chosen[0])})"
    figure, axes = _grid(len(panels), title, f"throughput ({unit})")
    ys: list[float] = []
    for axis, (heading, of_panel, split) in zip(axes, panels, strict=True):
        axis.set_title(heading, loc="left", pad=15)
        ordered = sorted(of_panel, key=lambda case: (case[0].bytes, case[0].flops))
        places = _apart([case[0].bytes * 1e-6 for case in ordered])
        at = {case[0].shape: place for case, place in zip(ordered, places, strict=True)}
        binding = {least.peer for case in ordered if (least := floor(case)) is not None}
        for name in [MATMUL, *({COPY} & binding)] if products else [COPY]:
            points = _broken([row for case in ordered for row in case if row.peer == name], at, value)
            middles = [y[0] for _, y in points]
            single = len(points) > len(places) or len(places) == 1  # a point with no line to it
            alone = {"marker": "_", "markersize": 11, "markeredgewidth": 1.6} if single else {}
            style = {"linewidth": 1.6, "zorder": 2.5, **alone, **_LINES[name]}
            axis.plot([x for x, _ in points], middles, label=f"ceiling: {name}", **style)
            ys += middles
        for place, name in enumerate(split):
            points = _broken([row for case in ordered for row in case if row.peer == name], at, value)
            _curve(axis, points, name, look[name], place)
            ys += [y for _, three in points for y in three]
        axis.set_xlabel("bytes that the case must move (MB)")
        _scale([axis], "x", places, ticks=True)
        for shape, x in at.items():
            style = {"ha": "center", "fontsize": 8.5, "fontstyle": "italic", "color": "#444444"}
            axis.annotate(letters[shape], (x, 1.0), (0, 2), axis.get_xaxis_transform(), "offset points", **style)
    _scale(axes, "y", [y for y in ys if not math.isnan(y)])
    key = ";  ".join(f"{letter}: {shape}" for shape, letter in letters.items())
    line, ceiling = ("dashed", "a plain copy of as many bytes")
    if products:
        line, ceiling = ("dashed and dotted", "one product of as many flops")
    caption = (
        f"Higher is better, the {line} line is what this machine reached beside the peers with {ceiling}; bars run from the "
        "20 % to the 80 % quantile of the calls, and the letters above a panel name the cases, those of one size side by side."
    )
    return _finish(figure, _file(folder, "throughput", first.op, first.mode, unit.partition("/")[0]), title, caption, key)


def _apart(values: Sequence[float]) -> list[float]:
    """Sorted values as places on an axis: nearly equal ones side by side."""
    logarithmic = values[0] > 0 and values[-1] > _DECADE * values[0]
    scaled = [math.log(value) if logarithmic else value for value in values]
    least = 0.04 * (scaled[-1] - scaled[0] or 0.1 * scaled[0])
    found: list[float] = []
    for value in scaled:
        found.append(max(value, found[-1] + least) if found else value)
    return [math.exp(place) if logarithmic else place for place in found]


def _broken(
    rows: Sequence[Row], at: dict[str, float], value: Callable[[Row, float], float]
) -> list[tuple[float, tuple[float, float, float]]]:
    """Points of a curve, which breaks between cases of the same size: nothing lies between those."""
    found: list[tuple[float, tuple[float, float, float]]] = []
    for i, row in enumerate(rows):
        if i and row.bytes < 1.01 * rows[i - 1].bytes:
            found.append((math.nan, (math.nan, math.nan, math.nan)))
        found.append((at[row.shape], _spread(row, value)))
    return found


def _rooflines(rows: Sequence[Row], look: dict[str, Look], folder: Path) -> list[Figure]:
    """Arithmetic intensity against GFLOP/s, a panel per dtype: our best peer of every case under the run's own ceilings."""
    chosen = [best for case in cases(rows) if case[0].flops and (best := fastest(_own(case)))]
    if not chosen:
        return []
    colors = looks([dict.fromkeys(best.op for best in chosen)], _OTHERS + _OURS[:2])
    panels = list(dict.fromkeys(dtype_of(best.peer, best.dtype) for best in chosen))
    title = f"Roofline: our fastest peer of every case ({_where(chosen)})"
    figure, axes = _grid(len(panels), title, "GFLOP/s", 3.9)
    reach = [best.flops / best.bytes for best in chosen]
    low, high = min(reach) / 1.6, max(reach) * 1.6
    heights = []
    for axis, dtype in zip(axes, panels, strict=True):
        lines = [dtype]
        for cache in sorted({best.cache for best in chosen if dtype_of(best.peer, best.dtype) == dtype}):
            ceilings = [row for row in rows if row.cache == cache and _ceiling(row)]
            bandwidth = max((row.gb_per_s or 0.0 for row in ceilings if row.peer == COPY), default=0.0)
            peak = max((row.gflop_per_s or 0.0 for row in ceilings if row.peer == MATMUL and row.dtype == dtype), default=0.0)
            if not bandwidth:
                continue
            ridge = peak / bandwidth if peak else high
            bend = [x for x in (low, ridge, high) if low <= x <= high]
            roof = [min(bandwidth * x, peak or math.inf) for x in bend]
            style = {"color": "#444444", "linestyle": "-" if cache == "cold" else "--", "linewidth": 1.5, "zorder": 2}
            points = "full" if cache == "cold" else "hollow"
            axis.plot(bend, roof, label=f"roof with {cache} buffers ({points} points)", **style)
            heights += roof
            product_text = f", product {peak:,.0f} GFLOP/s" if peak else ""
            lines.append(f"{cache}: copy {bandwidth:,.0f} GB/s{product_text}")
        axis.set_title("\n".join(lines), loc="left")
        for best in (best for best in chosen if dtype_of(best.peer, best.dtype) == dtype):
            y = _spread(best, _gflop_per_s)
            drawn = colors[best.op]
            ends = [[y[0] - y[1]], [y[2] - y[0]]]
            style = {"color": drawn.color, "marker": drawn.marker, "markersize": 7, "linestyle": "none", "zorder": 3}
            fill = drawn.color if best.cache == "cold" else "white"
            axis.errorbar([best.flops / best.bytes], [y[0]], ends, capsize=2, elinewidth=0.8, markerfacecolor=fill, **style)
            axis.plot([], [], label=best.op, **style)
            heights += list(y)
        axis.set_xlabel("arithmetic intensity (flop/byte)")
    _scale(axes, "x", [low, high])
    _scale(axes, "y", heights)
    caption = (
        "A point on the slope runs at the speed of the fastest copy of this run and one on the flat part at that of its "
        "fastest product, full points with cold buffers under the full line, hollow ones with warm buffers under the "
        "dashed line; what is far below either is limited by something else, such as exponentials or calls."
    )
    return [_finish(figure, _file(folder, "roofline"), title, caption)]


def _own(case: Sequence[Row]) -> list[Row]:
    return [row for row in _peers(case) if ours(row.peer)]


def _latency(rows: Sequence[Row], look: dict[str, Look], folder: Path) -> list[Figure]:
    """Per op with a batch: time of a call over images or rows and over steps, with the floor of each case."""
    found = []
    for of_mode in grouped([row for row in rows if _batch(row) is not None], "op", "mode"):
        panels = []
        for name in (_batch(of_mode[0]) or "", "steps"):
            by_rest: dict[tuple[str, str, str], list[list[Row]]] = {}
            for case in cases(of_mode):
                if name in _sizes(case[0].shape):
                    by_rest.setdefault((_without(case[0].shape, name), case[0].dtype, case[0].cache), []).append(case)
            for (text, dtype, cache), along in by_rest.items():
                if len(along) > 1:
                    along.sort(key=_size_of(name))
                    splits = _splits([row for case in along for row in _peers(case)])
                    heading = f"{text}, {dtype}, {cache} buffers"
                    panels += [(name, heading + _part(i, splits), along, split) for i, split in enumerate(splits)]
        if panels:
            found.append(_latency_figure(panels, look, folder))
    return found


def _latency_figure(
    panels: Sequence[tuple[str, str, list[list[Row]], list[str]]], look: dict[str, Look], folder: Path
) -> Figure:
    first = panels[0][2][0][0]
    title = f"{first.op}, {first.mode}: time of a call ({_where(panels[0][2][0])})"
    figure, axes = _grid(len(panels), title, "time of a call (ms)", same_y=False)
    for axis, (name, heading, along, split) in zip(axes, panels, strict=True):
        at = lambda row, name=name: _sizes(row.shape)[name]
        xs, ys = [at(case[0]) for case in along], []
        least = [(at(row), row.median_us * 1e-3) for case in along if (row := floor(case)) is not None and row.median_us]
        if least:
            axis.plot(*zip(*least, strict=True), label="floor: slower of copy and product", linewidth=1.8, **_LINES[COPY])
            ys += [y for _, y in least]
        others = [row for case in along for row in case if _ceiling(row) and row.peer not in (COPY, MATMUL)]
        for bound in grouped([row for row in others if not row.peer.startswith(PART)], "peer"):
            points = [(at(row), (row.median_us or math.nan) * 1e-3) for row in bound]
            axis.plot(
                *zip(*points, strict=True), label=bound[0].peer, color="#888888", linestyle=":", linewidth=1.8, marker="."
            )
            ys += [y for _, y in points]
        for place, peer in enumerate(split):
            points_of = [(at(row), _spread(row, _milliseconds)) for case in along for row in case if row.peer == peer]
            _curve(axis, points_of, peer, look[peer], place)
            ys += [y for _, three in points_of for y in three]
        axis.set_title(heading, loc="left")
        axis.set_xlabel(f"{name} of a call")
        _scale([axis], "x", xs, span=1.5, ticks=True)
        _scale([axis], "y", ys, span=1.5)
    caption = (
        "Lower is better, and the dashed line is the slower of a copy of as many bytes and a product of as many flops, "
        "in the dtype of the panel and timed in the same run (a peer in 16 bits may pass below one in float32); bars run from "
        "the 20 % to the 80 % quantile of the calls."
    )
    return _finish(figure, _file(folder, "latency", first.op, first.mode), title, caption)


def _memory(rows: Sequence[Row], look: dict[str, Look], folder: Path) -> list[Figure]:
    """Per op on groups of particles: peak bytes of each peer over M, in multiples of the bytes of its inputs."""
    found = []
    for of_op in grouped([row for row in rows if {"G", "M", "D"} <= set(_sizes(row.shape))], "op", "mode"):
        kept = grouped([row for row in of_op if row.peak_bytes], "dtype", "shape", "peer")
        once = [of_cache[0] for of_cache in kept]  # the buffers' kind changes no memory
        if len({_sizes(row.shape)["M"] for row in once}) < 2:
            continue
        panels = []
        for of_dtype in grouped(once, "dtype"):
            splits = _splits(of_dtype)
            panels += [(of_dtype[0].dtype + _part(i, splits), of_dtype, split) for i, split in enumerate(splits)]
        first = once[0]
        title = f"{first.op}, {first.mode}: peak memory of a call ({_where(once)})"
        figure, axes = _grid(len(panels), title, "peak bytes / bytes of the inputs", 3.1)
        values: list[float] = []
        for axis, (heading, of_dtype, split) in zip(axes, panels, strict=True):
            ordered = sorted(of_dtype, key=lambda row: (_sizes(row.shape)["M"], row.bytes))
            least = {_sizes(row.shape)["M"]: row.bytes / _input_bytes(row) for row in ordered}
            band = {"color": "#c8c8c8", "linewidth": 8, "solid_capstyle": "butt", "zorder": 1.5}  # seen behind a line on it
            axis.plot(*zip(*least.items(), strict=True), label="floor: inputs and results", **band)
            for place, peer in enumerate(split):
                there = [row for row in ordered if row.peer == peer]
                ys = [(row.peak_bytes or 0) / _input_bytes(row) for row in there]
                axis.plot([_sizes(row.shape)["M"] for row in there], ys, label=peer, **look[peer].line(place))
                values += ys
            values += least.values()
            axis.set_title(heading, loc="left")
            axis.set_xlabel("M (particles in a group)")
            _scale(axes, "x", [_sizes(row.shape)["M"] for row in once], ticks=True)
        _scale(axes, "y", values)
        caption = (
            "Lower is better, and the grey band is what holds the inputs and the results and nothing else; peak bytes are "
            "inputs, what a peer keeps between calls and the most that one call allocates."
        )
        found.append(_finish(figure, _file(folder, "memory", first.op, first.mode), title, caption))
    return found


def _input_bytes(row: Row) -> int:
    """What the case must move less what it writes: the gradient [G, M, D] and the loss [G] in float32."""
    sizes = _sizes(row.shape)
    element = getattr(torch, row.dtype).itemsize
    return row.bytes - element * sizes["G"] * sizes["M"] * sizes["D"] - 4 * sizes["G"]


def _parts(rows: Sequence[Row], look: dict[str, Look], folder: Path) -> list[Figure]:
    """Per op whose parts were timed: each part as a share of the whole call, a bar per case."""
    found = []
    for of_mode in grouped([row for row in rows if row.status == OK], "op", "mode"):
        bars = []
        for case in cases(of_mode):
            parts = [row for row in case if row.peer.startswith(PART)]
            total = sum(row.median_us or 0.0 for row in parts)
            # The parts are those of one of our peers; which, the rows do not say: the one whose time is nearest to their sum.
            whole = min(_own(case), key=lambda row: abs((row.median_us or 0.0) - total), default=None)
            if parts and whole is not None:
                bars.append((case[0], parts, whole))
        if bars:
            found.append(_parts_figure(bars, look, folder))
    return found


def _dark(color: str) -> bool:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return 0.3 * red + 0.59 * green + 0.11 * blue < 130


def _parts_figure(bars: Sequence[tuple[Row, list[Row], Row]], look: dict[str, Look], folder: Path) -> Figure:
    first = bars[0][0]
    title = f"{first.op}, {first.mode}: parts of a call, each timed alone ({_where([first])})"
    figure, (axis,) = _grid(1, title, "", 1.0 + 0.5 * len(bars))
    named = set()
    for y, (_, parts, whole) in enumerate(bars):
        full, left = whole.median_us or math.nan, 0.0
        for part in parts:
            share = 100 * (part.median_us or 0.0) / full
            name = part.peer.removeprefix(PART)
            label = None if name in named else name
            named.add(name)
            axis.barh(y, share, 0.62, left, color=look[part.peer].color, edgecolor="white", linewidth=0.6, label=label)
            if share > 8:
                ink = "white" if _dark(look[part.peer].color) else "black"
                axis.text(left + share / 2, y, duration(part.median_us), ha="center", va="center", color=ink, fontsize=8.5)
            left += share
        _, low, high = _spread(whole, _milliseconds)
        ends = [[100 - 1e5 * low / full], [1e5 * high / full - 100]]
        label = "whole call, 20 % to 80 % quantile" if y == len(bars) - 1 else None
        axis.errorbar([100], [y], xerr=ends, color="black", marker="|", markersize=19, capsize=3, elinewidth=1.1, label=label)
        text = f"{duration(full)}  {whole.peer}"
        axis.annotate(text, (1.0, y), (8, 0), axis.get_yaxis_transform(), "offset points", va="center", fontsize=8.5)
    dtypes = {row.dtype for row, _, _ in bars}
    axis.set_yticks(range(len(bars)), [f"{row.shape}\n{row.dtype}" if len(dtypes) > 1 else row.shape for row, _, _ in bars])
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlim(left=0.0)
    axis.set_xlabel("share of the whole call (%)")
    caption = (
        "A bar is the parts of one call side by side, each timed alone with data of its own, and the mark at 100 % is the "
        "whole call, whose time is on the right; what is missing from 100 % is the cost of putting the parts together."
    )
    return _finish(figure, _file(folder, "parts", first.op, first.mode), title, caption)
