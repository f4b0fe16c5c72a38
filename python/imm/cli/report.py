"""``imm report``: one self-contained page of a training run, which ``imm demo`` writes of its own too."""

from __future__ import annotations

import base64
import datetime
import html
import io
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from imm.checkpoints import CheckpointError
from imm.cli.options import writable_file
from imm.files import write_text
from imm.training.state import read_settings, states_in
from imm.training.stats import STATS_FILE, read_rows
from imm.training.watch import SAMPLES, SCORES_FILE, best_of, in_steps
from imm.version import __version__

ENVIRONMENT_FILE = "environment.json"
#: Pictures of samples on a page, evenly chosen from the first to the last.
_PICTURES = 8
_CSS = """
:root { color-scheme: light dark; --line: #8885; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; }
th, td { padding: .25rem 1rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.settings td { text-align: left; } .settings td + td { white-space: normal; overflow-wrap: anywhere; }
figure { margin: 0 0 1.5rem; } img { max-width: 100%; } img.curves { background: #fff; min-width: 52rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.verdict { font-weight: 600; } pre { overflow-x: auto; font-size: .85rem; } small { opacity: .75; }
"""
_CURVES = """Loss times M compares runs with unlike M. Matched share: how much of the gradient comes from pairs of one image and
noise; at 1 the loss is a consistency loss. Share of the time: what a step was spent on."""


def run(folder: str, out: str | None) -> None:
    """Run ``imm report``; the arguments are its options."""
    root = Path(folder)
    target = root / "report.html" if out is None else writable_file(out)
    if not read_rows(root / STATS_FILE):
        raise ValueError(f"RUN: expected the folder of a training run, with rows in {STATS_FILE}, got {folder}")
    write_text(target, page(f"Training run {root.resolve().name}", root))
    if not has_matplotlib():
        click.echo("note: no curves, matplotlib is not installed (the extra plots)")
    click.echo(f"wrote {target}")


def write_environment(folder: Path, device: str, processes: int) -> None:
    """Note in a run's folder what runs it now: versions, device, command."""
    found = {
        "command": shlex.join(sys.argv),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "imm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device,
        "processes": processes,
    }
    write_text(folder / ENVIRONMENT_FILE, json.dumps(found, indent=2) + "\n")


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def page(title: str, folder: Path, lead: str = "") -> str:
    """The page of the run in a folder. lead: HTML that comes first."""
    rows, scores = read_rows(folder / STATS_FILE), read_rows(folder / SCORES_FILE)
    settings = _settings(folder)
    environment = _json(folder / ENVIRONMENT_FILE)
    changes = settings.pop("changes", [])
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(_summary(rows, settings))}</p>",
        lead,
        _curves(rows, scores),
        _samples(folder),
        _scores(scores, best_of(folder)),
        _table("Settings", settings),
        "".join(f"<p>Changed {html.escape(line)}.</p>" for line in changes),
        _table("Environment", environment),
    ]
    return document(title, "\n".join(part for part in parts if part))


def document(title: str, body: str) -> str:
    """A whole page around its body."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_CSS}</style></head><body>\n'
        f"{body}\n</body></html>\n"
    )


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells as an HTML table that scrolls where it is too wide."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{row(header, "th")}{"".join(row(line, "td") for line in lines)}</table></div>'


def image(data: bytes, text: str, css: str = "") -> str:
    """A PNG within the page."""
    code = base64.b64encode(data).decode()
    return f'<img class="{css}" alt="{html.escape(text)}" src="data:image/png;base64,{code}">'


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = read_settings(states_in(folder)[-1])
    except (CheckpointError, IndexError):  # a run that has saved no state
        return {}
    return {**found["settings"], "changes": found.get("changes", [])}


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _summary(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    if not rows:
        return "No row of statistics yet."
    last, seconds = rows[-1], sum(row["seconds"] for row in rows)
    speed = statistics.median(row["images_per_second"] for row in rows)
    words = [f"{last['step']:,} steps, {last['images']:,} images in {seconds / 60:,.1f} minutes", f"{speed:,.0f} images/s"]
    shares = [row["mfu"] for row in rows if row.get("mfu") is not None]
    if shares:
        words.append(f"{statistics.median(shares):.0%} of the device's matmul rate")
    if "network" in settings:
        words.append(f"network {settings['network']['name']}, data {settings['data']['source']}")
    return "; ".join(words) + "."


def _curves(rows: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    if not has_matplotlib():
        return "<h2>Curves</h2><p>No curves: matplotlib is not installed.</p>"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.4), constrained_layout=True)
    steps = [row["step"] for row in rows]

    def line(axis: Any, label: str, values: Sequence[Any], **style: Any) -> None:
        axis.plot(steps, [float("nan") if value is None else value for value in values], label=label, linewidth=1.2, **style)

    loss, norm, bins, share, time, scored = axes.flat
    line(loss, "loss x M", [row.get("loss_times_m", row.get("loss")) for row in rows])
    line(norm, "|grad|", [row.get("grad_norm") for row in rows])
    for i in range(max(len(row.get("t_bin_loss", [])) for row in rows)):
        line(bins, f"t in bin {i + 1}", [row["t_bin_loss"][i] if "t_bin_loss" in row else None for row in rows])
    line(share, "matched share of the gradient", [row.get("matched_share") for row in rows])
    line(share, "r = s", [row.get("at_s") for row in rows])
    if any("mfu" in row for row in rows):
        line(share, "MFU", [row.get("mfu") for row in rows])
    phases = list(dict.fromkeys(name for row in rows for name in row.get("phases", {})))
    of_phase = [[row.get("phases", {}).get(name, 0.0) / max(row["seconds"], 1e-9) for row in rows] for name in phases]
    if phases:
        time.stackplot(steps, of_phase, labels=phases, alpha=0.8)
    by_steps: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for row in scores:
        name = next(iter(row["metrics"]), None)
        if name is not None:
            by_steps.setdefault((name, row["sampling_steps"]), []).append((row["step"], row["metrics"][name]))
    for (name, count), points in by_steps.items():
        scored.plot(*zip(*points, strict=True), marker="o", linewidth=1.2, label=f"{name}, {in_steps(count)}")
    titles = ("loss times M", "gradient norm", "loss by t", "shares", "share of the time", "score of the average")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set(title=title, xlabel="training step", yscale="log" if axis in (loss, norm, bins) else "linear")
        axis.grid(True, which="both", alpha=0.25)
        if axis in (bins, share, time, scored) and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    if not scores:
        scored.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    pyplot.close(figure)
    shown = image(buffer.getvalue(), "loss, gradient norm, shares, time and scores over training steps", "curves")
    return f"""<h2>Curves</h2>
<figure><div class="wide">{shown}</div><figcaption><small>{_CURVES}</small></figcaption></figure>"""


def _samples(folder: Path) -> str:
    files = sorted(folder.glob(f"{SAMPLES}-*.png"))
    if not files:
        return ""
    count = min(len(files), _PICTURES)
    chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
    figures = "".join(
        f"<figure>{image(path.read_bytes(), f'samples of {path.stem}')}"
        f"<figcaption>step {int(path.stem.rpartition('-')[2]):,}</figcaption></figure>"
        for path in chosen
    )
    note = "The same seeds and classes at every step, from the averaged weights."
    return f'<h2>Samples over time</h2><p>{note}</p><div class="samples">{figures}</div>'


def _scores(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = [
        [
            f"{row['step']:,}" + (" (best)" if best is not None and row["step"] == best["step"] else ""),
            str(row["sampling_steps"]),
            *(f"{row['metrics'][name]:.5g}" if name in row["metrics"] else "" for name in names),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    about = rows[-1]["protocol"]
    note = f"{about['images']['count']:,} samples of the average against {about['reference']['source']}."
    return f"<h2>Scores</h2><p>{html.escape(note)}</p>{table(['step', 'sampling steps', *names, 'seconds'], lines)}"


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(_text(value))}</td></tr>" for name, value in _flat(values)
    )
    return f'<h2>{title}</h2><div class="wide"><table class="settings">{lines}</table></div>'


def _flat(values: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in values.items():
        own = f"{path}.{name}" if path else str(name)
        out += _flat(value, own) if isinstance(value, dict) else [(own, value)]
    return out


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
