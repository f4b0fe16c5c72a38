"""``imm sample``: images from a checkpoint."""

from __future__ import annotations

import math

import click
import numpy as np
import torch
from torch import Tensor

from imm import checkpoints
from imm.cli.options import device_line, parse_floats, parse_grid, parse_integers, pick_device, writable_folder
from imm.evaluation.pictures import grid, save_picture, to_picture
from imm.flow_map import FlowMap
from imm.sampler import Sampler
from imm.sampling import KINDS, METHODS, time_grid


@click.command()
@click.option("--net", required=True, metavar="FILE", help="Checkpoint (.safetensors).")
@click.option("--outdir", required=True, metavar="DIR", help="Where to write the images.")
@click.option("--seeds", default="0-63", show_default=True, metavar="LIST", help="Image seeds, such as 0-63,70.")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Sampling steps.")
@click.option("--labels", metavar="LIST", help="Classes, repeated over the seeds. [default: all classes in turn]")
@click.option("--cfg", type=float, metavar="W", help="Guidance scale. [default: no guidance]")
@click.option("--kind", default="uniform", show_default=True, type=click.Choice(KINDS), help="Time grid.")
@click.option("--mid-eta", default="", metavar="LIST", help="Noise levels in between, for --kind=eta, such as 1.4.")
@click.option("--method", default="pushforward", show_default=True, type=click.Choice(METHODS))
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--grid", "grid_size", metavar="WxH", help="Also write grid.png of the first W x H images, such as 8x8.")
@click.option("--device", default="auto", show_default=True)
def command(
    net: str,
    outdir: str,
    seeds: str,
    steps: int,
    labels: str | None,
    cfg: float | None,
    kind: str,
    mid_eta: str,
    method: str,
    batch: int,
    grid_size: str | None,
    device: str,
) -> None:
    """Generate images from a checkpoint. An image depends on its own seed and label only, not on the batch."""
    seed_list = parse_integers(seeds, "seeds")
    layout = parse_grid(grid_size) if grid_size else None
    target = pick_device(device)
    flow_map = checkpoints.load(net).to(target)
    between = parse_floats(mid_eta, "mid-eta")
    time_grid(flow_map, steps, kind, between)  # refuses before a folder is made
    all_labels = pick_labels(flow_map, labels, len(seed_list))
    if cfg is not None and flow_map.num_classes == 0:
        raise ValueError("cfg: expected a class-conditional checkpoint, got one without classes")
    if cfg is not None and not math.isfinite(cfg):
        raise ValueError(f"cfg: expected a finite number, got {cfg}")
    folder = writable_folder(outdir)
    shape = flow_map.image_shape
    rows = min(batch, len(seed_list))
    sampler = Sampler(flow_map, steps=steps, kind=kind, mid_eta=between, method=method, guidance=cfg, rows=rows)
    click.echo(f"{net} on {device_line(target)}: {len(seed_list)} images of {shape}, {steps} steps, {method}")
    done: list[Tensor] = []
    for start in range(0, len(seed_list), batch):
        part = slice(start, start + batch)
        done.append(sampler.sample(seed_list[part], None if all_labels is None else all_labels[part]).cpu())
        if shape[0] in (1, 3):
            for seed, image in zip(seed_list[part], done[-1], strict=True):
                save_picture(to_picture(image), folder / f"{seed:06d}.png")
    everything = torch.cat(done)
    if shape[0] not in (1, 3):
        np.savez(folder / "latents.npz", latents=everything.numpy(), seeds=np.array(seed_list))
        click.echo(f"{shape[0]} channels are latents, not a picture: wrote {folder / 'latents.npz'}")
        return
    if layout is not None:
        columns, rows = layout
        shown = everything[: columns * rows].split(columns)
        save_picture(grid([("", row) for row in shown]), folder / "grid.png")
    click.echo(f"wrote {len(everything)} images{' and grid.png' if layout else ''} to {folder}")


def pick_labels(flow_map: FlowMap, text: str | None, count: int) -> Tensor | None:
    """The classes asked for, repeated to ``count``; all classes in turn where none are. None for an unconditional network."""
    if flow_map.num_classes == 0:
        if text is not None:
            raise ValueError("labels: expected a class-conditional checkpoint, got one without classes")
        return None
    chosen = parse_integers(text, "labels") if text is not None else list(range(flow_map.num_classes))
    if max(chosen) > flow_map.num_classes:
        raise ValueError(
            f"labels: expected classes 0..{flow_map.num_classes - 1} or {flow_map.num_classes} for none, got {max(chosen)}"
        )
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)]
