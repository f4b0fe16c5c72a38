"""The settings of a run: how to train, whether it fits network and data, and what a resumed run must not change."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from imm.backends import PRECISIONS
from imm.checkpoints.format import describe
from imm.data import ImageData, augmentation, digest
from imm.data.lazy import LazyPixels
from imm.networks import TokenModel
from imm.objectives import AnyObjective
from imm.training.ema import gamma_of
from imm.training.sharding import takes_tangents
from imm.weights import unwrapped

#: torch's fused form where it exists: it reads and writes weights, gradient and moments once.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "radam": functools.partial(torch.optim.RAdam, decoupled_weight_decay=True),
}
_SHAPE = ("channels", "resolution")
#: How the learning rate falls: not at all, to 0 along half a cosine, or as 1 / sqrt(step).
DECAYS = ("none", "cosine", "rsqrt")
#: Settings of a TrainConfig that do not change the result, or only by rounding.
_FREE = ("log_every", "snapshot_every", "keep_every", "batch_gpu", "mfu", "shard")
#: Settings that a resumed run may change if asked to: the meaning of the state's tensors does not depend on them.
CHANGEABLE = ("lr", "warmup", "decay", "decay_steps", "betas", "weight_decay", "clip", "max_skipped", "ema", "compile")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Times are in steps; one step is one batch.

    Attributes:
        batch: images per step, of all processes, a multiple of the objective's particles times the processes.
        optimizer: "adamw" or "radam", with lr (after ``warmup`` steps of linear growth), betas and weight_decay.
        decay: of the learning rate: "none"; "cosine", lr/2 (1 + cos(pi step / decay_steps)), 0 from decay_steps on; or "rsqrt",
            lr sqrt(decay_steps / step) from decay_steps on (Karras et al. 2024). decay_steps: needed by both.
        clip: gradients of a larger norm are scaled to this norm; None: no clipping.
        max_skipped: how many steps of a run may be skipped because their gradient is not finite; the next one stops the run.
            Not for fp16, whose loss scale skips such steps itself.
        ema: beta of the exponential moving average.
        ema_lengths: relative lengths of power-function averages (:class:`imm.training.PowerEMA`) that are tracked as well.
            :func:`imm.training.reconstruct` makes averages of other lengths from the files that each save leaves.
        precision: "fp32"; "tf32", in which CUDA devices multiply with 10 bits of mantissa; or "bf16" or "fp16" (autocast; fp16
            with a loss scale). It applies to both branches. Our networks keep first and last layers, times and sums in float32.
        seed: decides data order, times, noise and dropout.
        log_every, snapshot_every: steps between rows of statistics, and between saves of the state and a snapshot.
        keep_every: a snapshot of every so many steps is kept; a new one replaces the others.
        batch_gpu: images of a micro-batch of one process, a multiple of particles; None: the whole share. Times, noise and
            label dropout are drawn for the whole batch, so the gradient is that of the whole batch to rounding; only a
            network's own dropout is drawn for each micro-batch.
        xflip: an epoch has every image twice, once mirrored left to right. Not for latents.
        augment: probability of the transformations of :func:`imm.data.augment`, 0 for none; for networks with ``augment_dim``
            = 9, which are conditioned on them. Not for latents.
        mfu: rows have ``mfu``, the network's flops a second as a share of the device's matmul rate, which :meth:`Trainer.run`
            measures first.
        compile: compile the network (torch.compile) in both branches and in the backward. The start takes minutes and rounding
            differs. Needs a C++ compiler and a network that compiles to one graph; another network is an error at the first
            step. With several processes each unit is compiled. The network stays compiled after the run.
        shard: processes that share one replica of weights, averages and optimizer, a divisor of their number; 1: each has all.
    """

    batch: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-4
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay: str = "none"
    decay_steps: int | None = None
    clip: float | None = None
    max_skipped: int = 0
    ema: float = 0.9999
    ema_lengths: tuple[float, ...] = ()
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 50
    snapshot_every: int = 500
    batch_gpu: int | None = None
    xflip: bool = False
    keep_every: int | None = None
    augment: float = 0.0
    mfu: bool = False
    compile: bool = False
    shard: int = 1

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS), ("decay", DECAYS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {list(known)}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected at least 0, got {self.warmup}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema: expected beta in [0, 1), got {self.ema}")
        for name in ("batch", "log_every", "snapshot_every", "batch_gpu", "keep_every", "decay_steps", "shard"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment: expected a probability from 0 to 1, got {self.augment}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive rate, got {self.lr}")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if (self.decay == "none") != (self.decay_steps is None):
            wanted = "none without a decay" if self.decay == "none" else f"steps of the decay {self.decay!r}"
            raise ValueError(f"decay_steps: expected {wanted}, got {self.decay_steps}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip: expected a positive norm, got {self.clip}")
        if self.max_skipped < 0:
            raise ValueError(f"max_skipped: expected at least 0, got {self.max_skipped}")
        if self.max_skipped and self.precision == "fp16":
            raise ValueError(f"max_skipped: expected 0 in fp16, whose loss scale skips steps itself, got {self.max_skipped}")
        for length in self.ema_lengths:
            gamma_of(length)
        if len(set(self.ema_lengths)) < len(self.ema_lengths):
            raise ValueError(f"ema_lengths: expected each once, got {list(self.ema_lengths)}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        made = step + 1
        rate = self.lr * min(1.0, made / self.warmup) if self.warmup else self.lr
        if self.decay == "cosine" and self.decay_steps is not None:
            rate *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.decay_steps)))
        if self.decay == "rsqrt" and self.decay_steps is not None:
            rate *= math.sqrt(min(1.0, self.decay_steps / made))
        return rate


def check_fit(config: TrainConfig, objective: AnyObjective, data: ImageData, world: int) -> None:
    """Raise ValueError where settings, network, data and the number of processes do not fit each other."""
    network, particles, classes = objective.flow_map.network, objective.particles, objective.flow_map.num_classes
    if len(data) == 0:
        raise ValueError(f"data: expected images, got none in {data.source}")
    if next(network.parameters(), None) is None:
        raise ValueError("network: expected parameters to train, got none")
    _check_shape(network, data)
    if config.batch % (particles * world):
        many = f" x {world} processes" if world > 1 else ""
        raise ValueError(f"batch: expected a multiple of particles = {particles}{many}, got {config.batch}")
    if world % config.shard:
        raise ValueError(f"shard: expected a divisor of the number of processes, {world}, got {config.shard}")
    if world > 1:
        _check_parts(config, objective, world)
    if (config.batch_gpu or 0) % particles:
        raise ValueError(f"batch_gpu: expected a multiple of particles = {particles}, got {config.batch_gpu}")
    for values in (data.pixels, data.deviations):
        if values is not None and values.is_floating_point() and not all(p.isfinite().all() for p in values.split(1000)):
            raise ValueError(f"data: expected finite images, got NaN or infinity in {data.source}")
    if classes and (data.labels is None or data.num_classes > classes):
        raise ValueError(f"data: expected labels of at most {classes} classes, got {data.num_classes} ({data.source})")
    if config.xflip and data.pixels.is_floating_point():
        raise ValueError(f"xflip: expected images, a mirrored latent is no mirrored image's, got {data.source}")
    if config.augment:
        _check_augmentation(network, data)
    if config.compile:
        if not objective.compiles:
            raise ValueError(f"compile: expected a loss without tangents of the network, got {objective.name}")
        _check_compiler()


def _check_parts(config: TrainConfig, objective: AnyObjective, world: int) -> None:
    """Refuse what would have processes exchange gradients a different number of times, and tangents that torch cannot take."""
    own = config.batch // world
    parts = min(own, config.batch_gpu or own, own % (config.batch_gpu or own) or own)
    if parts < objective.least_part:
        raise ValueError(
            f"batch: expected {objective.least_part} images or more a micro-batch of a process for the loss {objective.name}, "
            f"whose kinds of images each process has then, got {parts}"
        )
    if not objective.compiles and not takes_tangents():
        raise ValueError(
            f"loss: expected one without tangents of the network on several processes, which FSDP of torch {torch.__version__} "
            f"does not have, got {objective.name} (meanflow: --derivative=difference)"
        )


def _check_shape(network: Any, data: ImageData) -> None:
    if isinstance(unwrapped(network), TokenModel):
        T, D = network.max_tokens, network.token_dim
        if len(data.shape) != 2 or data.shape[0] > T or data.shape[1] != D:
            raise ValueError(f"data: expected sequences [1..{T}, {D}], got {list(data.shape)} ({data.source})")
        return
    wanted = [getattr(network, name, size) for name, size in zip(_SHAPE, data.shape, strict=False)]
    if len(data.shape) != 3 or wanted != list(data.shape[:2]):
        raise ValueError(f"data: expected images of {wanted} ({', '.join(_SHAPE)}), got {list(data.shape)} ({data.source})")


def _check_compiler() -> None:
    """torch.compile asks for one at the first step, on CUDA too, and says so in many lines."""
    named = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch.compile has it
    if shutil.which(named) is None:
        raise ValueError(f"compile: expected a C++ compiler, got no {named} on the path (the variable CXX names another)")


def _check_augmentation(network: nn.Module, data: ImageData) -> None:
    if data.pixels.is_floating_point():
        raise ValueError(f"augment: expected images, a turned latent is no turned image's, got {data.source}")
    side = augmentation.SMALLEST
    if min(data.shape[1:]) < side:
        raise ValueError(f"augment: expected images of at least {side}x{side}, got {list(data.shape)} ({data.source})")
    told = getattr(network, "augment_dim", 0)
    if told != augmentation.LABELS:
        raise ValueError(
            f"augment: expected a network that is conditioned on it (DDPMpp with augment_dim = {augmentation.LABELS}), "
            f"got {type(network).__name__} with {told}"
        )


def settings_of(config: TrainConfig, objective: AnyObjective, data: ImageData, init: str | None) -> dict[str, Any]:
    """What a run's files keep of its settings, as JSON has it: all that changes the result, and what the data are called."""
    named = {} if data.class_names is None else {"class_names": list(data.class_names)}
    settings = {
        **describe(objective.flow_map),
        "objective": objective.settings,
        "config": {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE},
        "data": {"source": data.source, "count": len(data), "sha256": _digest(data), **named},
    }
    for name in ("betas", "ema_lengths"):
        settings["config"][name] = list(settings["config"][name])
    return settings if init is None else {**settings, "init": {"sha256": init}}


def _digest(data: ImageData) -> str:
    """Of the data, or, where reading all of them would take long, of what tells their files apart."""
    if not isinstance(data.pixels, LazyPixels):
        return digest(data)
    labels = b"" if data.labels is None else data.labels.numpy().tobytes()
    about = f"files {list(data.pixels.shape)} {data.pixels.stamp()} "
    return hashlib.sha256(about.encode() + labels).hexdigest()


def differences(kept: Any, settings: dict[str, Any], allowed: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Where the settings of a state, ``kept``, differ from those of the run that resumes it, in words: first those that must be
    alike, then those whose names are ``allowed`` to change, of :data:`CHANGEABLE`."""
    if isinstance(kept, dict) and isinstance(kept.get("config"), dict):
        # Runs of earlier versions did not have all settings.
        defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig) if field.name not in _FREE}
        kept = {**kept, "config": {**defaults, "betas": [0.9, 0.999], "ema_lengths": [], **kept["config"]}}
        kept["objective"] = {"loss": "imm", **kept.get("objective", {})}
        if kept["objective"]["loss"] != settings["objective"]["loss"]:  # whose arguments are unlike too
            kept, settings = ({**one, "objective": {"loss": one["objective"]["loss"]}} for one in (kept, settings))
    named = ("data.source ", "data.class_names ")  # what the data are called does not change the result
    unlike = [text for text in _unlike(kept, settings) if not text.startswith(named)]
    free = tuple(f"config.{name} " for name in allowed)
    changed = [text for text in unlike if free and text.startswith(free)]
    return [text for text in unlike if text not in changed], changed


def check_changeable(names: Collection[str]) -> None:
    """Raise ValueError for a name that no resumed run may change."""
    for name in names:
        if name not in CHANGEABLE:
            raise ValueError(f"allow_change: expected some of {', '.join(CHANGEABLE)}, got {name!r}")


def _unlike(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _unlike(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} was {old!r} and is {new!r}"]
