"""One training step as peers: the trainer's, the same in plain torch (eager, compiled, float64); that of MeanFlow.

Every call draws the same numbers and starts from the same weights: the learning rate is one that no weight of float32 can
follow, and the optimizer does all its work nevertheless. So every call must give the loss and the gradients of the first.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.case import Step
from harness.networks import plain_mmd
from imm.backends import deterministic
from imm.data import ImageData
from imm.flow_map import FlowMap
from imm.networks import DiT
from imm.objectives import IMM, OBJECTIVES, Draws, Objective
from imm.presets import Preset
from imm.training import TrainConfig, Trainer

Function = Callable[..., Tensor]
SEED = 0
LEARNING_RATE = 1e-30
BETA = 0.9999
_PLAIN_OPTIMIZERS = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    network: gives the network, whose copies the peers train; without dropout, which torch, its compiler and each dtype draw in
    their own ways, so that no check would tell a wrong step from a right one. preset: of flow map and objective. particles: M.
    optimizer: a name of the trainer's. dtype: float32, or that of autocast. watched: the parameters whose gradients are
    compared.
    """

    network: Callable[[], nn.Module]
    preset: Preset
    particles: int
    optimizer: str
    dtype: torch.dtype
    watched: tuple[str, str]

    def flow_map(self, *, fused: bool = True) -> FlowMap:
        """Around a copy of the network to train; a DiT in one of its two forms."""
        made = copy.deepcopy(self.network()).requires_grad_()
        if isinstance(made, DiT):
            made.fused = fused
        return FlowMap(made, **self.preset.flow_map)

    def objective(self, *, fused: bool = True) -> IMM:
        settings = {**self.preset.objective, "particles": self.particles}
        return IMM(self.flow_map(fused=fused), **settings).train()

    def outputs(self, objective: Objective, loss: Tensor) -> tuple[Tensor, ...]:
        """What is compared: the loss and two gradients."""
        grads = (objective.flow_map.network.get_parameter(name).grad for name in self.watched)
        return (loss.detach(), *(grad for grad in grads if grad is not None))


def drawn(objective: Objective, x: Tensor, labels: Tensor | None) -> Draws:
    """The random numbers of a step, the same at each call."""
    torch.manual_seed(SEED)
    return objective.draw(x, labels)


def plain_losses(objective: IMM, network: Function, mmd: Function, x: Tensor, labels: Tensor | None, draws: Draws) -> Tensor:
    """The loss of each group in torch's operations and x's dtype: x_t and x_r, particles, broadcast MMD, weight."""
    flow_map, particles = objective.flow_map, objective.particles
    schedule, form = flow_map.schedule, flow_map.parametrization

    def branch(time: Tensor, branch_labels: Tensor | None) -> Tensor:
        t, s = time.repeat_interleave(particles), draws.s.repeat_interleave(particles)
        column = lambda values: values.to(x.dtype)[:, None, None, None]
        state = column(schedule.alpha(t)) * x + column(schedule.sigma(t)) * draws.noise.to(x.dtype)
        g = network(column(form.c_in(t)) * state, *flow_map.network_times(t, s), branch_labels)
        y = column(form.c_skip(s, t)) * state + column(form.c_out(s, t)) * g
        return y.reshape(len(time), particles, -1)

    y_t = branch(draws.t, draws.labels)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y_r = branch(draws.r, labels)
    return objective.weight(draws.t).to(x.dtype) * mmd(y_t, y_r, objective.kernel_scale(draws.t, draws.s).to(x.dtype))


def plain_step(training: Training, x: Tensor, labels: Tensor | None, *, compiled: bool = False) -> Step:
    """The step in torch alone: the network's plain form, broadcast MMD, torch.optim, the average parameter by parameter."""
    objective = training.objective(fused=False)
    own, average = objective.flow_map.network, copy.deepcopy(objective.flow_map.network)
    optimizer = _PLAIN_OPTIMIZERS[training.optimizer](own.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    network, mmd = (torch.compile(own), torch.compile(plain_mmd)) if compiled else (own, plain_mmd)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        draws = drawn(objective, x, labels)
        with torch.autocast(x.device.type, training.dtype, enabled=training.dtype != torch.float32):  # as in the trainer
            loss = plain_losses(objective, network, mmd, x, labels, draws).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, live in zip(average.parameters(), own.parameters(), strict=True):
                mine.lerp_(live, 1.0 - BETA)
        return training.outputs(objective, loss)

    return step


def exact_outputs(training: Training, x: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    """Loss and gradients of the plain step in float64, four groups at a time: a whole batch may not fit."""
    objective, total = training.objective(fused=False).double(), torch.zeros((), dtype=torch.float64, device=x.device)
    groups, draws = len(x) // training.particles, drawn(objective, x, labels)
    for first in range(0, groups, 4):
        images = slice(first * training.particles, (first + 4) * training.particles)
        part, of_images = draws.part(first, first + 4), None if labels is None else labels[images]
        loss = (
            plain_losses(objective, objective.flow_map.network, plain_mmd, x[images].double(), of_images, part).sum() / groups
        )
        loss.backward()
        total += loss.detach()
    return training.outputs(objective, total)


def trainer_step(training: Training, x: Tensor, labels: Tensor | None, *, compiled: bool = False) -> Step:
    """The step of :class:`imm.training.Trainer` on a batch that is there."""
    objective = training.objective()
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[training.dtype]
    config = TrainConfig(len(x), training.optimizer, LEARNING_RATE, ema=BETA, precision=precision, compile=compiled)
    data = ImageData(x, labels, objective.flow_map.num_classes, "random numbers")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(objective, data, folder, config)

    def step() -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        with deterministic(tf32=False):  # as in Trainer.run
            stats, _ = trainer.update(x, labels)
        return training.outputs(objective, stats["loss"])

    return step


def bare_step(training: Training, x: Tensor, labels: Tensor | None, *, loss: str, fused: bool = True, **settings: Any) -> Step:
    """Forward and backward of a loss, with its settings, without the optimizer."""
    objective = OBJECTIVES[loss](training.flow_map(fused=fused), **settings).train()

    def step() -> tuple[Tensor, ...]:
        objective.zero_grad(set_to_none=True)
        value, _ = objective(x, labels, draws=drawn(objective, x, labels))
        value.backward()
        return training.outputs(objective, value)

    return step


def exact_bare_step(training: Training, x: Tensor, labels: Tensor, *, loss: str, **settings: Any) -> tuple[Tensor, ...]:
    """The same of the plain network in float64, an image at a time."""
    objective = OBJECTIVES[loss](training.flow_map(fused=False), **settings).train().double()
    draws, total = drawn(objective, x, labels), torch.zeros((), dtype=torch.float64, device=x.device)
    for i in range(len(x)):
        part = draws.part(i, i + 1)
        one, _ = objective(x[i : i + 1].double(), labels[i : i + 1], draws=replace(part, noise=part.noise.double()))
        (one / len(x)).backward()
        total += one.detach() / len(x)
    return training.outputs(objective, total)
