"""Flow matching (Lipman et al. 2023), the baseline: u(x_t, t, t) learns the conditional velocity v = alpha' x + sigma' eps.

|u(x_t, t, t) - v|^2 / c'_out(t)^2, the mean over features: in units of the network's output, of any parametrization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.objectives.base import Batch, Objective, check_times, mean_square, per_image


class FlowMatching(Objective):
    """The velocity at s = t, which DDIM or Heun integrate. The network may ignore s (``second_time="none"``).

    Args:
        times: of t in (t_min, t_max]: "uniform", or "logit_normal" with logit(t) ~ N(-0.4, 1).
    """

    name = "fm"
    recorded = ("times",)
    needs_second_time = False
    forwards = 3.0

    def __init__(
        self, flow_map: FlowMap, *, times: str = "uniform", label_dropout: float = 0.1, share_dropout: bool = True
    ) -> None:
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        self.times = check_times(times)

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        t = self._random_times(groups, device, generator, self.times)
        return t, t, t

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return velocity_loss(self, batch, batch.draws.t), {}


def velocity_of(objective: Objective, batch: Batch, t: Tensor) -> Tensor:
    """The conditional velocity alpha'_t x + sigma'_t eps of the batch, ``[B, ...]``."""
    schedule = objective.flow_map.schedule
    x, noise = batch.x, batch.draws.noise
    return per_image(schedule.d_alpha(t), x) * x + per_image(schedule.d_sigma(t), x) * noise


def velocity_loss(objective: Objective, batch: Batch, t: Tensor) -> Tensor:
    """|u(x_t, t, t) - v|^2 / c'_out(t)^2 of each image, ``[B]``."""
    flow_map = objective.flow_map
    parametrization, x_t = flow_map.parametrization, flow_map.add_noise(batch.x, batch.draws.noise, t)
    g = objective._network(batch, x_t, t, t, batch.draws.labels)
    unit = parametrization.d_c_out(t)
    u = per_image(parametrization.d_c_skip(t), x_t) * x_t + per_image(unit, x_t) * g
    return mean_square(u - velocity_of(objective, batch, t), unit)
