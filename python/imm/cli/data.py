"""``imm data``: convert data sets between layouts, encode them as latents, and measure them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from imm.cli import progress
from imm.cli.options import (
    PATH,
    channels_option,
    device_line,
    name_list,
    pick_device,
    say_left_out,
    say_notes,
    skip_broken_option,
    transform_option,
)
from imm.data import load, summarize
from imm.data.convert import check_request, spread, write, write_latents
from imm.data.sources import SPLITS, Source, open_source
from imm.files import write_text
from imm.latents import load_vae

_source = click.option(
    "--source",
    required=True,
    type=PATH,
    metavar="PATH",
    help='"mnist5k", a folder, .zip, .npz, CIFAR-10 or MNIST (docs/data.md).',
)
_resolution = click.option(
    "--resolution", type=click.IntRange(min=1), help="Side to resize to. [default: as they are; mnist5k: 16]"
)
_split = click.option("--split", type=click.Choice(SPLITS), help="[default: train where the source has splits, else all]")
_max_images = click.option(
    "--max-images", type=click.IntRange(min=1), metavar="N", help="N images evenly spaced over the source."
)


@click.group()
def command() -> None:
    """Convert, encode and measure data sets."""


@command.command()
@_source
@click.option("--dest", required=True, type=PATH, metavar="PATH", help="A .zip or .npz file to write, or a new folder.")
@_resolution
@transform_option
@_split
@_max_images
@channels_option
@skip_broken_option
def convert(
    source: str,
    dest: str,
    resolution: int | None,
    transform: str,
    split: str | None,
    max_images: int | None,
    channels: int | None,
    skip_broken: bool,
) -> None:
    """Write a data set as a zip or folder of PNGs with dataset.json, or as .npz. The same images give the same bytes.

    Stopped, killed or failed, the same command goes on from there.
    """
    check_request(dest, resolution, transform, source)
    with open_source(source, split) as opened:
        numbers = spread(opened.count, max_images)
        click.echo(f"{opened.description}, {opened.num_classes} classes: writing {len(numbers)} to {dest}")
        with _stoppable(), progress.bar(len(numbers), "image") as bar:
            left_out = write(
                opened,
                dest,
                resolution=resolution,
                transform=transform,
                channels=channels,
                numbers=numbers,
                skip_broken=skip_broken,
                on_image=bar.update,
                say=click.echo,
            )
        _finish(opened, dest, left_out)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Within, what ends a job does so as Ctrl-C does, which says how far it came."""
    # Ctrl-C too: a shell has what it runs in the background ignore it.
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    old = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as stop:
        click.echo(f"stopped; {stop}" if str(stop) else "stopped", err=True)
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _finish(opened: Source, dest: str, left_out: list[str]) -> None:
    say_notes(opened.said())
    say_left_out(left_out, Path(dest))
    click.echo(f"wrote {dest}")


@command.command()
@_source
@click.option("--dest", required=True, type=PATH, metavar="FILE", help="The .npz file to write.")
@click.option("--vae", required=True, type=PATH, metavar="PATH|ID", help="The AutoencoderKL that encodes (needs diffusers).")
@_resolution
@transform_option
@_split
@_max_images
@click.option("--batch", default=8, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--device", default="auto", show_default=True)
@skip_broken_option
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
    skip_broken: bool,
) -> None:
    """Write the latents of a data set's images, as training takes them: mean and deviation of each, and labels.

    Grey pictures are encoded as three equal channels. Stopped, killed or failed, the same command goes on from there.
    """
    target = pick_device(device)
    check_request(dest, resolution, transform, source)
    if Path(dest).suffix != ".npz":
        raise ValueError(f"dest: expected an .npz file for latents, got {dest}")
    with open_source(source, split) as opened:
        encoder = load_vae(vae).to(target)
        numbers = spread(opened.count, max_images)
        click.echo(f"{opened.description}, {opened.num_classes} classes: encoding {len(numbers)} on {device_line(target)}")
        with _stoppable(), progress.bar(len(numbers), "image") as bar:
            left_out = write_latents(
                opened,
                dest,
                encoder,
                resolution=resolution,
                transform=transform,
                numbers=numbers,
                batch=batch,
                skip_broken=skip_broken,
                on_image=bar.update,
                say=click.echo,
            )
        _finish(opened, dest, left_out)


@command.command()
@_source
@_resolution
@transform_option
@_split
@channels_option
@skip_broken_option
@click.option("--out", type=PATH, metavar="FILE", help="Also write the numbers there, as JSON.")
def stats(
    source: str,
    resolution: int | None,
    transform: str,
    split: str | None,
    channels: int | None,
    skip_broken: bool,
    out: str | None,
) -> None:
    """Print count, shape, classes, channel means and deviations, pixel range and digest of a data set."""
    if out is not None and not os.access(Path(out).parent, os.W_OK):
        raise ValueError(f"out: expected a file in a folder that can be written to, got {out}")
    data = load(source, resolution, split, transform=transform, channels=channels, skip_broken=skip_broken)
    found = summarize(data)
    depth, height, width = found["shape"]
    click.echo(f"source: {found['source']}")
    click.echo(f"images: {found['count']} of {width}x{height}, {depth} channel{'s' if depth > 1 else ''}")
    click.echo(f"classes: {found['classes']}" + (f", images of each: {found['per_class']}" if found["per_class"] else ""))
    if data.class_names is not None:
        click.echo(f"class names: {name_list(data.class_names)}")
    click.echo(f"mean: {' '.join(f'{value:.5f}' for value in found['mean'])} (on 0..255)")
    click.echo(f"std: {' '.join(f'{value:.5f}' for value in found['std'])}")
    click.echo(f"range: {found['min']}..{found['max']}")
    click.echo(f"sha256: {found['sha256']}")
    say_notes(data.notes)
    say_left_out(data.left_out, None if out is None else Path(out))
    if out is not None:
        write_text(Path(out), json.dumps(found, indent=2) + "\n")
        click.echo(f"wrote {out}")
