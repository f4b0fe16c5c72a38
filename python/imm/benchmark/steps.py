"""One training step as peers: the trainer's, the same in plain torch (eager, compiled, float64), as one CUDA graph, in parts.

Every call draws the same numbers and starts from the same weights: the learning rate is one that no weight of float32 can
follow, and the optimizer does all its work nevertheless. So every call must give the loss and the gradients of the first.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imm.benchmark.case import Peer, Step
from imm.benchmark.graphs import capture
from imm.benchmark.losses import plain_mmd
from imm.data import ImageData
from imm.flow_map import FlowMap
from imm.functional import flow_map_mmd_loss
from imm.networks import DiT
from imm.objective import IMMObjective
from imm.presets import Preset
from imm.training import EMA, TrainConfig, Trainer
from imm.training.trainer import OPTIMIZERS

DRAW, LEARNS, TARGET = "part: times, noise, x_t, x_r", "part: network with gradient", "part: network without gradient"
LOSS, BACKWARD, OPTIMIZER, AVERAGE = "part: loss", "part: backward", "part: norm, optimizer", "part: EMA"

SEED = 0
LEARNING_RATE = 1e-30
BETA = 0.9999
_GROUPS_AT_ONCE = 4  # of the run in float64
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

    def copied(self, *, fused: bool = True) -> nn.Module:
        """A copy of the network to train; a DiT in one of its two forms."""
        made = copy.deepcopy(self.network()).requires_grad_()
        if isinstance(made, DiT):
            made.fused = fused
        return made

    def objective(self, made: nn.Module) -> IMMObjective:
        settings = {**self.preset.objective, "particles": self.particles}
        return IMMObjective(FlowMap(made, **self.preset.flow_map), **settings).train()

    def autocast(self, device: torch.device) -> torch.autocast:
        """As the trainer's ``precision`` has it."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def outputs(self, made: nn.Module, loss: Tensor) -> tuple[Tensor, ...]:
        """What is compared: the loss and two gradients."""
        grads = (made.get_parameter(name).grad for name in self.watched)
        return (loss.detach(), *(grad for grad in grads if grad is not None))


class Draws(NamedTuple):
    """The random numbers of a step, drawn in the objective's order; times are [G]."""

    t: Tensor
    s: Tensor
    r: Tensor
    eps: Tensor
    dropped: Tensor | None

    @classmethod
    def of(cls, objective: IMMObjective, x: Tensor, labels: Tensor | None) -> Draws:
        torch.manual_seed(SEED)
        times = objective.sample_times(len(x) // objective.particles, x.device)
        eps = torch.randn(x.shape, dtype=x.dtype, device=x.device) * objective.flow_map.sigma_data
        return cls(*times, eps, objective._drop_labels(labels, None))


def plain_losses(
    objective: IMMObjective,
    network: Callable[..., Tensor],
    mmd: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor | None,
    draws: Draws,
) -> Tensor:
    """The loss of each group in torch's operations and x's dtype: x_t and x_r, particles, broadcast MMD, weight."""
    flow_map, particles = objective.flow_map, objective.particles
    schedule, form = flow_map.schedule, flow_map.parametrization

    def branch(time: Tensor, branch_labels: Tensor | None) -> Tensor:
        t, s = time.repeat_interleave(particles), draws.s.repeat_interleave(particles)
        column = lambda values: values.to(x.dtype)[:, None, None, None]
        state = column(schedule.alpha(t)) * x + column(schedule.sigma(t)) * draws.eps.to(x.dtype)
        g = network(column(form.c_in(t)) * state, *flow_map.network_times(t, s), branch_labels)
        y = column(form.c_skip(s, t)) * state + column(form.c_out(s, t)) * g
        return y.reshape(len(time), particles, -1)

    y_t = branch(draws.t, draws.dropped)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y_r = branch(draws.r, labels)
    return objective.weight(draws.t).to(x.dtype) * mmd(y_t, y_r, objective.kernel_scale(draws.t, draws.s).to(x.dtype))


def plain_step(training: Training, x: Tensor, labels: Tensor | None, *, compiled: bool = False) -> Step:
    """The step in torch alone: the network's plain form, broadcast MMD, torch.optim, the average parameter by parameter."""
    own = training.copied(fused=False)
    objective, average = training.objective(own), copy.deepcopy(own)
    optimizer = _PLAIN_OPTIMIZERS[training.optimizer](own.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    network, mmd = (torch.compile(own), torch.compile(plain_mmd)) if compiled else (own, plain_mmd)

    def step() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        draws = Draws.of(objective, x, labels)
        with training.autocast(x.device):
            loss = plain_losses(objective, network, mmd, x, labels, draws).mean()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, live in zip(average.parameters(), own.parameters(), strict=True):
                mine.lerp_(live, 1.0 - BETA)
        return training.outputs(own, loss)

    return step


def exact_outputs(training: Training, x: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    """Loss and gradients of the plain step in float64, a few groups at a time: a whole batch may not fit."""
    own = training.copied(fused=False).double()
    objective, groups = training.objective(own), len(x) // training.particles
    draws, total = Draws.of(objective, x, labels), torch.zeros((), dtype=torch.float64, device=x.device)
    for first in range(0, groups, _GROUPS_AT_ONCE):
        few = slice(first, first + _GROUPS_AT_ONCE)
        images = slice(few.start * training.particles, few.stop * training.particles)
        of_images = lambda values, images=images: None if values is None else values[images]
        chunk = Draws(draws.t[few], draws.s[few], draws.r[few], draws.eps[images], of_images(draws.dropped))
        loss = plain_losses(objective, own, plain_mmd, x[images].double(), of_images(labels), chunk).sum() / groups
        loss.backward()
        total += loss.detach()
    return training.outputs(own, total)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Convolutions as in :meth:`imm.training.Trainer.run`."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def trainer_step(training: Training, x: Tensor, labels: Tensor | None) -> Step:
    """The step of :class:`imm.training.Trainer` on a batch that is there."""
    own = training.copied()
    objective = training.objective(own)
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[training.dtype]
    config = TrainConfig(len(x), training.optimizer, LEARNING_RATE, ema=BETA, precision=precision)
    data = ImageData(x, labels, objective.flow_map.num_classes, "random numbers")
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(objective, data, folder, config)

    def step() -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        with _deterministic():
            stats, _ = trainer.update(x, labels)
        return training.outputs(own, stats["loss"])

    return step


def captured_step(training: Training, x: Tensor, labels: Tensor | None) -> Step:
    """What the trainer does from the draws to the average, captured in one CUDA graph and replayed."""
    own = training.copied()
    objective, ema = training.objective(own), EMA(own, BETA)
    objective.share_dropout = False  # a generator's state cannot be read within a capture; there is no dropout to share
    optimizer = OPTIMIZERS[training.optimizer](own.parameters(), lr=LEARNING_RATE, weight_decay=0.0, capturable=True)

    def update() -> tuple[Tensor, ...]:
        optimizer.zero_grad(set_to_none=True)
        with training.autocast(x.device):
            loss, _ = objective(x, labels)
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in own.parameters() if p.grad is not None])
        optimizer.step()
        ema.update(own)
        return training.outputs(own, loss)

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _deterministic():
        for _ in range(3):  # what libraries and the optimizer allocate once is not made within the capture
            update()
    torch.cuda.current_stream().wait_stream(side)
    with _deterministic(), capture(graph):
        outputs = update()
    # What the graph reads and writes besides memory of its own lives as long as the step.
    return functools.partial(_replayed, graph, outputs, (objective, ema, optimizer, x, labels))


def _replayed(graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...], kept: tuple[object, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(SEED)  # a replay takes its numbers from where the generator stands
    graph.replay()
    return outputs


def parts(training: Training) -> dict[str, Peer]:
    """What a step of the trainer consists of, each alone; together they take about as long as the step."""
    particles = training.particles

    @functools.cache
    def shared() -> IMMObjective:
        return training.objective(training.copied())

    @torch.no_grad()
    def states(x: Tensor, draws: Draws) -> list[Tensor]:
        every = (time.repeat_interleave(particles) for time in (draws.t, draws.r))
        return [shared().flow_map.add_noise(x, draws.eps, time) for time in every]

    def network(x: Tensor, labels: Tensor | None, *, learns: bool) -> Callable[[], Tensor]:
        draws = Draws.of(shared(), x, labels)
        state = states(x, draws)[0 if learns else 1]
        t, s = ((draws.t if learns else draws.r).repeat_interleave(particles), draws.s.repeat_interleave(particles))
        given = draws.dropped if learns else labels

        def call() -> Tensor:
            cast = training.autocast(x.device) if learns else contextlib.nullcontext()
            with torch.set_grad_enabled(learns), cast:
                return shared().flow_map.network_output(state, t, s, given)[0]

        return call

    def draw(x: Tensor, labels: Tensor | None) -> Step:
        return lambda: tuple(states(x, Draws.of(shared(), x, labels)))

    def learns(x: Tensor, labels: Tensor | None) -> Step:
        call = network(x, labels, learns=True)
        return lambda: (call().detach(),)

    def target(x: Tensor, labels: Tensor | None) -> Step:
        call = network(x, labels, learns=False)
        return lambda: (call(),)

    def loss(x: Tensor, labels: Tensor | None) -> Step:
        objective, groups = shared(), len(x) // particles
        draws, form = Draws.of(objective, x, labels), objective.flow_map.parametrization
        x_t, x_r, g_r, g_t = (
            value.reshape(groups, particles, -1)
            for value in (
                *states(x, draws),
                network(x, labels, learns=False)(),
                network(x, labels, learns=True)().detach(),
            )
        )
        g_t.requires_grad_()
        t, s, r = draws[:3]

        def step() -> tuple[Tensor, ...]:
            columns = form.c_skip(s, t), form.c_out(s, t), form.c_skip(s, r), form.c_out(s, r)
            upstream = torch.full((1,), 1.0 / groups, dtype=torch.float64, device=x.device)
            scale, weight = objective.kernel_scale(t, s), objective.weight(t)
            losses = flow_map_mmd_loss(x_t, x_r, g_t, g_r, *columns, scale, weight=weight, upstream=upstream)
            return (losses.detach().mean(),)

        return step

    def backward(x: Tensor, labels: Tensor | None) -> Step:
        g_t, own = network(x, labels, learns=True)(), shared().flow_map.network
        grad = torch.randn_like(g_t) / g_t.numel()

        def step() -> tuple[Tensor, ...]:
            own.zero_grad(set_to_none=True)
            g_t.backward(grad, retain_graph=True)
            return ()

        return step

    def optimizer(x: Tensor, labels: Tensor | None) -> Step:
        own = training.copied()  # a step of the shared one would spoil the graph that is kept for backward
        kept = OPTIMIZERS[training.optimizer](own.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        for parameter in own.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)

        def step() -> tuple[Tensor, ...]:
            norm = torch.nn.utils.get_total_norm([p.grad for p in own.parameters() if p.grad is not None])
            kept.step()
            return (norm,)

        return step

    def average(x: Tensor, labels: Tensor | None) -> Step:
        own = shared().flow_map.network
        ema = EMA(own, BETA)

        def step() -> tuple[Tensor, ...]:
            ema.update(own)
            return ()

        return step

    every: tuple[Peer, ...] = (draw, learns, target, loss, backward, optimizer, average)
    return dict(zip((DRAW, LEARNS, TARGET, LOSS, BACKWARD, OPTIMIZER, AVERAGE), every, strict=True))
