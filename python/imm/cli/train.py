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
from tqdm import tqdm

from imm import checkpoints
from imm.checkpoints.format import describe, read_settings
from imm.cli import progress
from imm.cli.eval import check_weights
from imm.cli.options import device_line, name_list, process_device, say_left_out, say_notes
from imm.cli.report import write_environment
from imm.data import ImageData, load, load_tokens, to_float
from imm.data.augmentation import LABELS
from imm.distributed import Processes, processes
from imm.evaluation.evaluate import METRICS, ReferenceStatistics, parse_metrics
from imm.evaluation.sets import PictureSet, load_set, set_of
from imm.evaluation.statistics import is_statistics
from imm.files import sha256_of
from imm.flow_map import FlowMap
from imm.networks import NETWORKS, ignore_second_time
from imm.objectives import OBJECTIVES, TRAIN_BACKBONE, AnyObjective, SequenceObjective
from imm.presets import PRESETS, Preset
from imm.training import Scoring, TrainConfig, Trainer, Watch
from imm.training.watch import SCORES_FILE
from imm.weights import unwrapped

#: Options of each network, under its constructor's names.
NETWORK_OPTIONS = {"UNet": ("width", "dropout"), "DDPMpp": ("width", "dropout"), "DiT": ("size", "patch")}
FLOW_MAP_OPTIONS = ("schedule", "parametrization", "second_time", "time_scale", "t_min", "t_max")
#: Without --time-scale; a derivative in t of a network that sees 1,000 t is too large to learn from (docs/learn/losses.md).
TIME_SCALES = {"meanflow": 1.0}
#: Of a network for sequences, and the options of --data that sequences do not have.
SEQUENCE_OPTIONS = ("backbone", "head", "latent")
IMAGE_OPTIONS = ("resolution", "transform", "channels", "skip_broken", "xflip", "augment", "preset")
#: Options that are settings of :class:`imm.training.TrainConfig`.
TRAINING_OPTIONS = (
    "batch",
    "batch_gpu",
    "lr",
    "warmup",
    "decay",
    "decay_steps",
    "clip",
    "max_skipped",
    "optimizer",
    "ema",
    "ema_lengths",
    "precision",
    "xflip",
    "augment",
    "seed",
    "compile",
    "shard",
)
#: Options of :class:`imm.training.Watch`.
WATCH_OPTIONS = ("log", "grid", "metrics", "eval_every", "eval_images", "eval_steps", "ref", "weights")
_IMM = {**{name: name for name in ("kernel", "k", "a", "b", "min_gap", "label_dropout")}, "mapping": "mapping_kind"}
_same = lambda *names: {name: name for name in (*names, "label_dropout")}
#: Loss -> option -> argument of its class.
LOSS_OPTIONS: dict[str, dict[str, str]] = {
    "imm": {"particles": "particles", **_IMM},
    "fm": _same("times"),
    "consistency": {**_IMM, **_same("distance", "stage_steps")},
    "shortcut": _same("bootstrap", "depth"),
    "progressive": _same("fm_share", "times"),
    "lagrangian": _same("fm_share", "times"),
    "meanflow": _same("derivative", "step_size", "improved", "fm_share", "times"),
    "energy": _same("samples"),
}
#: All that some loss has.
OBJECTIVE_OPTIONS = {name for options in LOSS_OPTIONS.values() for name in options}


def run(out: str, device: str, given: set[str], **options: Any) -> None:
    """Run ``imm train``; the arguments are its options. given: the names of those that are not at their defaults."""
    with processes() as where:
        _check_device(device, where)
        _run(out, process_device(device, where), where, given, **options)


def _run(
    out: str,
    target: torch.device,
    where: Processes,
    given: set[str],
    *,
    data: str | None,
    tokens: str | None,
    steps: int,
    minutes: float | None,
    preset: str | None,
    init: str | None,
    checkpointing: bool,
    allow_change: list[str],
    **options: Any,
) -> None:
    say = click.echo if where.first else lambda line: None
    read_as = {name: options.pop(name) for name in ("resolution", "transform", "channels", "skip_broken")}
    _check_kind(given, sequences=tokens is not None)
    images = load(str(data), latents=True, **read_as) if tokens is None else load_tokens(tokens)
    watching = {name: options.pop(name) for name in WATCH_OPTIONS}
    training = {name: options.pop(name) for name in TRAINING_OPTIONS}
    every = {"log_every": options.pop("tick"), "snapshot_every": options.pop("snap"), "keep_every": options.pop("keep")}
    chosen, loaded = _chosen(images, preset, init, given, options)
    if preset is not None:
        training |= {name: value for name, value in chosen.training.items() if name not in given}
        if chosen.steps is not None and "steps" not in given:
            steps = chosen.steps
    parameters = inspect.signature(NETWORKS[chosen.network]).parameters
    if loaded is None and training["augment"] and "augment_dim" in parameters:
        chosen = replace(chosen, arguments={**chosen.arguments, "augment_dim": LABELS})
    if loaded is not None and "augment" not in given and not chosen.arguments.get("augment_dim"):
        training["augment"] = 0.0  # a preset's; the file's network cannot be told
    if training["decay"] == "cosine" and training["decay_steps"] is None:
        training["decay_steps"] = steps
    config = TrainConfig(**training, **every, mfu=tokens is None)
    if checkpointing and "checkpointing" not in parameters:
        raise ValueError(f"checkpointing: expected a network that has it, got {chosen.network}")
    watch, about = _watch(images, config.snapshot_every, given, read_as, **watching)
    torch.manual_seed(config.seed)
    flow_map = chosen.build() if loaded is None else loaded.float()
    net = flow_map.network
    if checkpointing:
        net.checkpointing = True  # type: ignore[assignment]
    loss = OBJECTIVES[chosen.loss](flow_map.to(target), **chosen.objective)
    objective: AnyObjective = loss if tokens is None else SequenceObjective(loss)
    digest = None if init is None else sha256_of(init)
    trainer = Trainer(objective, images, out, config, init=digest, where=where, watch=watch, allow_change=allow_change)
    if where.first:
        write_environment(trainer.out, device_line(target), where.world)
    count, how = sum(p.numel() for p in net.parameters()), config.precision + ", compiled" * config.compile
    many = f", {where.world} processes" if where.world > 1 else ""
    say(f"device: {device_line(target)}{many}; {_data_line(images, flow_map.sigma_data)}")
    about = [*_about_time_scale(chosen.loss, flow_map), *about]
    if where.first:
        say_notes(images.notes)
        say_left_out(images.left_out, Path(out) / "data")
    if preset is not None:
        say(f"preset: {preset}; flow map: {flow_map.settings}; objective: {chosen.objective}; training: {training}")
    say(
        f"network: {type(net).__name__}, {count:,} parameters; loss: {chosen.loss}; {how}; steps: {steps}, batch {config.batch}"
    )
    if init is not None:
        say(f"init: {init}, sha256 {digest}")
    if trainer.resumed_from is not None:
        say(f"resuming at step {trainer.resumed_from}")
    for line in [*(f"changed {change}" for change in trainer.changes), *about]:
        say(line)
    try:
        signal_number = progress.run(trainer, steps, None if minutes is None else 60.0 * minutes, quiet=not where.first)
    finally:
        watch.close()
    signal_number = where.largest(signal_number or 0) or None
    if signal_number is not None:
        say(f"stopped by signal {signal_number} at step {trainer.step}; the same command resumes there")
        raise SystemExit(128 + signal_number)
    if minutes is not None and trainer.step < steps:
        say(f"stopped after {minutes:g} minutes at step {trainer.step} of {steps}; the same command resumes there")
    say(f"wrote {trainer.snapshot_path}")


def _about_time_scale(loss: str, flow_map: FlowMap) -> list[str]:
    if loss not in TIME_SCALES or flow_map.time_scale <= TIME_SCALES[loss]:
        return []
    return [
        f"time scale: {flow_map.time_scale:g}, of which {loss} takes a derivative; it learns far better at "
        f"{TIME_SCALES[loss]:g} (docs/learn/losses.md)"
    ]


def _check_kind(given: set[str], sequences: bool) -> None:
    """Refuse options of images for sequences, and the other way round."""
    for name in sorted(given.intersection(IMAGE_OPTIONS if sequences else SEQUENCE_OPTIONS)):
        kind, other = ("sequences", "images") if sequences else ("images", "sequences")
        raise ValueError(f"{name}: expected no such option for {kind}, which {other} have")


def _chosen(
    images: ImageData, preset: str | None, init: str | None, given: set[str], options: Mapping[str, Any]
) -> tuple[Preset, FlowMap | None]:
    """Network, flow map and objective as options, preset and checkpoint have them; and the checkpoint's flow map."""
    of_model = {name: options[name] for name in given & options.keys()}
    if init is not None:
        _check_beside_init(init, of_model)
    if len(images.shape) == 2:
        chosen = _of_sequences(options, of_model, images, init)
    else:
        chosen = _from_options(options, of_model, images) if preset is None else _changed(preset, of_model)
    loaded = None
    if init is not None:
        loaded = checkpoints.load(init).train()
        _begin_map(init, loaded, chosen.loss, of_model.get("second_time"))
        chosen = _of_file(init, loaded, chosen, preset)
    if init is not None or preset is not None:
        _check_fit(f"the preset {preset}" if init is None else init, chosen, images)
    if "label_dropout" in of_model and not chosen.arguments.get("backbone", chosen.arguments)["num_classes"]:
        raise ValueError(
            f"label_dropout: expected no such option for a network without classes, got {of_model['label_dropout']} "
            f"({images.source})"
        )
    return chosen, loaded


def _watch(
    images: ImageData,
    snap: int,
    given: set[str],
    read_as: Mapping[str, Any],
    *,
    log: str | None,
    grid: tuple[int, int] | None,
    metrics: str | None,
    eval_every: int | None,
    eval_images: int,
    eval_steps: list[int],
    ref: str | None,
    weights: str | None,
) -> tuple[Watch, list[str]]:
    """What is watched of the run, and what there is to say of it."""
    pictures = len(images.shape) == 3 and images.shape[0] in (1, 3)
    if not pictures and "grid" not in given:
        grid = None
    scoring, about = None, []
    if metrics is not None:
        if not pictures:
            what = "latents" if len(images.shape) == 3 else "sequences"
            raise ValueError(f"eval: expected pictures, got {what} {list(images.shape)} ({images.source})")
        names = parse_metrics(metrics)
        check_weights(weights, [METRICS[name].features for name in names])
        reference: PictureSet | ReferenceStatistics
        if ref is None:
            reference = set_of(images, read_as["resolution"], read_as["transform"], read_as["channels"])
        else:
            reference = ReferenceStatistics.load(ref) if is_statistics(ref) else load_set(ref, **read_as)
        scoring = Scoring(names, reference, eval_every or snap, eval_images, weights=weights)
        about = [f"scores: {metrics} of {eval_images} samples in {eval_steps} steps every {scoring.every} steps, {SCORES_FILE}"]
    elif foreign := sorted(given & {"eval_every", "eval_images", "ref", "weights"}):
        raise ValueError(f"{foreign[0]}: expected no such option without --eval")
    return Watch(log=log, grid=grid, scoring=scoring, steps=eval_steps, say=tqdm.write), about


def _data_line(images: ImageData, sigma_data: float) -> str:
    line = f"data: {images.source}, {images.shape}, {images.num_classes} classes"
    if images.pixels.is_floating_point():  # in another scale they would train, badly
        some = to_float(images.pixels[:: max(1, len(images) // 1000)])
        line += f", standard deviation {some.std(correction=0):.2f} (expected near {sigma_data:g})"
    return line if images.class_names is None else f"{line} ({name_list(images.class_names)})"


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
    foreign = sorted(given.keys() - {"network", "loss", *mine, *FLOW_MAP_OPTIONS, *OBJECTIVE_OPTIONS})
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
        {**{name: options[name] for name in FLOW_MAP_OPTIONS}, "time_scale": _time_scale(options)},
        _of_loss(options["loss"], given),
        loss=options["loss"],
    )


def _of_sequences(options: Mapping[str, Any], given: Mapping[str, Any], images: ImageData, init: str | None) -> Preset:
    """What the options say of a backbone and its head, for the sequences' shape and classes."""
    loss = options["loss"]
    foreign = sorted(given.keys() - {"loss", *SEQUENCE_OPTIONS, *FLOW_MAP_OPTIONS, *OBJECTIVE_OPTIONS})
    if foreign:
        raise ValueError(f"{foreign[0]}: expected no such option for sequences, got {given[foreign[0]]}")
    if loss not in TRAIN_BACKBONE and init is None:
        raise ValueError(
            f"loss: expected {' or '.join(TRAIN_BACKBONE)}, which train the backbone, or --init with a trained one, got {loss}"
        )
    count, width = images.shape
    features, depth, heads = _sizes("backbone", options["backbone"], 3)
    head_width, head_depth = _sizes("head", options["head"], 2)
    latent = options["latent"] if options["latent"] is not None else width if loss == "energy" else 0
    backbone = {"token_dim": width, "features": features, "depth": depth, "heads": heads, "max_tokens": count}
    flow_map = {**{name: options[name] for name in FLOW_MAP_OPTIONS}, "time_scale": _time_scale(options)}
    if loss == "energy" and "parametrization" not in given:
        flow_map["parametrization"] = "identity"  # the network gives the token itself
    return Preset(
        "TokenModel",
        {
            "backbone": {**backbone, "num_classes": images.num_classes},
            "head": {"width": head_width, "depth": head_depth, "latent_dim": latent},
        },
        flow_map,
        _of_loss(loss, given),
        loss=loss,
    )


def _sizes(name: str, text: str, count: int) -> list[int]:
    parts = text.split("x")
    if len(parts) != count or not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name}: expected {count} sizes such as {'x'.join(['256', '4', '4'][:count])}, got {text!r}")
    return [int(part) for part in parts]


def _time_scale(options: Mapping[str, Any]) -> float:
    given = options["time_scale"]
    return float(TIME_SCALES.get(options["loss"], 1000.0) if given is None else given)


def _of_loss(loss: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a loss that were given; refused where one is another loss's."""
    own = LOSS_OPTIONS[loss]
    for name in sorted(given.keys() & OBJECTIVE_OPTIONS - own.keys()):
        raise ValueError(f"{name}: expected no such option for the loss {loss}, which has {', '.join(own)}, got {given[name]}")
    if loss == "consistency":
        _check_consistency(given)
    arguments = {argument: given[name] for name, argument in own.items() if name in given}
    return arguments if arguments.get("stage_steps") != 0 else {**arguments, "stage_steps": None}


def _check_consistency(given: Mapping[str, Any]) -> None:
    """Refuse options of the consistency loss that others of them switch off."""
    unused = []
    if given.get("distance") != "kernel":
        unused += [(name, "--distance=kernel") for name in ("kernel", "a", "b")]
    if given.get("stage_steps") != 0:
        unused += [(name, "--stage-steps=0") for name in ("k", "mapping", "min_gap")]
    for name, wanted in unused:
        if name in given:
            raise ValueError(f"{name}: expected {wanted} beside it for the loss consistency, got {given[name]} without")


def _changed(name: str, given: Mapping[str, Any]) -> Preset:
    """The preset with what was given beside it."""
    preset = PRESETS[name]
    mine = NETWORK_OPTIONS[preset.network]
    foreign = sorted(given.keys() - {"loss", *mine, *FLOW_MAP_OPTIONS, *OBJECTIVE_OPTIONS})
    if foreign:
        raise ValueError(
            f"{foreign[0]}: expected no such option beside --preset={name}, "
            f"whose network is {preset.network} with {', '.join(mine)}, got {given[foreign[0]]}"
        )
    loss = given.get("loss", preset.loss)
    # Of another loss the preset says network, flow map and training.
    kept = preset.objective if loss == preset.loss else {k: v for k, v in preset.objective.items() if k == "label_dropout"}
    scale = {} if loss == preset.loss else {"time_scale": TIME_SCALES.get(loss, 1000.0)}
    return replace(
        preset,
        arguments={**preset.arguments, **{key: given[key] for key in mine if key in given}},
        flow_map={**preset.flow_map, **scale, **{key: given[key] for key in FLOW_MAP_OPTIONS if key in given}},
        objective={**kept, **_of_loss(loss, given)},
        loss=loss,
    )


def _check_beside_init(path: str, given: Mapping[str, Any]) -> None:
    """Refuse options that a checkpoint has settled."""
    own = {
        "network",
        *(set(FLOW_MAP_OPTIONS) - {"second_time"}),
        *(name for names in NETWORK_OPTIONS.values() for name in names),
        *SEQUENCE_OPTIONS,
    }
    for name in sorted(given.keys() & own):
        raise ValueError(f"{name}: expected no such option beside --init, whose file says it ({path}), got {given[name]}")


def _begin_map(path: str, loaded: FlowMap, loss: str, second_time: str | None) -> None:
    """Make a velocity the start of a flow map: it saw no second time but one, so that its output begins without any."""
    objective = read_settings(path, "flow_map").get("extra", {}).get("objective", {})
    velocity = loaded.second_time == "none" or (objective.get("loss") == "fm" and loaded.second_time == "stride")
    if second_time is not None and second_time != loaded.second_time:
        if loaded.second_time != "none":
            raise ValueError(f"second_time: expected {loaded.second_time}, which {path} says, got {second_time}")
        loaded.second_time = second_time
    if velocity and loss != "fm" and loaded.second_time != "none":
        ignore_second_time(unwrapped(loaded.network))


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
    sequences = len(images.shape) == 2
    if sequences != (preset.network == "TokenModel"):
        wanted, got = ("images, by --data,", "sequences") if sequences else ("sequences, by --tokens,", "images")
        raise ValueError(f"data: expected {wanted} for {whose}, got {got} ({images.source})")
    if sequences:
        _check_sequences(whose, preset.arguments["backbone"], images)
        return
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


def _check_sequences(whose: str, backbone: Mapping[str, Any], images: ImageData) -> None:
    T, D, classes = (backbone.get(key, 0) for key in ("max_tokens", "token_dim", "num_classes"))
    if images.shape[0] > T or images.shape[1] != D:
        raise ValueError(f"tokens: expected [N, 1..{T}, {D}] for {whose}, got {list(images.shape)} ({images.source})")
    if images.num_classes > classes:
        raise ValueError(f"tokens: expected labels of at most {classes} classes for {whose}, got {images.num_classes}")
