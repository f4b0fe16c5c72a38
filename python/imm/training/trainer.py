"""The training loop. A step depends on (seed, step) and the state alone: a resumed run repeats an unbroken one exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm import checkpoints
from imm.backends import PRECISIONS, repeatable
from imm.checkpoints.format import build, describe, load_state
from imm.data import ImageData, augmentation, digest, to_float
from imm.distributed import Exchange, Processes
from imm.files import replacing
from imm.flow_map import FlowMap
from imm.objective import T_BINS, Draws, IMMObjective
from imm.training.ema import EMA
from imm.training.lock import FolderLock, lock_folder
from imm.weights import plain_names

STATE_FILE = "training-state.safetensors"
STATS_FILE = "stats.jsonl"
_SHAPE = ("channels", "resolution")
#: What autocast computes in, if it is used.
#: In torch's fused form where there is one: weights, gradient and moments pass through memory once.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "radam": functools.partial(torch.optim.RAdam, decoupled_weight_decay=True),
}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and from where it can be resumed."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train. Times are in steps; one step is one batch.

    Attributes:
        batch: images per step, of all processes, a multiple of the objective's particles times the processes.
        optimizer: "adamw" or "radam", with lr (after ``warmup`` steps of linear growth), betas and weight_decay.
        ema: beta of the exponential moving average.
        precision: of both branches of the loss: "fp32"; "tf32", in which CUDA devices multiply with 10 bits of mantissa; or
            "bf16" or "fp16" (autocast; fp16 with a loss scale), where our networks keep ends, times and sums in float32.
        seed: of data order, times, noise and dropout.
        log_every, snapshot_every: how often a row of statistics, and the state with a snapshot, are written.
        keep_every: snapshots of steps that it divides are written too and stay; the others go when the next is there.
        batch_gpu: images that a process has on their way at a time, a multiple of particles; None for all. Times, noise and
            label dropout are those of the whole batch, and so, to rounding, is the gradient; only a network's dropout is drawn
            anew a part.
        xflip: an epoch has every image twice, as it is and mirrored left to right. Not for latents.
        augment: probability of the transformations of :func:`imm.data.augment`, 0 for none; for networks with ``augment_dim``
            = 9, which are told of them. Not for latents.
    """

    batch: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-4
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema: float = 0.9999
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 50
    snapshot_every: int = 500
    batch_gpu: int | None = None
    xflip: bool = False
    keep_every: int | None = None
    augment: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {list(known)}")
        if min(self.batch, self.log_every, self.snapshot_every) < 1 or self.warmup < 0:
            raise ValueError("batch, log_every and snapshot_every: expected at least 1; warmup: expected at least 0")
        for name, number in (("batch_gpu", self.batch_gpu), ("keep_every", self.keep_every)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if not 0 <= self.augment <= 1:
            raise ValueError(f"augment: expected a probability from 0 to 1, got {self.augment}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: expected a positive rate, got {self.lr}")


class Trainer:
    """Trains an objective's network on images or latents in memory.

    Args:
        objective: on the device to train on. data: whose classes fit the network's.
        out: gets ``stats.jsonl``, ``training-state.safetensors`` and ``snapshot-STEP.safetensors``; made if absent.
        config: see :class:`TrainConfig`. init: sha256 of the file that the network's weights came from, to be kept among the
            settings; None for fresh weights. The average begins at the network's weights in either case.
        where: which of several processes this is (:func:`imm.distributed.processes`), each with the whole data and a trainer
            of the same settings. They share a batch, times and noise of which are those of one process; so is the result, to
            rounding, but for a network's dropout. The first process writes. All make a trainer, run and save together.

    A state file in ``out`` is continued, by the same settings only. The folder is locked against other processes until
    :meth:`close`, the end of the trainer, or of its process. Each step seeds torch's default generators from
    (seed, step).

    Raises:
        ValueError, CheckpointError: settings that do not fit each other, the data or the state found; a folder that cannot be
            written to, or that another process writes to.
    """

    def __init__(
        self,
        objective: IMMObjective,
        data: ImageData,
        out: str | os.PathLike[str],
        config: TrainConfig,
        *,
        init: str | None = None,
        where: Processes | None = None,
    ) -> None:
        flow_map = objective.flow_map
        self._where = where = Processes() if where is None else where
        if len(data) == 0:
            raise ValueError(f"data: expected images, got none in {data.source}")
        parameter = next(flow_map.network.parameters(), None)
        if parameter is None:
            raise ValueError("network: expected parameters to train, got none")
        wanted = [getattr(flow_map.network, name, size) for name, size in zip(_SHAPE, data.shape, strict=False)]
        if wanted != list(data.shape[:2]):
            raise ValueError(f"data: expected images of {wanted} ({', '.join(_SHAPE)}), got {list(data.shape)} ({data.source})")
        if config.batch % (objective.particles * where.world):
            many = f" x {where.world} processes" if where.world > 1 else ""
            raise ValueError(f"batch: expected a multiple of particles = {objective.particles}{many}, got {config.batch}")
        if (config.batch_gpu or 0) % objective.particles:
            raise ValueError(f"batch_gpu: expected a multiple of particles = {objective.particles}, got {config.batch_gpu}")
        for values in (data.pixels, data.deviations):
            if (
                values is not None
                and values.is_floating_point()
                and not all(torch.isfinite(p).all() for p in values.split(1000))
            ):
                raise ValueError(f"data: expected finite images, got NaN or infinity in {data.source}")
        if flow_map.num_classes and (data.labels is None or data.num_classes > flow_map.num_classes):
            raise ValueError(
                f"data: expected labels of at most {flow_map.num_classes} classes, got {data.num_classes} ({data.source})"
            )
        if config.xflip and data.pixels.is_floating_point():
            raise ValueError(f"xflip: expected images, a mirrored latent is no mirrored image's, got {data.source}")
        if config.augment:
            _check_augmentation(flow_map.network, data)
        self.objective, self.config, self.out = objective, config, Path(out)
        self.device = parameter.device
        self.step = 0
        self.resumed_from: int | None = None
        self._saved_step: int | None = None
        self.stop = False  # set it to end the run after the step under way; of several processes, in one of them
        self._exchange: Exchange | None = None
        if where.world > 1:
            self._exchange = where.exchange(self.device)
            self._exchange.take_first(flow_map.network.state_dict().values())
        self.ema = EMA(flow_map.network, config.ema)
        self._parameters = list(flow_map.network.parameters())
        self._optimizer = OPTIMIZERS[config.optimizer](
            self._parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self._permutation: tuple[int, Tensor] | None = None
        self._lock = self._lock_folder()
        self._pixels = data.pixels.to(self.device)
        self._deviations = None if data.deviations is None else data.deviations.to(self.device)
        labels = data.labels if flow_map.num_classes else None
        self._labels = None if labels is None else labels.to(self.device)
        self._settings = self._describe(data)
        if init is not None:
            self._settings["init"] = {"sha256": init}
        if (self.out / STATE_FILE).exists():
            self._load()
        elif where.first:
            self._refuse_snapshots()
        if not where.alike(str(self.step)):
            raise ValueError(f"out: expected a folder that all processes share, got {out}, whose state some do not find")
        intervals = config.log_every, config.snapshot_every, config.keep_every
        found: dict[str, Any] = {**self._settings, "data": self._settings["data"]["sha256"]}
        if not where.alike(f"{found} {intervals}"):
            raise ValueError("settings: expected the same settings and data in all processes, got others in some")
        if where.first:
            self._trim_stats()

    def _lock_folder(self) -> FolderLock | None:
        """Make and lock the folder, in the first process; after all checks of settings, so that a refusal leaves no folder."""
        lock, refusal = None, None
        if self._where.first:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(self.out)
            except OSError as error:
                refusal = ValueError(f"out: expected a folder that can be written to, got {self.out}: {error}")
            except ValueError as error:
                refusal = error
        if self._where.any(refusal is not None):
            raise refusal or ValueError(f"out: expected a folder that the first process can write to, got {self.out}")
        return lock

    def close(self) -> None:
        """Let other processes write to the folder; this trainer no longer may."""
        if self._lock is not None:
            self._lock.release()

    @property
    def ema_flow_map(self) -> FlowMap:
        """The flow map around the averaged weights."""
        return build(describe(self.objective.flow_map), self.ema.network)

    def run(
        self,
        steps: int,
        *,
        max_seconds: float | None = None,
        on_step: Callable[[int], None] | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Train until ``steps`` steps have been made in all, ``max_seconds`` are over, or :attr:`stop` is set; save the state.

        Of several processes, ``max_seconds`` and :attr:`stop` of one end the run of all.

        Raises:
            TrainingError: a loss that is not finite. The last state saved is a good one.
        """
        start = time.perf_counter()
        self.objective.train()
        if not self._where.alike(str(steps)):
            raise ValueError(f"steps: expected the same number in all processes, got {steps} here and others elsewhere")
        if self.step > steps:
            raise ValueError(f"steps: expected at least the {self.step} steps already made, got {steps}")
        with _backends(tf32=self.config.precision == "tf32"):
            self._run(steps, start, max_seconds, on_step, on_log)

    def _run(
        self,
        steps: int,
        start: float,
        max_seconds: float | None,
        on_step: Callable[[int], None] | None,
        on_log: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        window = _Window()
        while self.step < steps:
            if self._where.any(self.stop or (max_seconds is not None and time.perf_counter() - start > max_seconds)):
                break
            window.add(*self._step())
            self.step += 1
            if on_step is not None:
                on_step(self.step)
            snapshot = self.step % self.config.snapshot_every == 0 or self._stays(self.step)
            if snapshot or self.step % self.config.log_every == 0 or self.step == steps:
                self._log(window, on_log)
                window = _Window()
            if snapshot:
                self.save()
        if window.count:
            self._log(window, on_log)
        self.save()

    @property
    def snapshot_path(self) -> Path:
        """Where :meth:`save` puts the averaged flow map of the current step."""
        return self._snapshot_path(self.step)

    def _snapshot_path(self, step: int) -> Path:
        return self.out / f"snapshot-{step:07d}.safetensors"

    def _stays(self, step: int) -> bool:
        return self.config.keep_every is not None and step % self.config.keep_every == 0

    def save(self) -> None:
        """Write the state to resume from and the averaged flow map as a snapshot, each atomically; those before go."""
        if self.step == self._saved_step:
            return
        if self._where.first:
            self._write_state()
        self._saved_step = self.step
        self._where.wait()

    def _write_state(self) -> None:
        replaced = None if self._saved_step is None or self._stays(self._saved_step) else self._saved_step
        tensors: dict[str, Tensor] = {}
        for prefix, module in (("network", self.objective.flow_map.network), ("ema", self.ema.network)):
            tensors |= {f"{prefix}.{name}": value for name, value in plain_names(module.state_dict()).items()}
        for index, parameter in enumerate(self._parameters):
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        settings = {
            "kind": "training",
            "step": self.step,
            "replaced_step": replaced,
            "scaler": self._scaler.state_dict(),
            "settings": self._settings,
        }
        checkpoints.write_file(self.out / STATE_FILE, tensors, settings)
        # A run that is killed from here on does the rest when it is resumed: the state says which snapshots are whose.
        self._write_snapshot()
        self._drop_snapshot(replaced)

    def _write_snapshot(self) -> None:
        checkpoints.save(self.snapshot_path, self.ema_flow_map, extra={"step": self.step, **self._settings})

    def _drop_snapshot(self, step: int | None) -> None:
        if step is not None:
            self._snapshot_path(step).unlink(missing_ok=True)

    def _step(self) -> tuple[dict[str, Tensor], Tensor]:
        """A step on this process's images. What is random is drawn for the whole batch, whatever the processes."""
        config, where = self.config, self._where
        torch.manual_seed(_mix(config.seed, self.step))
        index = self._indices()
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (self.step + 1) / config.warmup) if config.warmup else config.lr
        mirrored, index = index >= len(self._pixels), index % len(self._pixels)
        mine = where.share(len(index))
        images = to_float(self._pixels[index[mine]])
        batch = images.new_zeros(()).expand(len(index), *images.shape[1:])  # its shape
        labels = None if self._labels is None else self._labels[index]
        if config.xflip:
            images = torch.where(mirrored[mine, None, None, None], images.flip(3), images)
        if self._deviations is not None:  # a new sample of the posterior at every step, as in the paper (section I.1)
            noise = torch.randn(batch.shape, dtype=batch.dtype, device=batch.device)
            images = torch.addcmul(images, to_float(self._deviations[index[mine]]), noise[mine])
        told = None
        if config.augment:
            transforms = augmentation.draw(len(index), config.augment, images.device)[mine]
            images, told = augmentation.transform(images, transforms), augmentation.labels(transforms)
        if where.world == 1:
            return self.update(images, labels, told)
        groups = where.share(len(index) // self.objective.particles)
        draws = self.objective.draw(batch, labels).part(groups.start, groups.stop)
        if not where.first:
            torch.manual_seed(_mix(_mix(config.seed, self.step), where.rank))  # else dropout would be alike in all processes
        return self.update(images, None if labels is None else labels[mine], told, draws)

    def update(
        self, images: Tensor, labels: Tensor | None, told: Tensor | None = None, draws: Draws | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step on a batch: loss, gradient, weights, average; random numbers are torch's default generators'.

        Args:
            images: ``[B, C, H, W]``, as the network takes them; of several processes, this one's. labels: ``[B]`` int64, or
                None. told: ``[B, 9]``, how the images were augmented, or None. draws: the objective's for them, or None.

        Returns:
            The objective's statistics of the images, and the norm of the gradient, which stays in the parameters until the
            next call.
        """
        self._optimizer.zero_grad(set_to_none=True)  # before the forward, whose memory grows towards its end
        size = self.config.batch_gpu
        if size is None or size >= len(images):
            stats = self._accumulate(images, labels, told, draws, 1.0)
        else:
            particles = self.objective.particles
            draws = self.objective.draw(images, labels) if draws is None else draws
            parts = []
            for start in range(0, len(images), size):
                part = slice(start, start + size)
                share = len(images[part]) / len(images)
                some = draws.part(start // particles, (start + size) // particles)
                of_labels, of_told = (None if given is None else given[part] for given in (labels, told))
                parts.append((share, self._accumulate(images[part], of_labels, of_told, some, share)))
            stats = _combined(parts)
        if self._exchange is not None:
            self._exchange.average(p.grad for p in self._parameters if p.grad is not None)
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.ema.update(self.objective.flow_map.network)
        return stats, norm

    def _accumulate(
        self, images: Tensor, labels: Tensor | None, told: Tensor | None, draws: Draws | None, share: float
    ) -> dict[str, Tensor]:
        """Add ``share`` times the gradient of the images' loss; the objective's statistics."""
        dtype = PRECISIONS[self.config.precision]
        cast = torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with cast:
            grad_scale = None
            if self._scaler.is_enabled() or share != 1.0:
                grad_scale = self._scaler.scale(torch.full((), share, device=self.device))
            loss, stats = self.objective(images, labels, augment=told, grad_scale=grad_scale, draws=draws)
        loss.backward()
        return stats

    def _indices(self) -> Tensor:
        """The images of this step: positions step * batch, ... of the endless sequence of the epochs' permutations.

        Numbers from the count of images on are mirrored images.
        """
        count = len(self._pixels) * (2 if self.config.xflip else 1)
        position = self.step * self.config.batch
        parts, left = [], self.config.batch
        while left:
            epoch, offset = divmod(position, count)
            if self._permutation is None or self._permutation[0] != epoch:
                generator = torch.Generator().manual_seed(_mix(self.config.seed, -1 - epoch))
                self._permutation = epoch, torch.randperm(count, generator=generator)
            parts.append(self._permutation[1][offset : offset + left])
            position, left = position + len(parts[-1]), left - len(parts[-1])
        return torch.cat(parts).to(self.device)

    def _log(self, window: _Window, on_log: Callable[[dict[str, Any]], None] | None) -> None:
        row = {
            "step": self.step,
            "images": self.step * self.config.batch,
            "lr": self._optimizer.param_groups[0]["lr"],
            **window.row(self.config.batch, self._where),
        }
        broken = row["nonfinite"] > 0 or row["grad_norm"] is None
        if self._scaler.is_enabled():
            row["loss_scale"] = self._scaler.get_scale()
            # A loss scale skips single steps; a network that is broken for good never recovers.
            broken = row["nonfinite"] == window.count * (self.config.batch // self.objective.particles)
        if broken:
            state = "no state was saved" if self._saved_step is None else f"the saved state of step {self._saved_step} is good"
            raise TrainingError(
                f"loss or gradient not finite before step {self.step} ({row['nonfinite']} groups); {state}; "
                "a new run in another folder may want a smaller lr"
            )
        if self._where.first:
            with open(self.out / STATS_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
        if on_log is not None:
            on_log(row)

    def _describe(self, data: ImageData) -> dict[str, Any]:
        config = dataclasses.asdict(self.config)
        for name in (
            "log_every",
            "snapshot_every",
            "keep_every",
            "batch_gpu",
        ):  # they do not change the result, or as rounding does
            del config[name]
        config["betas"] = list(config["betas"])
        names = ("particles", "kernel", "estimator", "mapping_kind", "k", "a", "b", "min_gap", "label_dropout", "target_labels")
        objective = {n: getattr(self.objective, n) for n in (*names, "share_dropout", "eps")}
        return {
            **describe(self.objective.flow_map),
            "objective": {**objective, "bandwidths": list(self.objective.bandwidths)},
            "config": config,
            "data": {
                "source": data.source,
                "count": len(data),
                "sha256": digest(data),
                **({} if data.class_names is None else {"class_names": list(data.class_names)}),
            },
        }

    def _load(self) -> None:
        path = self.out / STATE_FILE
        tensors, settings = checkpoints.read_file(path, "training")
        kept = settings.get("settings")
        if isinstance(kept, dict) and isinstance(kept.get("config"), dict):
            for name, value in (("xflip", False), ("augment", 0.0)):  # of runs from before there were these settings
                kept["config"].setdefault(name, value)
        named = ("data.source ", "data.class_names ")  # what the data are called does not change the result
        differing = [d for d in _differences(kept, self._settings) if not d.startswith(named)]
        if differing:
            raise checkpoints.CheckpointError(
                f"{path}: expected the settings of the run to resume, got others: {'; '.join(differing[:4])}"
            )
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        load_state(self.objective.flow_map.network, parts["network"], str(path))
        load_state(self.ema.network, parts["ema"], str(path))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self._optimizer.load_state_dict({"state": state, "param_groups": self._optimizer.state_dict()["param_groups"]})
        for parameter in self._parameters:
            values = self._optimizer.state[parameter]
            for key, value in values.items():
                # In memory of its own, the file is mapped; and fused optimizers pair numbers by their place in memory.
                same = value.shape == parameter.shape
                values[key] = torch.empty_like(parameter).copy_(value) if same else value.clone()
        self._scaler.load_state_dict(settings["scaler"])
        self.step = self.resumed_from = self._saved_step = settings["step"]
        if self._where.first:
            if not self.snapshot_path.exists():
                self._write_snapshot()
            self._drop_snapshot(settings.get("replaced_step"))  # no such entry in states of earlier versions

    def _refuse_snapshots(self) -> None:
        """Raise ValueError for a run's folder whose state is lost: a new run would mix with it."""
        found = sorted(self.out.glob("snapshot-*.safetensors"))
        if found:
            raise ValueError(
                f"out: expected {STATE_FILE} beside {found[-1].name}, got a folder without; a new run wants another folder, "
                f"and --init={found[-1]} begins with these weights"
            )

    def _trim_stats(self) -> None:
        """Drop the rows after the state's step: a killed run may have written some, the last one in part.

        Rows of a run that never saved a state are kept beside, as ``stats-1.jsonl`` and so on.
        """
        path = self.out / STATS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for i, line in enumerate(lines) if self._stays_in_stats(path, line, last=i + 1 == len(lines))]
        try:
            if self.resumed_from is None and any(line.strip() for line in lines):
                names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
                path.rename(next(name for name in names if not name.exists()))
            with replacing(path) as part:
                part.write_text("".join(line + "\n" for line in kept))
        except OSError as error:
            raise ValueError(f"out: expected a folder that can be written to, got {self.out}: {error}") from error

    def _stays_in_stats(self, path: Path, line: str, *, last: bool) -> bool:
        """Whether a line is a row of a step up to the state's. Raises ValueError for one that is no row, but for the last."""
        if not line.strip():
            return False
        try:
            return bool(json.loads(line)["step"] <= self.step)
        except (ValueError, TypeError, KeyError) as error:
            if last and isinstance(error, json.JSONDecodeError):
                return False
            raise ValueError(f"out: expected rows of a training run in {path}, got {line[:60]!r}") from error


@contextlib.contextmanager
def _backends(tf32: bool) -> Iterator[None]:
    """Within: algorithms that give the same result every time, where there are such, and TF32 or not."""
    utils: Any = torch.utils.deterministic  # its attributes are made by its class
    fills = utils.fill_uninitialized_memory
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose anew; read at its first product
    utils.fill_uninitialized_memory = False  # costs a pass over memory, and only hides reads of what was not written
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable(tf32=tf32):
            yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        utils.fill_uninitialized_memory = fills


class _Window:
    """Sums of the statistics between two log rows, kept on the device until they are read."""

    def __init__(self) -> None:
        self.count = 0
        self.start = time.perf_counter()
        self._sums: dict[str, Tensor] = {}

    def add(self, stats: dict[str, Tensor], norm: Tensor) -> None:
        bins = torch.where(stats["t_bin_count"] > 0, stats["t_bin_loss"] * stats["t_bin_count"], 0.0)
        values = {**stats, "t_bin_loss": bins, "grad_norm": norm}
        self._sums = {n: self._sums[n] + v if self.count else v for n, v in values.items()}
        self.count += 1

    def row(self, batch: int, where: Processes) -> dict[str, Any]:
        """The row of all processes' statistics. Collective."""
        sums = {name: where.sums(value.double().cpu()) for name, value in self._sums.items()}
        seconds = time.perf_counter() - self.start
        bins = sums["t_bin_loss"] / sums["t_bin_count"]
        means = {name: float(sums[name]) / (self.count * where.world) for name in ("loss", "grad_norm", "gap", "at_s")}
        return {
            **{name: value if value == value and abs(value) != float("inf") else None for name, value in means.items()},
            "t_bin_loss": [float(v) if torch.isfinite(v) else None for v in bins],
            "t_bins": T_BINS,
            "nonfinite": int(sums["nonfinite"]),
            "images_per_second": batch * self.count / seconds,
            "seconds": seconds,
        }


def _combined(parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The statistics of a batch from those of its parts, each with its share of the batch."""
    out = {name: torch.stack([share * stats[name] for share, stats in parts]).sum(0) for name in ("loss", "gap", "at_s")}
    for name in ("t_bin_count", "nonfinite"):
        out[name] = torch.stack([stats[name] for _, stats in parts]).sum(0)
    sums = [torch.where(stats["t_bin_count"] > 0, stats["t_bin_loss"] * stats["t_bin_count"], 0.0) for _, stats in parts]
    out["t_bin_loss"] = torch.stack(sums).sum(0) / out["t_bin_count"]
    return out


def _check_augmentation(network: nn.Module, data: ImageData) -> None:
    if data.pixels.is_floating_point():
        raise ValueError(f"augment: expected images, a turned latent is no turned image's, got {data.source}")
    side = augmentation.SMALLEST
    if min(data.shape[1:]) < side:
        raise ValueError(f"augment: expected images of at least {side}x{side}, got {list(data.shape)} ({data.source})")
    told = getattr(network, "augment_dim", 0)
    if told != augmentation.LABELS:
        raise ValueError(
            f"augment: expected a network that is told of it (DDPMpp with augment_dim = {augmentation.LABELS}), "
            f"got {type(network).__name__} with {told}"
        )


def _mix(seed: int, step: int) -> int:
    """One generator seed for (seed, step); steps below 0 are the epochs'. A CPU generator takes its low 32 bits only."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path} was {old!r} and is {new!r}"]
