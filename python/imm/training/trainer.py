"""The training loop. A step depends on (seed, step) and the state alone: a resumed run repeats an unbroken one exactly."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm.backends import PRECISIONS, deterministic
from imm.data import ImageData
from imm.distributed import Processes
from imm.files import lock_folder
from imm.flow_map import FlowMap
from imm.objectives import AnyDraws, AnyObjective
from imm.training.batches import Batches, mix
from imm.training.config import OPTIMIZERS, TrainConfig, check_changeable, check_fit, settings_of
from imm.training.ema import EMA, PowerEMA
from imm.training.sharding import outermost, shard, shard_alike, units_of
from imm.training.speed import Clock, flops_of, matmul_rate
from imm.training.state import State
from imm.training.stats import STATS_FILE, Window, append, combined, trim
from imm.training.watch import Watch

#: Settings of the compiler. Kernels are not chosen by timing, because a resumed run would choose again. On the CPU a thread
#: takes at least 8192 elements of a loop: waking it takes longer than computing 512, the default.
_COMPILER: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True, "cpp.min_chunk_size": 8192}


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and from which state it can be resumed."""


class Trainer:
    """Trains an objective's network on images, latents or sequences in memory.

    Args:
        objective: the loss, on the device to train on; a SequenceObjective for sequences. data: its classes fit the network's.
        out: the folder for ``stats.jsonl``, ``training-state-STEP`` and ``snapshot-STEP.safetensors``; made if absent.
        config: see :class:`TrainConfig`. init: sha256 of the file that the weights came from, recorded among the settings; None
            for fresh weights. The average begins at the network's weights in either case.
        where: the rank of this process among several (:func:`imm.distributed.processes`). Each has the whole data and a trainer
            of the same settings, and makes, runs and saves it with the others. They share each batch; the result is that of one
            process to rounding, except for a network's dropout. Weights, averages and optimizer are sharded over
            ``config.shard`` processes (FSDP2). Rank 0 logs and writes snapshots.
        watch: pictures, scores and logs of the run (:class:`imm.training.Watch`), or None.
        allow_change: names of settings that may differ from those of the state found: lr, warmup, decay, decay_steps, betas,
            weight_decay, clip, max_skipped, ema, compile. States and snapshots record what changed, and when.
        units: classes of modules that FSDP2 gathers one at a time, for a network without a method ``units``. The network's
            forward must call each as a module. None: the network is one unit.

    A state in ``out`` is resumed, with the same settings only. The folder is locked against other processes until
    :meth:`close`, the end of the trainer, or of its process. Each step seeds torch's default generators from
    (seed, step).

    Raises:
        ValueError, CheckpointError: settings that do not fit each other, the data or the state found; a folder that cannot be
            written to, or that another process writes to.
    """

    def __init__(
        self,
        objective: AnyObjective,
        data: ImageData,
        out: str | os.PathLike[str],
        config: TrainConfig,
        *,
        init: str | None = None,
        where: Processes | None = None,
        watch: Watch | None = None,
        allow_change: Collection[str] = (),
        units: Collection[type[nn.Module]] = (),
    ) -> None:
        self._where = where = Processes() if where is None else where
        check_changeable(allow_change)
        check_fit(config, objective, data, where.world)
        self.objective, self.config, self.out = objective, config, Path(out)
        network = objective.flow_map.network
        self.device = next(network.parameters()).device
        self.stop = False  # set it to end the run after the step under way; of several processes, in one of them
        settings = settings_of(config, objective, data, init)
        self._clock, self._matmul_rate = Clock(self.device), 0.0
        self._flops = flops_of(objective.flow_map, data.shape) if config.mfu else 0
        self.ema = EMA(network, config.ema)
        self.averages = [PowerEMA(network, length) for length in config.ema_lengths]
        self._shards = shard(network, self.device, where, config.shard, units)
        for average in (self.ema, *self.averages):
            shard_alike(average.network, network, self._shards)
        self._optimizer = OPTIMIZERS[config.optimizer](
            self._shards.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        if config.compile:
            _compile(network, self._shards.units)
        self._watch = watch
        if watch is not None:
            watch.check(self)
        # After all checks of settings, so that a refusal leaves no folder.
        refusal = f"out: expected a folder that the first process can write to, got {out}"
        self._lock = where.in_first(lambda: lock_folder(self.out, shared=True), refusal)
        self._batches = Batches(data, config, self.device, where, labelled=objective.flow_map.num_classes > 0)
        kept = self.out, objective.flow_map, self._shards, self.ema, self.averages, self._optimizer, self._scaler
        self._state = State(*kept, settings, config.keep_every, where)
        self.resumed_from = self._state.resume(allow_change)
        self.step = self.resumed_from or 0
        if not where.alike(str(self.step)):
            raise ValueError(f"out: expected a folder that all processes share, got {out}, whose state some do not find")
        intervals = config.log_every, config.snapshot_every, config.keep_every
        found = {**settings, "data": settings["data"]["sha256"]}
        if not where.alike(f"{found} {intervals}"):
            raise ValueError("settings: expected the same settings and data in all processes, got others in some")
        if where.first:
            trim(self.out / STATS_FILE, self.resumed_from)
        if watch is not None:
            where.in_first(lambda: watch.begin(self), "watch: expected what the first process can log, got an error there")

    def close(self) -> None:
        """Let other processes write to the folder; this trainer no longer may."""
        self._state.finish()
        if self._lock is not None:
            self._lock.release(force=True)
            self._lock = None  # else it would be another trainer's, made later, as long as this one

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files; of several, rank 0 does."""
        return self._where.first

    @property
    def place(self) -> tuple[int, int]:
        """This process's rank, and the number of processes."""
        return self._where.rank, self._where.world

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, as its files keep them."""
        return self._state.settings

    @property
    def changes(self) -> list[str]:
        """Settings that changed since the run began (``allow_change``), each with its step, in words."""
        return self._state.changes

    @property
    def ema_flow_map(self) -> FlowMap:
        """The flow map around the averaged weights. Collective."""
        return self._state.average()

    @property
    def snapshot_path(self) -> Path:
        """Where :meth:`save` puts the averaged flow map of the current step."""
        return self._state.snapshot_path(self.step)

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
        self.objective.train()
        if not self._where.alike(str(steps)):
            raise ValueError(f"steps: expected the same number in all processes, got {steps} here and others elsewhere")
        if self.step > steps:
            raise ValueError(f"steps: expected at least the {self.step} steps already made, got {steps}")
        end = math.inf if max_seconds is None else time.perf_counter() + max_seconds
        with deterministic(tf32=self.config.precision == "tf32"):
            if self.config.mfu and not self._matmul_rate:
                self._matmul_rate = matmul_rate(self.device, self.config.precision)
            window = Window()
            self._clock.start()
            while self.step < steps and not self._where.any(self.stop or time.perf_counter() > end):
                saves = self._saves(self.step + 1, steps)
                row = saves or (self.step + 1) % self.config.log_every == 0
                stats, norm = self._step(pairs=row)
                window.skip() if self._skips(norm) else window.add(stats, norm)
                self.step += 1
                if on_step is not None:
                    on_step(self.step)
                if row:
                    self._log(window, on_log)
                    window = Window()
                if saves:
                    if self._watch is not None:
                        self._watch.saving(self, last=self.step == steps)
                    self._clock.mark("watch")
                    self._save()
                    self._clock.mark("save")
            if window.count:
                self._log(window, on_log)
            self._clock.stop()
            self.save()

    def _saves(self, step: int, steps: int) -> bool:
        """Whether the state is saved after so many steps, of those to make."""
        return step % self.config.snapshot_every == 0 or self._state.stays(step) or step == steps

    def save(self) -> None:
        """Write the state to resume from and the averaged flow map as a snapshot, each atomically; those before go. Collective.

        Raises:
            CheckpointError: they cannot be written.
        """
        self._save()
        self._state.finish()
        self._where.wait()

    def _save(self) -> None:
        """Begin what :meth:`save` does; it ends while training continues."""
        if self.step == self._state.saved_step:
            return
        if self._watch is not None:
            self._watch.flush()
        self._state.write(self.step)
        if self._watch is not None and self._watch.scores:
            self._state.finish()  # the best snapshot is copied
            self._where.wait()
            self._watch.saved(self)

    def _skips(self, norm: Tensor) -> bool:
        """Whether a step whose gradient has this norm is skipped; waits for the device only where one may be."""
        return self.config.max_skipped > 0 and not bool(norm.isfinite())

    def _step(self, pairs: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """A step on this process's images. What is random is drawn for the whole batch, whatever the processes.

        Args:
            pairs: whether the objective's statistics have those of matched pairs.

        Returns:
            What :meth:`update` returns.
        """
        config, where = self.config, self._where
        for group in self._optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        self.objective.step = self.step
        self._clock.mark("other")
        images, labels, told = self._batches.take(self.step)
        self._clock.mark("data")
        if where.world == 1:
            return self.update(images, labels, told, pairs=pairs)
        whole = images.new_zeros(()).expand(config.batch, *images.shape[1:])  # the shape of the whole batch
        groups = where.share(config.batch // self.objective.particles)
        draws = self.objective.draw(whole, labels).part(groups.start, groups.stop)
        if not where.first:
            torch.manual_seed(mix(mix(config.seed, self.step), where.rank))  # else dropout would be alike in all processes
        return self.update(images, None if labels is None else labels[where.share(config.batch)], told, draws, pairs=pairs)

    def update(
        self,
        images: Tensor,
        labels: Tensor | None,
        told: Tensor | None = None,
        draws: AnyDraws | None = None,
        *,
        pairs: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step on a batch: loss, gradient, weights, average; random numbers are torch's default generators'.

        Args:
            images: ``[B, C, H, W]``, as the network takes them; of several processes, this one's. labels: ``[B]`` int64, or
                None. told: ``[B, 9]``, how the images were augmented, or None. draws: the objective's for them, or None.
            pairs: see :meth:`imm.objectives.Objective.forward`.

        Returns:
            The objective's statistics of the images, and the norm of the gradient before clipping. The gradient stays in the
            parameters until the next call.

        Raises:
            TrainingError: a gradient that is not finite, when ``max_skipped`` steps were skipped before. With ``max_skipped`` =
                0 there is no look at the gradient; :meth:`run` finds out at its next row.
        """
        self._shards.forget_gradients()  # before the forward, whose memory grows towards its end
        size = self.config.batch_gpu
        if size is None or size >= len(images):
            self._shards.exchanges(True)
            stats = self._accumulate(images, labels, told, draws, 1.0, pairs)
        else:
            particles = self.objective.particles
            draws = self.objective.draw(images, labels) if draws is None else draws
            parts = []
            for start in range(0, len(images), size):
                part = slice(start, start + size)
                share = len(images[part]) / len(images)
                some = draws.part(start // particles, (start + size) // particles)
                of_labels, of_told = (None if given is None else given[part] for given in (labels, told))
                self._shards.exchanges(start + size >= len(images))
                parts.append((share, self._accumulate(images[part], of_labels, of_told, some, share, pairs)))
            stats = combined(parts)
        gradients = self._shards.gradients()
        if self._scaler.is_enabled():
            self._shards.share_nonfinite(gradients)
        self._scaler.unscale_(self._optimizer)
        norm = self._shards.norm(gradients)
        if self._skips(norm):
            self._state.skipped += 1
            if self._state.skipped > self.config.max_skipped:
                raise self._error(f"gradient not finite in step {self.step + 1}, after {self.config.max_skipped} skipped steps")
        else:
            if self.config.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self._shards.parameters, self.config.clip, norm)
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self.ema.update(self.objective.flow_map.network)
        for average in self.averages:
            average.update(self.objective.flow_map.network, self.step + 1)
        self._clock.mark("optimizer")
        return stats, norm

    def _accumulate(
        self, images: Tensor, labels: Tensor | None, told: Tensor | None, draws: AnyDraws | None, share: float, pairs: bool
    ) -> dict[str, Tensor]:
        """Add ``share`` times the gradient of the images' loss; return the objective's statistics."""
        dtype = PRECISIONS[self.config.precision]
        cast = torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with cast:
            grad_scale = None
            if self._scaler.is_enabled() or share != 1.0:
                grad_scale = self._scaler.scale(torch.full((), share, device=self.device))
            loss, stats = self.objective(images, labels, augment=told, grad_scale=grad_scale, draws=draws, pairs=pairs)
        self._clock.mark("forward")
        loss.backward()
        self._clock.mark("backward")
        return stats

    def _log(self, window: Window, on_log: Callable[[dict[str, Any]], None] | None) -> None:
        row = {
            "step": self.step,
            "images": self.step * self.config.batch,
            "lr": self._optimizer.param_groups[0]["lr"],
            **window.row(self.config.batch, self.objective.particles, self._where),
        }
        self._clock.mark("other")
        phases = row["phases"] = self._clock.take()
        if self._matmul_rate:
            busy = sum(seconds for name, seconds in phases.items() if name not in ("watch", "save", "other"))
            flops = self.objective.forwards * self._flops * self.config.batch * window.count
            row["mfu"] = flops / (busy * self._matmul_rate * self._where.world)
        if self.config.max_skipped:
            row["skipped"] = self._state.skipped
        if window.count > window.skipped:
            self._check(row, window)
        if self._where.first:
            append(self.out / STATS_FILE, row)
            if self._watch is not None:
                self._watch.row(row)
        if on_log is not None:
            on_log(row)

    def _check(self, row: dict[str, Any], window: Window) -> None:
        """Raise TrainingError for a row of a broken network."""
        broken = row["nonfinite"] > 0 or row["grad_norm"] is None
        if self._scaler.is_enabled():
            row["loss_scale"] = self._scaler.get_scale()
            # A loss scale skips single steps; a network that is broken for good never recovers.
            broken = row["nonfinite"] == window.count * (self.config.batch // self.objective.particles)
        if broken:
            raise self._error(f"loss or gradient not finite before step {self.step} ({row['nonfinite']} groups)")

    def _error(self, what: str) -> TrainingError:
        self._state.finish()
        saved = self._state.saved_step
        state = "no state was saved" if saved is None else f"the saved state of step {saved} is good"
        return TrainingError(f"{what}; {state}; a new run in another folder may want a smaller lr")


def _compile(network: nn.Module, units: list[Any]) -> None:
    """Compile a network in place, so that its weights keep their names: as a whole, or, where it is sharded, each unit that
    calls no other, because what gathers a unit's weights is not compiled."""
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": _COMPILER}
    if not units:
        for module in outermost(units_of(network)):
            module.compile(**settings)
    blocks = [unit for unit in units if not isinstance(unit, nn.Linear)]
    for unit in blocks:
        if not any(other in unit.modules() for other in blocks if other is not unit):
            unit.forward = torch.compile(unit.forward, **settings)
