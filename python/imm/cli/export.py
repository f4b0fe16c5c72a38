"""``imm export``: a checkpoint compiled ahead of time, for generation without Python."""

from __future__ import annotations

from typing import Any

import click
import torch

from imm import checkpoints, package
from imm.backends import PRECISIONS
from imm.checkpoints import read_settings
from imm.cli.options import device_line, pick_device
from imm.cli.sample import sequence_shape, token_sampler
from imm.networks import TokenModel
from imm.ops import native
from imm.sampling.classes import method_of


def run(
    net: str,
    out: str,
    steps: int,
    batch: int,
    guided: bool,
    precision: str | None,
    device: str,
    method: str | None,
    **grid: Any,
) -> None:
    """Run ``imm export``; the arguments are its options."""
    target = pick_device(device)
    flow_map = checkpoints.load(net).to(target)
    method = method_of(read_settings(net, "flow_map").get("extra"), method)
    dtype = None if precision is None else PRECISIONS[precision] or torch.float32
    sequences = isinstance(flow_map.network, TokenModel)
    if sequences:
        if dtype not in (None, torch.float32):
            raise ValueError(f"precision: expected fp32 for sequences, got {precision}")
        package.export_tokens(token_sampler(flow_map, steps=steps, method=method, **grid), out, rows=batch, guided=guided)
    else:
        package.export(flow_map, out, rows=batch, steps=steps, guided=guided, dtype=dtype, method=method, **grid)
    what = "sequences" if sequences else "images"
    click.echo(f"{out}: {steps} steps of {batch} {what} at a time, on {device_line(target)}")
    program = native.program("imm_generate")
    if program is not None:
        more = (" --guidance=1.5" if guided else "") + (f" --tokens={sequence_shape(flow_map)[0]}" if sequences else "")
        click.echo(f"run it with: {program} --package={out} --seeds=0-{batch - 1}{more} --out={what}.npy")
