"""``imm ema``: a power-function average of another length, after training."""

from __future__ import annotations

from pathlib import Path

import click

from imm import checkpoints
from imm.cli.options import writable_file
from imm.training.ema import reconstruct


def run(runs: str, length: float, step: int | None, out: str) -> None:
    """Run ``imm ema``; the arguments are its options."""
    target = writable_file(out)
    tensors, settings, error = reconstruct(Path(runs), length, step)
    at = settings["step"]
    own = {name: settings[name] for name in ("network", "dtype", "flow_map")}
    apart = ("kind", "format_version", "lengths", *own)
    extra = {name: value for name, value in settings.items() if name not in apart} | {"ema_length": length}
    checkpoints.write_file(target, tensors, {"kind": "flow_map", **own, "extra": extra})
    click.echo(f"wrote {target}: the average of length {length:g} after {at} steps; relative error of its profile {error:.2g}")
