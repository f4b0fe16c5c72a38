"""``imm data``: convert data sets between layouts, encode them as latents, and measure them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from imm.cli import progress
from imm.cli.options import device_line, pick_device
from imm.data import load, summarize
from imm.data.convert import check_request, spread, write, write_latents
from imm.data.pictures import TRANSFORMS
from imm.data.sources import SPLITS, open_source
from imm.latents import load_vae

_source = click.option(
    "--source", required=True, metavar="PATH", help='"mnist5k", a folder, .zip, .npz, CIFAR-10 or MNIST (docs/data.md).'
)
_resolution = click.option(
    "--resolution", type=click.IntRange(min=1), help="Side to resize to. [default: as they are; mnist5k: 16]"
)
_split = click.option("--split", type=click.Choice(SPLITS), help="[default: train where the source has splits, else all]")


_transform = click.option(
    "--transform", default="none", show_default=True, type=click.Choice(TRANSFORMS), help="What is cut out first."
)
_max_images = click.option(
    "--max-images", type=click.IntRange(min=1), metavar="N", help="N images evenly spaced over the source."
)


@click.group()
def command() -> None:
    """Convert, encode and measure data sets."""


@command.command()
@_source
@click.option("--dest", required=True, metavar="PATH", help="A .zip or .npz file to write, or a new folder.")
@_resolution
@_transform
@_split
@_max_images
def convert(source: str, dest: str, resolution: int | None, transform: str, split: str | None, max_images: int | None) -> None:
    """Write a data set as a zip or folder of PNGs with dataset.json, or as .npz. The same images give the same bytes."""
    check_request(dest, resolution, transform, source)
    with open_source(source, split) as opened:
        numbers = spread(opened.count, max_images)
        click.echo(f"{opened.description}, {opened.num_classes} classes: writing {len(numbers)} to {dest}")
        with progress.bar(len(numbers), "image") as bar:
            write(opened, dest, resolution=resolution, transform=transform, numbers=numbers, on_image=bar.update)
    click.echo(f"wrote {dest}")


@command.command()
@_source
@click.option("--dest", required=True, metavar="FILE", help="The .npz file to write.")
@click.option("--vae", required=True, metavar="PATH|ID", help="The AutoencoderKL that encodes (needs diffusers).")
@_resolution
@_transform
@_split
@_max_images
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--device", default="auto", show_default=True)
def encode(
    source: str,
    dest: str,
    vae: str,
    resolution: int | None,
    transform: str,
    split: str | None,
    max_images: int | None,
    batch: int,
    device: str,
) -> None:
    """Write the latents of a data set's images, as training takes them: mean and deviation of each, and labels."""
    target = pick_device(device)
    check_request(dest, resolution, transform, source)
    if Path(dest).suffix != ".npz":
        raise ValueError(f"dest: expected an .npz file for latents, got {dest}")
    with open_source(source, split) as opened:
        encoder = load_vae(vae).to(target)
        numbers = spread(opened.count, max_images)
        click.echo(f"{opened.description}, {opened.num_classes} classes: encoding {len(numbers)} on {device_line(target)}")
        with progress.bar(len(numbers), "image") as bar:
            write_latents(
                opened,
                dest,
                encoder,
                resolution=resolution,
                transform=transform,
                numbers=numbers,
                batch=batch,
                on_image=bar.update,
            )
    click.echo(f"wrote {dest}")


@command.command()
@_source
@_resolution
@_split
@click.option("--out", metavar="FILE", help="Also write the numbers there, as JSON.")
def stats(source: str, resolution: int | None, split: str | None, out: str | None) -> None:
    """Print count, shape, classes, channel means and deviations, pixel range and digest of a data set."""
    if out is not None and not os.access(Path(out).parent, os.W_OK):
        raise ValueError(f"out: expected a file in a folder that can be written to, got {out}")
    found = summarize(load(source, resolution, split))
    channels, height, width = found["shape"]
    click.echo(f"source: {found['source']}")
    click.echo(f"images: {found['count']} of {width}x{height}, {channels} channel{'s' if channels > 1 else ''}")
    click.echo(f"classes: {found['classes']}" + (f", images of each: {found['per_class']}" if found["per_class"] else ""))
    click.echo(f"mean: {' '.join(f'{value:.5f}' for value in found['mean'])} (on 0..255)")
    click.echo(f"std: {' '.join(f'{value:.5f}' for value in found['std'])}")
    click.echo(f"range: {found['min']}..{found['max']}")
    click.echo(f"sha256: {found['sha256']}")
    if out is not None:
        part = Path(out).with_name(f".{Path(out).name}.part")
        part.write_text(json.dumps(found, indent=2) + "\n")
        os.replace(part, out)
        click.echo(f"wrote {out}")
