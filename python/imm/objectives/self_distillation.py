"""Self-distillation (Boffi, Albergo, Vanden-Eijnden 2025): a jump learns from the map itself, the velocity from the data.

    progressive: |f_{s,t}(x_t) - sg f_{s,r}(f_{r,t}(x_t))|^2 / c_out(s, t)^2
    lagrangian:  |d/ds f_{s,t}(x_t) - sg u(f_{s,t}(x_t), s, s)|^2 / c'_out(s)^2

on a share of the batch, and flow matching on the rest.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.objectives.base import (
    Batch,
    Objective,
    apart,
    check_share,
    check_times,
    evenly,
    least_part,
    mean_square,
    per_image,
    without_wait,
)
from imm.objectives.flow_matching import velocity_loss

KINDS = ("progressive", "lagrangian")


class SelfDistillation(Objective):
    """Progressive or Lagrangian self-distillation.

    Args:
        kind: "progressive": two jumps through a time r in between; "lagrangian": the equation of motion. The latter
            differentiates through a tangent of the network, which fused ops do not allow: a network with a plain form is
            switched to it, with a warning.
        fm_share: share of the batch that learns the velocity.
        times: distribution of t and s.
    """

    recorded = ("fm_share", "times")

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        kind: str = "progressive",
        fm_share: float = 0.75,
        times: str = "uniform",
        label_dropout: float = 0.1,
        share_dropout: bool = True,
    ) -> None:
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; expected one of {list(KINDS)}")
        self.name = self.kind = kind
        self.fm_share, self.times = check_share("fm_share", fm_share), check_times(times)
        # A tangent costs a forward, and the gradient through both four.
        self.least_part = least_part(self.fm_share)
        self.forwards = 3.0 + (2.0 if kind == "progressive" else 4.0) * (1.0 - self.fm_share)
        self.compiles = kind != "lagrangian"
        if kind == "lagrangian":
            for module in flow_map.modules():
                if getattr(module, "fused", False):
                    module.fused = False  # type: ignore[assignment]
                    warnings.warn(
                        f"{type(module).__name__}: switched to its plain form, which the lagrangian loss differentiates twice",
                        stacklevel=2,
                    )

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and an r in between; t = s = r where the image is flow matching's."""
        t, s = self._pair(groups, device, generator, self.times)
        r = s + (t - s) * torch.rand(groups, dtype=torch.float64, device=device, generator=generator)
        jumps = without_wait(self._jumps(groups), device)
        return t, torch.where(jumps, s, t), torch.where(jumps, r, t)

    def _jumps(self, groups: int) -> Tensor:
        return ~evenly(groups, self.fm_share)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.kind == "progressive":
            return jump_loss(self, batch), {}
        of_jumps, of_rest = (lambda some: _lagrangian(self, some)), (lambda some: velocity_loss(self, some, some.draws.t))
        return apart(batch, of_jumps, of_rest), {}


def jump_loss(objective: Objective, batch: Batch) -> Tensor:
    """``[B]``: |f_{s,t} - sg f_{s,r} o f_{r,t}|^2 / c_out^2 where s < t, and flow matching where s = t."""
    of_jumps, of_rest = (lambda some: _composed(objective, some)), (lambda some: velocity_loss(objective, some, some.draws.t))
    return apart(batch, of_jumps, of_rest)


def _composed(objective: Objective, batch: Batch) -> Tensor:
    t, s, r = batch.draws.t, batch.draws.s, batch.draws.r
    flow_map, labels = objective.flow_map, batch.draws.labels
    x_t = flow_map.add_noise(batch.x, batch.draws.noise, t)
    with objective._replayed(batch.x) as replay:
        y = objective._jump(batch, x_t, t, s, labels)
        with torch.no_grad():
            with replay():
                between = objective._jump(batch, x_t, t, r, labels)
            with replay():
                target = objective._jump(batch, between, r, s, labels)
    return mean_square(y - target, flow_map.parametrization.c_out(s, t))


def _lagrangian(objective: Objective, batch: Batch) -> Tensor:
    t, s, labels = batch.draws.t, batch.draws.s, batch.draws.labels
    flow_map = objective.flow_map
    parametrization, x_t = flow_map.parametrization, flow_map.add_noise(batch.x, batch.draws.noise, t)
    with objective._replayed(batch.x) as replay:
        to = lambda time: objective._jump(batch, x_t, t, time, labels)
        y, motion = torch.func.jvp(to, (s,), (torch.ones_like(s),))  # type: ignore[misc]
        with torch.no_grad(), replay():
            y = y.detach()
            g = objective._network(batch, y, s, s, labels)
            velocity = per_image(parametrization.d_c_skip(s), y) * y + per_image(parametrization.d_c_out(s), y) * g
    return mean_square(motion - velocity, parametrization.d_c_out(s))
