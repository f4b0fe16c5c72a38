"""``imm study``: a claim, run: rows, figures, criteria with their figures, one page."""

from __future__ import annotations

import html
import json

import click

from imm.cli.options import device_line, pick_device, writable_folder
from imm.cli.report import document, image, table
from imm.files import write_text
from imm.studies import STUDIES, Result


def run(name: str, out: str | None, quick: bool, device: str) -> None:
    """Run ``imm study``; the arguments are its options."""
    target, study = pick_device(device), STUDIES[name]
    # Quick runs have a folder of their own: they are other runs.
    folder = writable_folder(f"runs/study-{name}{'-quick' if quick else ''}" if out is None else out)
    click.echo(f"{study.title}, on {device_line(target)}{', quick' if quick else ''}; in {folder}, where a stopped run resumes")
    result = study.run(folder, quick, target, click.echo)
    write_text(folder / "rows.json", json.dumps(result.rows, indent=1) + "\n")
    write_text(folder / "summary.md", result.summary)
    write_text(folder / "report.html", page(study.title, result))
    for criterion in result.criteria:
        click.echo(str(criterion))
    click.echo(f"wrote {folder / 'report.html'}, summary.md and rows.json, {len(result.rows)} rows")
    if not all(criterion.holds for criterion in result.criteria):
        raise SystemExit(1)


def page(title: str, result: Result) -> str:
    """The study as one page that needs no other file."""
    parts = [f"<p>{html.escape(text)}</p>" for text in result.text]
    if result.criteria:
        lines = [[str(one).partition(":")[0], one.claim, f"{one.value:.4g}"] for one in result.criteria]
        parts.append("<h2>Criteria</h2>" + table(["", "claim", "found"], lines))
    for path, caption in result.figures:
        parts.append(f"<figure><div class='wide'>{image(path.read_bytes(), caption, 'curves')}</div>")
        parts.append(f"<figcaption>{html.escape(caption)}</figcaption></figure>")
    parts.append("<h2>Rows</h2>" + table([column for _, column in result.columns], result.table()))
    return document(title, "\n".join([f"<h1>{html.escape(title)}</h1>", *parts]))
