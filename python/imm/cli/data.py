"""``imm data``: convert data sets between layouts, encode them as latents, and measure them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from imm.cli import progress
from imm.cli.options import device_line, name_list, pick_device, say_left_out, say_notes
from imm.data import load, summarize
from imm.data.convert import check_request, spread, write, write_latents
from imm.data.sources import open_source
from imm.files import write_text
from imm.integrations.autoencoder import load_vae


def convert(data: str, out: str, **options: Any) -> None:
    """Run ``imm data convert``; the arguments are its options."""
    _write(data, out, lambda: write, "writing", f"to {out}", **options)


def encode(data: str, out: str, vae: str, device: str, **options: Any) -> None:
    """Run ``imm data encode``; the arguments are its options."""
    target = pick_device(device)
    if Path(out).suffix != ".npz":
        raise ValueError(f"out: expected an .npz file for latents, got {out}")
    encoder = lambda: partial(write_latents, vae=load_vae(vae).to(target))
    _write(data, out, encoder, "encoding", f"on {device_line(target)}", **options)


def _write(
    data: str,
    out: str,
    prepare: Callable[[], Callable[..., list[str]]],
    doing: str,
    place: str,
    *,
    resolution: int | None,
    transform: str,
    split: str | None,
    max_images: int | None,
    **options: Any,
) -> None:
    """Write a source's images by what ``prepare`` gives, which is called when the source is found to be there."""
    check_request(out, resolution, transform, data)
    with open_source(data, split) as opened:
        act, numbers = prepare(), spread(opened.count, max_images)
        click.echo(f"{opened.description}, {opened.num_classes} classes: {doing} {len(numbers)} {place}")
        options |= {"resolution": resolution, "transform": transform, "numbers": numbers}
        with _stoppable(), progress.bar(len(numbers), "image") as bar:
            left_out = act(opened, out, **options, on_image=bar.update, say=click.echo)
        say_notes(opened.said())
    say_left_out(left_out, Path(out))
    click.echo(f"wrote {out}")


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let signals that end a job act as Ctrl-C does, which reports how far it came."""
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


def stats(
    data: str,
    resolution: int | None,
    transform: str,
    split: str | None,
    channels: int | None,
    skip_broken: bool,
    out: str | None,
) -> None:
    """Run ``imm data stats``; the arguments are its options."""
    if out is not None and not os.access(Path(out).parent, os.W_OK):
        raise ValueError(f"out: expected a file in a folder that can be written to, got {out}")
    images = load(data, resolution, split, transform=transform, channels=channels, skip_broken=skip_broken)
    found = summarize(images)
    depth, height, width = found["shape"]
    click.echo(f"source: {found['source']}")
    click.echo(f"images: {found['count']} of {width}x{height}, {depth} channel{'s' if depth > 1 else ''}")
    click.echo(f"classes: {found['classes']}" + (f", images of each: {found['per_class']}" if found["per_class"] else ""))
    if images.class_names is not None:
        click.echo(f"class names: {name_list(images.class_names)}")
    click.echo(f"mean: {' '.join(f'{value:.5f}' for value in found['mean'])} (on 0..255)")
    click.echo(f"std: {' '.join(f'{value:.5f}' for value in found['std'])}")
    click.echo(f"range: {found['min']}..{found['max']}")
    click.echo(f"sha256: {found['sha256']}")
    say_notes(images.notes)
    say_left_out(images.left_out, None if out is None else Path(out))
    if out is not None:
        write_text(Path(out), json.dumps(found, indent=2) + "\n")
        click.echo(f"wrote {out}")
