"""The energy score (Gneiting and Raftery 2007) of a jump to t_min, a proper score of N samples x_n given the data y.

    2 mean_n |x_n - y| - mean_{n != m} |x_n - x_m|

    x_n = f(noise_n | c), from t_max: one step is all that it learns (CALM and EAR train continuous tokens so);
    x_n = f(x_t, xi_n | c), a network with a latent: N samples of x given one x_t, proper at every t, so that it refines by
    ``restart`` (De Bortoli et al. 2025, distributional diffusion models).

c is the label, or z that a network is conditioned on.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.functional import energy_score
from imm.objectives.base import Batch, Objective, check_share

#: Of the batch at t_max, for a network with a latent.
TOP_SHARE = 0.3


class EnergyScore(Objective):
    """The fair energy score of several samples for each image and its label.

    A network without a latent learns the jump from t_max, each sample from its own noise. One with a latent (``latent_dim``)
    learns the jumps from every t, the samples of an image from one x_t and each its own latent: t_max on ``top_share`` of the
    batch, and else t_max sqrt(u), u uniform.

    Args:
        samples: N, of the network for each image, 2 or more.
        top_share: share of the batch at t_max, for a network with a latent only; None: 0.3.
    """

    name = "energy"
    recorded = ("samples", "top_share")
    needs_second_time = False
    takes_latent = True

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        samples: int = 4,
        top_share: float | None = None,
        label_dropout: float = 0.1,
        share_dropout: bool = True,
    ) -> None:
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        if type(samples) is not int or samples < 2:
            raise ValueError(f"samples: expected a whole number >= 2, got {samples}")
        if top_share is not None and not flow_map.latent_dim:
            raise ValueError(f"top_share: expected None for a network without a latent, got {top_share}")
        self.samples, self.top_share = samples, None if top_share is None else check_share("top_share", top_share)
        self.forwards = 3.0 * samples

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.flow_map.t_min, self.flow_map.t_max
        t = torch.full((groups,), high, dtype=torch.float64, device=device)
        s = torch.full_like(t, low)
        if self.flow_map.latent_dim:
            u = torch.rand((2, groups), dtype=torch.float64, device=device, generator=generator)
            share = TOP_SHARE if self.top_share is None else self.top_share
            t = torch.where(u[0] < share, t, low + (high - low) * (1.0 - u[1]).sqrt())
        return t, s, s

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        count, draws = self.samples, batch.draws
        each = lambda value: value.repeat_interleave(count, 0)
        of = lambda value: None if value is None else each(value)
        start, cond = draws.noise, of(batch.cond)
        if draws.latent is not None and cond is not None:
            start = each(self.flow_map.add_noise(batch.x, start, draws.t))
            cond = torch.cat([cond, draws.latent.to(cond.dtype)], 1)
        repeated = dataclasses.replace(batch, augment=of(batch.augment), cond=cond)
        drawn = self._jump(repeated, start, each(draws.t), each(draws.s), of(draws.labels))
        grouped, data = drawn.reshape(len(batch.x), count, -1), batch.x.reshape(len(batch.x), 1, -1)
        unit = 1.0 / (self.flow_map.sigma_data * math.sqrt(data.shape[2]))
        return energy_score(grouped, data.to(grouped.dtype), scale=unit), {}

    def _noise_shape(self, x: Tensor) -> torch.Size:
        return x.shape if self.flow_map.latent_dim else torch.Size((len(x) * self.samples, *x.shape[1:]))

    def _latent(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        if not self.flow_map.latent_dim:
            return None
        shape = len(x) * self.samples, self.flow_map.latent_dim
        return torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
