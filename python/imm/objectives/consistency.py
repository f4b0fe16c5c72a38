"""Consistency training (Song et al. 2023), IMM with one particle and s = t_min: f_{s,t}(x_t) learns sg f_{s,r}(x_r).

With r -> t by the schedule of easy consistency tuning (Geng et al. 2024, ECT), in terms of eta = sigma / alpha:

    eta_r = eta_t (1 - n(sigma_data eta_t) / 2^stage),  n(u) = 1 + 8 sigmoid(-u),  stage = 1, 2, ... every ``stage_steps`` steps

and the pseudo-Huber distance (Song and Dhariwal 2024), weighted by the gap: (sqrt(|d|^2 + c^2) - c) / (eta_t - eta_r).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.objectives.base import Batch
from imm.objectives.imm import IMM
from imm.schedules import Time, as_time

DISTANCES = ("pseudo_huber", "kernel")
#: c / sqrt(D) of the pseudo-Huber distance (Song and Dhariwal 2024).
_HUBER = 0.00054
#: k and b of ECT's n(eta).
_NEAR, _SLOPE = 8.0, 1.0


class Consistency(IMM):
    """One jump to the data from every time; sampled by ``restart``.

    Args:
        distance: "pseudo_huber", or "kernel": IMM's loss with M = 1, to the bit.
        stage_steps: steps of a stage of ECT's schedule, whose gap halves from one to the next; None for IMM's constant
            mapping (``mapping_kind``, ``k``, ``min_gap``).
        stages: the last stage, which lasts to the end.
        more: of :class:`IMM`; ``kernel``, ``bandwidths``, ``a`` and ``b`` with the distance "kernel".
    """

    name = "consistency"
    recorded = (*(name for name in IMM.recorded if name not in ("particles", "estimator")), "distance", "stage_steps", "stages")
    needs_second_time = False

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        distance: str = "pseudo_huber",
        stage_steps: int | None = 1000,
        stages: int = 8,
        **more: Any,
    ) -> None:
        for name in ("particles", "estimator"):
            if name in more:
                raise TypeError(f"{name}: expected none, a consistency loss has groups of one particle")
        super().__init__(flow_map, particles=1, **more)
        if distance not in DISTANCES:
            raise ValueError(f"unknown distance {distance!r}; expected one of {list(DISTANCES)}")
        if stage_steps is not None and (type(stage_steps) is not int or stage_steps < 1):
            raise ValueError(f"stage_steps: expected a whole number >= 1, or None, got {stage_steps}")
        if type(stages) is not int or not 1 <= stages <= 30:
            raise ValueError(f"stages: expected a whole number from 1 to 30, got {stages}")
        self.distance, self.stage_steps, self.stages = distance, stage_steps, stages

    def mapping(self, t: Time, s: Time) -> Tensor:
        """r(s, t) in float64, of the stage that ``step`` is in."""
        if self.stage_steps is None:
            return super().mapping(t, s)
        t, s = as_time(t), as_time(s)
        stage = min(1 + self.step // self.stage_steps, self.stages)
        eta = self.flow_map.schedule.eta(t)
        share = 1.0 - (1.0 + _NEAR * torch.sigmoid(-_SLOPE * self.flow_map.sigma_data * eta)) / 2.0**stage
        r = self.flow_map.schedule.t_from_eta(eta * share.clamp_min(0.0))
        return torch.maximum(torch.minimum(r, torch.nextafter(t, torch.zeros_like(t))), s)

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        t = self._random_times(groups, device, generator, "uniform")
        s = torch.full_like(t, self.flow_map.t_min)
        t = torch.maximum(t, torch.nextafter(s, torch.ones_like(s)))  # rounding may not make s = t
        return t, s, self.mapping(t, s)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self.distance == "kernel":
            return super().losses(batch)
        flow_map, draws = self.flow_map, batch.draws
        with self._replayed(batch.x) as replay:
            x_t = flow_map.add_noise(batch.x, draws.noise, draws.t)
            y_t = self._jump(batch, x_t, draws.t, draws.s, draws.labels)
            with torch.no_grad(), replay():
                labels = draws.labels if self.target_labels == "dropped" else batch.labels
                y_r = self._jump(batch, flow_map.add_noise(batch.x, draws.noise, draws.r), draws.r, draws.s, labels)
        difference = (y_t - y_r).flatten(1)
        features = difference.shape[1]
        c = _HUBER * math.sqrt(features)
        # (sqrt(|d|^2 + c^2) - c) without cancellation.
        squared = difference.square().sum(1)
        huber = squared / ((squared + c * c).sqrt() + c)
        gap = flow_map.schedule.eta(draws.t) - flow_map.schedule.eta(draws.r)
        return huber / gap.to(huber.dtype), {}
