"""The energy score (Gneiting and Raftery 2007) of one jump from t_max to t_min, a proper score of N samples x_n given data y.

    2 mean_n |x_n - y| - mean_{n != m} |x_n - x_m|, x_n = f(noise_n | label)

Continuous-token models train so (CALM, EAR). One step is all it learns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.functional import energy_score
from imm.objectives.base import Batch, Objective


class EnergyScore(Objective):
    """The fair energy score of several samples for each image and its label.

    Args:
        samples: N, of the network for each image, 2 or more.
    """

    name = "energy"
    recorded = ("samples",)
    needs_second_time = False

    def __init__(self, flow_map: FlowMap, *, samples: int = 4, label_dropout: float = 0.1, share_dropout: bool = True) -> None:
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        if type(samples) is not int or samples < 2:
            raise ValueError(f"samples: expected a whole number >= 2, got {samples}")
        self.samples = samples
        self.forwards = 3.0 * samples

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.full((groups,), self.flow_map.t_max, dtype=torch.float64, device=device)
        s = torch.full_like(t, self.flow_map.t_min)
        return t, s, s

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        count = self.samples
        each = lambda value: None if value is None else value.repeat_interleave(count, 0)
        t, s = (time.repeat_interleave(count) for time in (batch.draws.t, batch.draws.s))
        repeated = Batch(batch.x, None, each(batch.augment), batch.draws, batch.scale)
        drawn = self._jump(repeated, batch.draws.noise, t, s, each(batch.draws.labels))
        grouped, data = drawn.reshape(len(batch.x), count, -1), batch.x.reshape(len(batch.x), 1, -1)
        unit = 1.0 / (self.flow_map.sigma_data * math.sqrt(data.shape[2]))
        return energy_score(grouped, data.to(grouped.dtype), scale=unit), {}

    def _noise_shape(self, x: Tensor) -> torch.Size:
        return torch.Size((len(x) * self.samples, *x.shape[1:]))
