"""``imm train``: a network on images, with snapshots and exact resume."""

from __future__ import annotations

import click
import torch

from imm.cli import progress
from imm.cli.options import device_line, pick_device, writable_folder
from imm.data import load
from imm.flow_map import FlowMap
from imm.networks import DiT, UNet
from imm.objective import MAPPINGS, IMMObjective
from imm.ops.mmd import KERNELS
from imm.parametrizations import PARAMETRIZATIONS
from imm.schedules import SCHEDULES
from imm.training import TrainConfig, Trainer
from imm.training.trainer import OPTIMIZERS, PRECISIONS


@click.command()
@click.option(
    "--data", required=True, metavar="PATH", help='"mnist5k", a folder of images, .zip, .npz, CIFAR-10, MNIST (docs/data.md).'
)
@click.option("--outdir", required=True, metavar="DIR", help="Snapshots, state and stats.jsonl. A run found here is resumed.")
@click.option("--resolution", type=click.IntRange(min=4), help="Resize to this side. [default: as they are; mnist5k: 16]")
@click.option("--steps", default=10000, show_default=True, type=click.IntRange(min=1), help="Steps in all.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after this long; run again to go on.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Images a step.")
@click.option("--lr", default=1e-4, show_default=True, type=float, help="Learning rate.")
@click.option("--warmup", default=0, show_default=True, type=click.IntRange(min=0), help="Steps of linear growth of it.")
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(list(OPTIMIZERS)))
@click.option("--ema", default=0.9999, show_default=True, type=float, help="Beta of the moving average.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(list(PRECISIONS)))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option("--snap", default=500, show_default=True, type=click.IntRange(min=1), help="Steps between saved states.")
@click.option("--tick", default=50, show_default=True, type=click.IntRange(min=1), help="Steps between rows of stats.jsonl.")
@click.option("--network", default="unet", show_default=True, type=click.Choice(["unet", "dit"]))
@click.option("--width", default=16, show_default=True, type=int, help="U-Net: channels of the first level.")
@click.option("--dropout", default=0.0, show_default=True, type=click.FloatRange(0, 1, max_open=True), help="U-Net: dropout.")
@click.option("--size", default="S", show_default=True, type=click.Choice(["S", "B", "L", "XL"]), help="DiT: size.")
@click.option("--patch", default=2, show_default=True, type=click.IntRange(min=1), help="DiT: side of a patch.")
@click.option("--schedule", default="fm", show_default=True, type=click.Choice(list(SCHEDULES)))
@click.option("--parametrization", default="euler_fm", show_default=True, type=click.Choice(list(PARAMETRIZATIONS)))
@click.option("--second-time", default="stride", show_default=True, type=click.Choice(["stride", "identity"]))
@click.option("--t-min", default=0.0, show_default=True, type=float)
@click.option("--t-max", default=0.994, show_default=True, type=float)
@click.option("--particles", default=4, show_default=True, type=click.IntRange(min=1), help="M, particles a group.")
@click.option("--kernel", default="laplace", show_default=True, type=click.Choice(list(KERNELS)))
@click.option("--mapping", default="eta", show_default=True, type=click.Choice(list(MAPPINGS)), help="How r(s, t) is found.")
@click.option("-k", "k", default=12, show_default=True, type=click.IntRange(1, 30), help="Step exponent of the mapping.")
@click.option("-a", "a", default=2, show_default=True, type=int, help="Exponent of alpha in the weighting.")
@click.option("-b", "b", default=4.0, show_default=True, type=float, help="Shift of the weighting.")
@click.option("--min-gap", type=float, help="Smallest t - r, such as 1e-4 in half precision. [default: none]")
@click.option("--label-dropout", default=0.1, show_default=True, type=click.FloatRange(0, 1))
@click.option("--device", default="auto", show_default=True)
def command(
    data: str,
    outdir: str,
    resolution: int | None,
    steps: int,
    minutes: float | None,
    batch: int,
    lr: float,
    warmup: int,
    optimizer: str,
    ema: float,
    precision: str,
    seed: int,
    snap: int,
    tick: int,
    network: str,
    width: int,
    dropout: float,
    size: str,
    patch: int,
    schedule: str,
    parametrization: str,
    second_time: str,
    t_min: float,
    t_max: float,
    particles: int,
    kernel: str,
    mapping: str,
    k: int,
    a: int,
    b: float,
    min_gap: float | None,
    label_dropout: float,
    device: str,
) -> None:
    """Train a network on images. Stopped or killed at any moment, the same command goes on exactly where it was saved."""
    target = pick_device(device)
    images = load(data, resolution)
    channels, side, _ = images.shape
    folder = writable_folder(outdir)
    torch.manual_seed(seed)
    if network == "unet":
        net: torch.nn.Module = UNet(channels, side, images.num_classes, width, dropout=dropout)
    else:
        net = DiT(size, patch, channels, side, images.num_classes)
    flow_map = FlowMap(
        net, schedule=schedule, parametrization=parametrization, second_time=second_time, t_min=t_min, t_max=t_max
    )
    objective = IMMObjective(
        flow_map.to(target),
        particles=particles,
        kernel=kernel,
        mapping_kind=mapping,
        k=k,
        a=a,
        b=b,
        min_gap=min_gap,
        label_dropout=label_dropout,
    )
    config = TrainConfig(
        batch=batch,
        optimizer=optimizer,
        lr=lr,
        warmup=warmup,
        ema=ema,
        precision=precision,
        seed=seed,
        log_every=tick,
        snapshot_every=snap,
    )
    trainer = Trainer(objective, images, folder, config)
    count = sum(p.numel() for p in net.parameters())
    click.echo(f"device: {device_line(target)}; data: {images.source}, {images.shape}, {images.num_classes} classes")
    click.echo(f"network: {type(net).__name__}, {count:,} parameters; {precision}; steps: {steps}, batch {batch}")
    if trainer.resumed_from is not None:
        click.echo(f"resuming at step {trainer.resumed_from}")
    signal_number = progress.run(trainer, steps, None if minutes is None else 60.0 * minutes)
    if signal_number is not None:
        click.echo(f"stopped by signal {signal_number} at step {trainer.step}; the same command goes on from there")
        raise SystemExit(128 + signal_number)
    click.echo(f"wrote {trainer.snapshot_path}")
