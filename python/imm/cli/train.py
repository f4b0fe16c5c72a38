"""``imm train``: a network on images, with snapshots and exact resume."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from imm import checkpoints
from imm.checkpoints.format import describe
from imm.cli import progress
from imm.cli.options import (
    PATH,
    Number,
    channels_option,
    device_line,
    device_option,
    name_list,
    process_device,
    say_left_out,
    say_notes,
    skip_broken_option,
    transform_option,
)
from imm.data import ImageData, load, to_float
from imm.data.augmentation import LABELS
from imm.distributed import Processes, processes
from imm.files import sha256_of
from imm.flow_map import FlowMap
from imm.networks import NETWORKS
from imm.objective import MAPPINGS, IMMObjective
from imm.ops.mmd import KERNELS
from imm.parametrizations import PARAMETRIZATIONS
from imm.presets import PRESETS, Preset
from imm.schedules import SCHEDULES
from imm.training import TrainConfig, Trainer
from imm.training.trainer import OPTIMIZERS, PRECISIONS

#: Options of each network, under its constructor's names.
NETWORK_OPTIONS = {"UNet": ("width", "dropout"), "DDPMpp": ("width", "dropout"), "DiT": ("size", "patch")}
FLOW_MAP_OPTIONS = ("schedule", "parametrization", "second_time", "t_min", "t_max")
#: Options that are settings of :class:`imm.training.TrainConfig`.
TRAINING_OPTIONS = ("batch", "batch_gpu", "lr", "warmup", "optimizer", "ema", "precision", "xflip", "augment", "seed")
#: Option -> argument of :class:`imm.IMMObjective`.
OBJECTIVE_OPTIONS = {
    **{name: name for name in ("particles", "kernel", "k", "a", "b", "min_gap", "label_dropout")},
    "mapping": "mapping_kind",
}


@click.command()
@click.option(
    "--data",
    required=True,
    type=PATH,
    metavar="PATH",
    help='"mnist5k", a folder of images, .zip, .npz (images or latents), CIFAR-10, MNIST (docs/data.md).',
)
@click.option(
    "--outdir", required=True, type=PATH, metavar="DIR", help="Snapshots, state and stats.jsonl. A run found here is resumed."
)
@click.option("--resolution", type=click.IntRange(min=4), help="Resize to this side. [default: as they are; mnist5k: 16]")
@transform_option
@channels_option
@skip_broken_option
@click.option("--steps", default=10000, show_default=True, type=click.IntRange(min=1), help="Steps in all.")
@click.option("--minutes", type=Number(min=0), help="Stop after this long; run again to go on.")
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Images a step.")
@click.option(
    "--batch-gpu",
    type=click.IntRange(min=1),
    help="Images at a time, for less memory; the batch's gradient is summed. [default: all]",
)
@click.option("--lr", default=1e-4, show_default=True, type=Number(), help="Learning rate.")
@click.option("--warmup", default=0, show_default=True, type=click.IntRange(min=0), help="Steps of linear growth of it.")
@click.option("--optimizer", default="adamw", show_default=True, type=click.Choice(list(OPTIMIZERS)))
@click.option("--ema", default=0.9999, show_default=True, type=Number(), help="Beta of the moving average.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=click.Choice(list(PRECISIONS)),
    help="Of both branches of the loss; bf16 and fp16 by autocast. docs/training.md has the error of the gradient.",
)
@click.option("--xflip/--no-xflip", default=False, show_default=True, help="Also train on mirrored images (not latents).")
@click.option(
    "--augment",
    default=0.0,
    show_default=True,
    type=Number(0, 1),
    help="DDPM++: probability of each geometric augmentation, which the network is told of (not latents).",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option("--snap", default=500, show_default=True, type=click.IntRange(min=1), help="Steps between saves.")
@click.option(
    "--keep", type=click.IntRange(min=1), metavar="N", help="Keep the snapshots of every N steps. [default: only the newest]"
)
@click.option("--tick", default=50, show_default=True, type=click.IntRange(min=1), help="Steps between rows of stats.jsonl.")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    metavar="NAME",
    help="The paper's network, flow map, objective, steps, batch, lr, optimizer, ema, precision, xflip, augment; options given "
    f"beside it win. One of {', '.join(PRESETS)}.",
)
@click.option(
    "--init", type=PATH, metavar="FILE", help="Start from this checkpoint's weights; network and flow map are the file's."
)
@click.option("--network", default="unet", show_default=True, type=click.Choice(["unet", "dit"]))
@click.option("--width", default=16, show_default=True, type=int, help="U-Net, DDPM++: channels of the first layer.")
@click.option("--dropout", default=0.0, show_default=True, type=Number(0, 1, max_open=True), help="U-Net, DDPM++.")
@click.option("--size", default="S", show_default=True, type=click.Choice(["S", "B", "L", "XL"]), help="DiT: size.")
@click.option("--patch", default=2, show_default=True, type=click.IntRange(min=1), help="DiT: side of a patch.")
@click.option("--schedule", default="fm", show_default=True, type=click.Choice(list(SCHEDULES)))
@click.option("--parametrization", default="euler_fm", show_default=True, type=click.Choice(list(PARAMETRIZATIONS)))
@click.option("--second-time", default="stride", show_default=True, type=click.Choice(["stride", "identity"]))
@click.option("--t-min", default=0.0, show_default=True, type=Number())
@click.option("--t-max", default=0.994, show_default=True, type=Number())
@click.option("--particles", default=4, show_default=True, type=click.IntRange(min=1), help="M, particles a group.")
@click.option("--kernel", default="laplace", show_default=True, type=click.Choice(list(KERNELS)))
@click.option("--mapping", default="eta", show_default=True, type=click.Choice(list(MAPPINGS)), help="How r(s, t) is found.")
@click.option("-k", "k", default=12, show_default=True, type=click.IntRange(1, 30), help="Step exponent of the mapping.")
@click.option("-a", "a", default=2, show_default=True, type=int, help="Exponent of alpha in the weighting.")
@click.option("-b", "b", default=4.0, show_default=True, type=Number(), help="Shift of the weighting.")
@click.option("--min-gap", type=Number(), help="Smallest t - r, such as 1e-4 in half precision. [default: none]")
@click.option("--label-dropout", default=0.1, show_default=True, type=Number(0, 1))
@click.option("--checkpointing", is_flag=True, help="DiT, DDPM++: compute blocks again in the backward, for less memory.")
@device_option
@click.pass_context
def command(
    context: click.Context,
    data: str,
    outdir: str,
    device: str,
    **options: Any,
) -> None:
    """Train a network on images. Stopped or killed at any moment, the same command goes on exactly where it was saved.

    Processes that torchrun starts ("torchrun --nproc-per-node=8 -m imm train ...") share each batch.
    """
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    with processes() as where:
        _check_device(device, where)
        _run(data, outdir, process_device(device, where), where, given, **options)


def _run(
    data: str,
    outdir: str,
    target: torch.device,
    where: Processes,
    given: set[str],
    *,
    resolution: int | None,
    transform: str,
    channels: int | None,
    skip_broken: bool,
    steps: int,
    minutes: float | None,
    snap: int,
    keep: int | None,
    tick: int,
    preset: str | None,
    init: str | None,
    checkpointing: bool,
    **options: Any,
) -> None:
    say = click.echo if where.first else lambda line: None
    images = load(data, resolution, latents=True, transform=transform, channels=channels, skip_broken=skip_broken)
    training = {name: options.pop(name) for name in TRAINING_OPTIONS}
    of_model = {name: options[name] for name in given & options.keys()}
    if init is not None:
        _check_beside_init(init, of_model)
    chosen = _from_options(options, of_model, images) if preset is None else _changed(preset, of_model)
    loaded = None
    if init is not None:
        loaded = checkpoints.load(init).train()
        chosen = _of_file(init, loaded, chosen, preset)
    if init is not None or preset is not None:
        _check_fit(f"the preset {preset}" if init is None else init, chosen, images)
    if "label_dropout" in of_model and not chosen.arguments["num_classes"]:
        raise ValueError(
            f"label_dropout: expected no such option for a network without classes, got {of_model['label_dropout']} "
            f"({images.source})"
        )
    if preset is not None:
        training |= {name: value for name, value in chosen.training.items() if name not in given}
        if chosen.steps is not None and "steps" not in given:
            steps = chosen.steps
    parameters = inspect.signature(NETWORKS[chosen.network]).parameters
    if loaded is None and training["augment"] and "augment_dim" in parameters:
        chosen = replace(chosen, arguments={**chosen.arguments, "augment_dim": LABELS})
    if loaded is not None and "augment" not in given and not chosen.arguments.get("augment_dim"):
        training["augment"] = 0.0  # a preset's; the file's network cannot be told
    config = TrainConfig(**training, log_every=tick, snapshot_every=snap, keep_every=keep)
    if checkpointing and "checkpointing" not in parameters:
        raise ValueError(f"checkpointing: expected a network that has it, got {chosen.network}")
    torch.manual_seed(config.seed)
    flow_map = chosen.build() if loaded is None else loaded.float()
    net = flow_map.network
    if checkpointing:
        net.checkpointing = True  # type: ignore[assignment]
    objective = IMMObjective(flow_map.to(target), **chosen.objective)
    digest = None if init is None else sha256_of(init)
    trainer = Trainer(objective, images, outdir, config, init=digest, where=where)
    count = sum(p.numel() for p in net.parameters())
    data_line = f"data: {images.source}, {images.shape}, {images.num_classes} classes"
    if images.pixels.is_floating_point():  # in another scale they would train, badly
        some = to_float(images.pixels[:: max(1, len(images) // 1000)])
        data_line += f", standard deviation {some.std(correction=0):.2f} (expected near {flow_map.sigma_data:g})"
    if images.class_names is not None:
        data_line += f" ({name_list(images.class_names)})"
    many = f", {where.world} processes" if where.world > 1 else ""
    say(f"device: {device_line(target)}{many}; {data_line}")
    if where.first:
        say_notes(images.notes)
        say_left_out(images.left_out, Path(outdir) / "data")
    if preset is not None:
        say(f"preset: {preset}; flow map: {flow_map.settings}; objective: {chosen.objective}; training: {training}")
    say(f"network: {type(net).__name__}, {count:,} parameters; {config.precision}; steps: {steps}, batch {config.batch}")
    if init is not None:
        say(f"init: {init}, sha256 {digest}")
    if trainer.resumed_from is not None:
        say(f"resuming at step {trainer.resumed_from}")
    signal_number = progress.run(trainer, steps, None if minutes is None else 60.0 * minutes, quiet=not where.first)
    signal_number = where.largest(signal_number or 0) or None
    if signal_number is not None:
        say(f"stopped by signal {signal_number} at step {trainer.step}; the same command goes on from there")
        raise SystemExit(128 + signal_number)
    if minutes is not None and trainer.step < steps:
        say(f"stopped after {minutes:g} minutes at step {trainer.step} of {steps}; the same command goes on from there")
    say(f"wrote {trainer.snapshot_path}")


def _check_device(device: str, where: Processes) -> None:
    """Refuse two processes on one GPU, whose gradients NCCL does not exchange."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", where.world))
    if where.world == 1 or device == "cpu" or not torch.cuda.is_available():
        return
    if device not in ("auto", "cuda") or local > torch.cuda.device_count():
        raise ValueError(
            f"device: expected cpu, or cuda with a GPU for each of a machine's processes, got {device} with "
            f"{torch.cuda.device_count()} GPUs for {local}"
        )


def _from_options(options: Mapping[str, Any], given: Mapping[str, Any], images: ImageData) -> Preset:
    """What the options say, for the images' shape and classes; refused where one was given that the network does not have."""
    network = {"unet": "UNet", "dit": "DiT"}[options["network"]]
    mine = NETWORK_OPTIONS[network]
    foreign = sorted(given.keys() - {"network", *mine, *FLOW_MAP_OPTIONS, *OBJECTIVE_OPTIONS})
    if foreign:
        raise ValueError(
            f"{foreign[0]}: expected no such option for the network {network}, which has {', '.join(mine)}, "
            f"got {given[foreign[0]]}"
        )
    channels, side, _ = images.shape
    image = {"channels": channels, "resolution": side, "num_classes": images.num_classes}
    return Preset(
        network,
        {**image, **{name: options[name] for name in mine}},
        {name: options[name] for name in FLOW_MAP_OPTIONS},
        {argument: options[name] for name, argument in OBJECTIVE_OPTIONS.items()},
    )


def _changed(name: str, given: Mapping[str, Any]) -> Preset:
    """The preset with what was given beside it."""
    preset = PRESETS[name]
    mine = NETWORK_OPTIONS[preset.network]
    foreign = sorted(given.keys() - {*mine, *FLOW_MAP_OPTIONS, *OBJECTIVE_OPTIONS})
    if foreign:
        raise ValueError(
            f"{foreign[0]}: expected no such option beside --preset={name}, "
            f"whose network is {preset.network} with {', '.join(mine)}, got {given[foreign[0]]}"
        )
    return replace(
        preset,
        arguments={**preset.arguments, **{key: given[key] for key in mine if key in given}},
        flow_map={**preset.flow_map, **{key: given[key] for key in FLOW_MAP_OPTIONS if key in given}},
        objective={**preset.objective, **{OBJECTIVE_OPTIONS[key]: given[key] for key in OBJECTIVE_OPTIONS if key in given}},
    )


def _check_beside_init(path: str, given: Mapping[str, Any]) -> None:
    """Refuse options that a checkpoint has settled."""
    own = {"network", *FLOW_MAP_OPTIONS, *(name for names in NETWORK_OPTIONS.values() for name in names)}
    for name in sorted(given.keys() & own):
        raise ValueError(f"{name}: expected no such option beside --init, whose file says it ({path}), got {given[name]}")


def _of_file(path: str, loaded: FlowMap, chosen: Preset, preset: str | None) -> Preset:
    """What was chosen, for a checkpoint's network and flow map; refused where the preset says these otherwise."""
    found = describe(loaded)
    name, arguments = found["network"].pop("name"), found["network"]
    if preset is not None:
        wanted = {"network": chosen.network, **chosen.arguments, **chosen.flow_map}
        for key, value in wanted.items():
            got = {"network": name, **arguments, **found["flow_map"]}.get(key)
            if got != value:
                raise ValueError(f"init: expected {key} = {value} for the preset {preset}, got {got} in {path}")
    return replace(chosen, network=name, arguments=arguments, flow_map=found["flow_map"])


def _check_fit(whose: str, preset: Preset, images: ImageData) -> None:
    """Refuse data that the network does not take, before it is made."""
    channels, side, classes = (preset.arguments[key] for key in ("channels", "resolution", "num_classes"))
    if images.shape != (channels, side, side):
        what, remedy = "images", f"--resolution={side} resizes"
        if preset.network == "DiT":
            what, remedy = "latents", "imm data encode makes them from images"
        raise ValueError(
            f"data: expected {what} of {channels} channels and {side}x{side} for {whose} ({remedy}), "
            f"got {list(images.shape)} ({images.source})"
        )
    if classes and not 0 < images.num_classes <= classes:
        raise ValueError(
            f"data: expected labels of at most {classes} classes for {whose}, got {images.num_classes} ({images.source})"
        )
