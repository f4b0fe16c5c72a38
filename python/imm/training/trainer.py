"""The training loop. A step depends on (seed, step) and the state alone: a resumed run repeats an unbroken one exactly."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.backends import PRECISIONS, deterministic
from imm.data import ImageData
from imm.distributed import Exchange, Processes
from imm.files import lock_folder
from imm.flow_map import FlowMap
from imm.objective import Draws, IMMObjective
from imm.training.batches import Batches, mix
from imm.training.config import OPTIMIZERS, TrainConfig, check_fit, settings_of
from imm.training.ema import EMA
from imm.training.state import State
from imm.training.stats import STATS_FILE, Window, combined, trim

#: Of the compiler. Kernels are not chosen by timing them, which a resumed run would do anew. On the CPU a thread takes 8192
#: numbers of a loop or more: to wake it for 512, the default, takes longer than they do.
_COMPILER: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True, "cpp.min_chunk_size": 8192}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and from where it can be resumed."""


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

    A state file in ``out`` is resumed, with the same settings only. The folder is locked against other processes until
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
        self._where = where = Processes() if where is None else where
        check_fit(config, objective, data, where.world)
        self.objective, self.config, self.out = objective, config, Path(out)
        network = objective.flow_map.network
        self._parameters = list(network.parameters())
        self.device = self._parameters[0].device
        self.stop = False  # set it to end the run after the step under way; of several processes, in one of them
        self._exchange: Exchange | None = None
        if where.world > 1:
            self._exchange = where.exchange(self.device)
            self._exchange.take_first(network.state_dict().values())
        self.ema = EMA(network, config.ema)
        self._optimizer = OPTIMIZERS[config.optimizer](
            self._parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        if config.compile:
            network.compile(fullgraph=True, dynamic=False, options=_COMPILER)  # in place: the weights keep their names
        # After all checks of settings, so that a refusal leaves no folder.
        refusal = f"out: expected a folder that the first process can write to, got {out}"
        self._lock = where.in_first(lambda: lock_folder(self.out, shared=True), refusal)
        self._batches = Batches(data, config, self.device, where, labelled=objective.flow_map.num_classes > 0)
        settings = settings_of(config, objective, data, init)
        kept = self.out, objective.flow_map, self.ema, self._optimizer, self._scaler
        self._state = State(*kept, settings, config.keep_every, writes=where.first)
        self.resumed_from = self._state.resume()
        self.step = self.resumed_from or 0
        if not where.alike(str(self.step)):
            raise ValueError(f"out: expected a folder that all processes share, got {out}, whose state some do not find")
        intervals = config.log_every, config.snapshot_every, config.keep_every
        found = {**settings, "data": settings["data"]["sha256"]}
        if not where.alike(f"{found} {intervals}"):
            raise ValueError("settings: expected the same settings and data in all processes, got others in some")
        if where.first:
            trim(self.out, self.resumed_from)

    def close(self) -> None:
        """Let other processes write to the folder; this trainer no longer may."""
        if self._lock is not None:
            self._lock.release(force=True)
            self._lock = None  # else it would be another trainer's, made later, as long as this one

    @property
    def ema_flow_map(self) -> FlowMap:
        """The flow map around the averaged weights."""
        return self._state.average

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
        window = Window()
        with deterministic(tf32=self.config.precision == "tf32"):
            while self.step < steps and not self._where.any(self.stop or time.perf_counter() > end):
                window.add(*self._step())
                self.step += 1
                if on_step is not None:
                    on_step(self.step)
                snapshot = self.step % self.config.snapshot_every == 0 or self._state.stays(self.step)
                if snapshot or self.step % self.config.log_every == 0 or self.step == steps:
                    self._log(window, on_log)
                    window = Window()
                if snapshot:
                    self.save()
            if window.count:
                self._log(window, on_log)
            self.save()

    def save(self) -> None:
        """Write the state to resume from and the averaged flow map as a snapshot, each atomically; those before go."""
        if self.step != self._state.saved_step:
            self._state.write(self.step)
            self._where.wait()

    def _step(self) -> tuple[dict[str, Tensor], Tensor]:
        """A step on this process's images. What is random is drawn for the whole batch, whatever the processes."""
        config, where = self.config, self._where
        for group in self._optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (self.step + 1) / config.warmup) if config.warmup else config.lr
        images, labels, told = self._batches.take(self.step)
        if where.world == 1:
            return self.update(images, labels, told)
        whole = images.new_zeros(()).expand(config.batch, *images.shape[1:])  # the shape of the whole batch
        groups = where.share(config.batch // self.objective.particles)
        draws = self.objective.draw(whole, labels).part(groups.start, groups.stop)
        if not where.first:
            torch.manual_seed(mix(mix(config.seed, self.step), where.rank))  # else dropout would be alike in all processes
        return self.update(images, None if labels is None else labels[where.share(config.batch)], told, draws)

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
            stats = combined(parts)
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
        """Add ``share`` times the gradient of the images' loss; return the objective's statistics."""
        dtype = PRECISIONS[self.config.precision]
        cast = torch.autocast(self.device.type, dtype) if dtype is not None else contextlib.nullcontext()
        with cast:
            grad_scale = None
            if self._scaler.is_enabled() or share != 1.0:
                grad_scale = self._scaler.scale(torch.full((), share, device=self.device))
            loss, stats = self.objective(images, labels, augment=told, grad_scale=grad_scale, draws=draws)
        loss.backward()
        return stats

    def _log(self, window: Window, on_log: Callable[[dict[str, Any]], None] | None) -> None:
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
            saved = self._state.saved_step
            state = "no state was saved" if saved is None else f"the saved state of step {saved} is good"
            raise TrainingError(
                f"loss or gradient not finite before step {self.step} ({row['nonfinite']} groups); {state}; "
                "a new run in another folder may want a smaller lr"
            )
        if self._where.first:
            with open(self.out / STATS_FILE, "a") as file:
                file.write(json.dumps(row) + "\n")
        if on_log is not None:
            on_log(row)
