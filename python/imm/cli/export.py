"""``imm export``: a checkpoint compiled ahead of time, for generation without Python."""

from __future__ import annotations

import click
import torch

from imm import checkpoints, package
from imm.cli.options import PATH, device_line, parse_floats, pick_device
from imm.ops import native
from imm.sampling import KINDS, METHODS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@click.command()
@click.option("--net", required=True, type=PATH, metavar="FILE", help="Checkpoint (.safetensors).")
@click.option("--out", required=True, type=PATH, metavar="FILE", help="Package to write (.pt2).")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Sampling steps.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--guided", is_flag=True, help="For runs with a guidance scale.")
@click.option("--kind", default="uniform", show_default=True, type=click.Choice(KINDS), help="Time grid.")
@click.option("--mid-eta", default="", metavar="LIST", help="Noise levels in between, for --kind=eta, such as 1.4.")
@click.option("--method", default="pushforward", show_default=True, type=click.Choice(METHODS))
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the weights. [default: the checkpoint's]")
@click.option("--device", default="auto", show_default=True)
def command(
    net: str,
    out: str,
    steps: int,
    batch: int,
    guided: bool,
    kind: str,
    mid_eta: str,
    method: str,
    dtype: str | None,
    device: str,
) -> None:
    """Compile a checkpoint's network and its sampling run into one file, which imm_generate runs without Python."""
    target = pick_device(device)
    flow_map = checkpoints.load(net).to(target)
    package.export(
        flow_map,
        out,
        rows=batch,
        steps=steps,
        kind=kind,
        mid_eta=parse_floats(mid_eta, "mid-eta"),
        method=method,
        guided=guided,
        dtype=None if dtype is None else DTYPES[dtype],
    )
    click.echo(f"{out}: {steps} steps of {batch} images at a time, on {device_line(target)}")
    program = native.program("imm_generate")
    if program is not None:
        scale = " --cfg=1.5" if guided else ""
        click.echo(f"run it with: {program} --package={out} --seeds=0-{batch - 1}{scale} --out=images.npy")
