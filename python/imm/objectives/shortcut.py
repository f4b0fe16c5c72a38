"""Shortcut models (Frans et al. 2025): a jump of 2 d learns two of d, for steps that are powers of two; the rest is fm.

    |f_{t-2d,t}(x_t) - sg f_{t-2d,t-d}(f_{t-d,t}(x_t))|^2 / c_out(t-2d, t)^2, d = 2^-1 .. 2^-7 of the range of times.

In Euler-FM that is |u(x_t, t, t-2d) - sg (u(x_t, t, t-d) + u(x', t-d, t-2d)) / 2|^2 / sigma_d^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.objectives.base import Batch, Objective, check_share, evenly, least_part, without_wait
from imm.objectives.self_distillation import jump_loss


class Shortcut(Objective):
    """Halves on a share of the batch, flow matching on the rest. Sampled with a power of two of equal steps.

    Args:
        bootstrap: share of the batch that learns jumps from their halves.
        depth: the smallest d is 2^-depth of [t_min, t_max].
    """

    name = "shortcut"
    recorded = ("bootstrap", "depth")

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        bootstrap: float = 0.25,
        depth: int = 7,
        label_dropout: float = 0.1,
        share_dropout: bool = True,
    ) -> None:
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        self.bootstrap = check_share("bootstrap", bootstrap)
        if type(depth) is not int or not 1 <= depth <= 20:
            raise ValueError(f"depth: expected a whole number from 1 to 20, got {depth}")
        self.depth = depth
        self.least_part = least_part(self.bootstrap)
        self.forwards = 3.0 + 2.0 * self.bootstrap

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t, s = t - 2 d and r = t - d; t = s = r where the image is flow matching's."""
        low, high = self.flow_map.t_min, self.flow_map.t_max
        u = torch.rand((3, groups), dtype=torch.float64, device=device, generator=generator)
        count = 2.0 ** (u[0] * self.depth).floor().clamp_max(self.depth - 1)  # jumps of 2 d in the range
        index = (u[1] * count).floor().clamp_max(count - 1)
        s, t = (low + (high - low) * place / count for place in (index, index + 1))
        t = t.clamp_max(high)
        r = 0.5 * (s + t)
        alone = high - (high - low) * u[2]
        halves = without_wait(self._jumps(groups), device)
        return tuple(torch.where(halves, time, alone) for time in (t, s, r))  # type: ignore[return-value]

    def _jumps(self, groups: int) -> Tensor:
        return evenly(groups, self.bootstrap)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return jump_loss(self, batch), {}
