"""``imm study``: an experiment with rows, figures and criteria on one page; ``imm study all`` puts all on one page."""

from __future__ import annotations

import html
import json
import time
from pathlib import Path
from typing import Any

import click

from imm.cli.options import device_line, pick_device, writable_folder
from imm.cli.report import document, image, table
from imm.files import write_text
from imm.studies import STUDIES, TOYS, Result

ALL = "Why the sampler comes first: every study"


def run(name: str, out: str | None, quick: bool, device: str) -> None:
    """Run ``imm study``; the arguments are its options."""
    target, together = pick_device(device), name == "all"
    # Quick runs have a folder of their own: they are other runs.
    folder = Path(writable_folder(f"runs/study-{name}{'-quick' if quick else ''}" if out is None else out))
    names = (name,) if not together else TOYS if quick else tuple(STUDIES)
    click.echo(f"{ALL if together else STUDIES[name].title}, on {device_line(target)}{', quick' if quick else ''}; in {folder}")
    results = {}
    for each in names:
        if together:
            click.echo(f"\n{STUDIES[each].title}")
        results[each] = _one(each, folder / each if together else folder, quick, together, target)
    text = page(ALL, results) if together else page(STUDIES[name].title, results)
    write_text(folder / "report.html", text)
    click.echo(f"wrote {folder / 'report.html'}, and of each study summary.md and rows.json")
    if not all(criterion.holds for result in results.values() for criterion in result.criteria):
        raise SystemExit(1)


def _one(name: str, folder: Path, quick: bool, together: bool, device: Any) -> Result:
    """Run a study, in its short form if it has one and is one of all; write its rows and summary."""
    study, started = STUDIES[name], time.perf_counter()
    folder.mkdir(exist_ok=True)
    if together and study.short is not None:
        result = study.short(folder, device, click.echo)
    else:
        result = study.run(folder, quick, device, click.echo)
    write_text(folder / "rows.json", json.dumps(result.rows, indent=1) + "\n")
    write_text(folder / "summary.md", result.summary)
    for criterion in result.criteria:
        click.echo(str(criterion))
    click.echo(f"{name}: {len(result.rows)} rows in {time.perf_counter() - started:.0f} s")
    return result


def page(title: str, results: dict[str, Result]) -> str:
    """Studies as one page that needs no other file."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for name, result in results.items():
        if len(results) > 1:
            parts.append(f"<h1>{html.escape(STUDIES[name].title)}</h1>")
        parts += [f"<p>{html.escape(text)}</p>" for text in result.text]
        if result.criteria:
            lines = [[str(one).partition(":")[0], one.claim, f"{one.value:.4g}"] for one in result.criteria]
            parts.append("<h2>Criteria</h2>" + table(["", "claim", "found"], lines))
        for path, caption in result.figures:
            parts.append(f"<figure><div class='wide'>{image(path.read_bytes(), caption, 'curves')}</div>")
            parts.append(f"<figcaption>{html.escape(caption)}</figcaption></figure>")
        parts.append("<h2>Rows</h2>" + table([column for _, column in result.columns], result.table()))
    return document(title, "\n".join(parts))
