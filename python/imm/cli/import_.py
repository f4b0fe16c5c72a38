"""``imm import``: a published snapshot as a checkpoint of ours."""

from __future__ import annotations

import warnings

import click

from imm import checkpoints
from imm.checkpoints.format import read_settings
from imm.cli.options import PATH
from imm.flow_map import SECOND_TIMES


@click.command("import")
@click.option("--pkl", required=True, type=PATH, metavar="FILE", help="Published snapshot (.pkl).")
@click.option("--dest", required=True, type=PATH, metavar="FILE", help="Checkpoint to write (.safetensors).")
@click.option("--second-time", type=click.Choice(SECOND_TIMES), help="Of the network. [default: what the snapshot says]")
def command(pkl: str, dest: str, second_time: str | None) -> None:
    """Turn a published checkpoint into one of ours. Nothing in the file is run, and none of its names is imported."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        flow_map = checkpoints.import_published(pkl, dest, second_time=second_time)
    settings = read_settings(dest, "flow_map")
    network, source = settings["network"], settings["extra"]["source"]
    millions = sum(parameter.numel() for parameter in flow_map.network.parameters()) / 1e6
    sizes = ", ".join(f"{name} {value}" for name, value in network.items() if name != "name")
    click.echo(f"network: {network['name']} ({sizes}), {millions:.1f} M parameters")
    click.echo(f"settings: {', '.join(f'{name} {value}' for name, value in settings['flow_map'].items())}")
    click.echo(f"source: {source['name']}, sha256 {source['sha256']}, mixed_precision {source['mixed_precision']}")
    for note in notes:
        click.echo(f"note: {note.message}")
    click.echo(f"wrote {dest}")
