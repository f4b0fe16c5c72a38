"""The demo's training curve and its one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path


def write_curve(stats: Path, target: Path) -> Path | None:
    """Plot loss and gradient norm over steps from ``stats.jsonl``; None where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in stats.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), constrained_layout=True)
    for axis, name, label in ((axes[0], "loss", "IMM loss (weighted MMD²)"), (axes[1], "grad_norm", "gradient norm")):
        axis.plot(steps, [row[name] for row in rows], color="tab:blue", linewidth=1.2)
        axis.set(xlabel="training step", ylabel=label, yscale="log")
        axis.grid(True, which="both", alpha=0.25)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return target


def write_report(
    target: Path, header: Sequence[str], table: Sequence[str], picture: Path, curve: Path | None, wrong: Sequence[str]
) -> None:
    """One HTML file that needs no other: settings, verdict, scores, samples, curve."""

    def image(path: Path, text: str) -> str:
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'

    verdict = "Failed: " + "; ".join(wrong) if wrong else "Passed: one-step digits with the asked labels and real variety."
    cells = [[part.strip() for part in line.split("  ") if part.strip()] for line in table]
    cells[0].insert(0, "")
    rows = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * len(cells)], cells, strict=False)
    )
    target.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>imm demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }} th, td {{ padding: .25rem 1rem; text-align: right; border-bottom: 1px solid #ddd; }}
td:first-child {{ text-align: left; }} img {{ max-width: 100%; }} .verdict {{ font-weight: 600; }} pre {{ overflow-x: auto; }}
</style></head><body>
<h1>Inductive Moment Matching on real digits</h1>
<p class="verdict">{html.escape(verdict)}</p>
<table>{rows}</table>
<p>Label match: share of samples whose nearest real image has the requested class. Spread: pixel standard deviation inside a
class, as a share of the real one. MMD: squared, unbiased, on raw pixels. Class means are what blurs would score.</p>
<h2>Samples</h2>
<p>One column per requested class, 0 to 9; the same seeds in every step count.</p>
{image(picture, "samples in 1, 2, 4 and 8 steps above real digits")}
<h2>Training</h2>
{image(curve, "loss and gradient norm over steps") if curve else "<p>No curve: matplotlib is not installed.</p>"}
<h2>Run</h2>
<pre>{html.escape(chr(10).join(header))}</pre>
</body></html>
"""
    )
