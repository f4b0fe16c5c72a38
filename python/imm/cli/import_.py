"""``imm import``: a published snapshot as a checkpoint of ours."""

from __future__ import annotations

import warnings

import click

from imm import checkpoints
from imm.checkpoints.format import read_settings


def run(net: str, out: str, second_time: str | None) -> None:
    """Run ``imm import``; the arguments are its options."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        flow_map = checkpoints.import_published(net, out, second_time=second_time)
    settings = read_settings(out, "flow_map")
    network, source = settings["network"], settings["extra"]["source"]
    millions = sum(parameter.numel() for parameter in flow_map.network.parameters()) / 1e6
    sizes = ", ".join(f"{name} {value}" for name, value in network.items() if name != "name")
    click.echo(f"network: {network['name']} ({sizes}), {millions:.1f} M parameters")
    click.echo(f"settings: {', '.join(f'{name} {value}' for name, value in settings['flow_map'].items())}")
    click.echo(f"source: {source['name']}, sha256 {source['sha256']}, mixed_precision {source['mixed_precision']}")
    for note in notes:
        click.echo(f"note: {note.message}")
    click.echo(f"wrote {out}")
