"""MeanFlow (Geng et al. 2025): the average velocity u over [s, t] obeys u = v - (t - s) D u, D the derivative along the path.

    meanflow:  |u(x_t, t, s) - sg (v - (t - s) D u)|^2,            D u = du/dt by tangents (v, 1, 0) of (x, t, s)
    improved:  |u + (t - s) sg D u - v|^2, the tangent of x being u(x_t, t, t) (Geng et al. 2025, improved mean flows)

with the adaptive weight 1 / sg(error + c)^p. The conditional velocity v is the data's; there is no guidance within training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.objectives.base import Batch, Objective, apart, check_share, check_times, evenly, least_part, per_image, without_wait
from imm.objectives.flow_matching import velocity_of

DERIVATIVES = ("jvp", "difference")


class MeanFlow(Objective):
    """MeanFlow for the parametrization "euler_fm", whose u is sigma_d G.

    Make the flow map with ``time_scale=1``: the derivative in t of a network that sees 1,000 t is so large that training falls
    far behind (docs/learn/losses.md).

    Args:
        derivative: "jvp" (forward mode) or "difference", two more forwards: (u(+h) - u(-h)) / 2 h along the path.
        step_size: h, in units of t: small beside the shortest period that the network sees in t, which is 2 pi / time_scale.
        improved: the improved form: the network's own velocity is the tangent, and the loss regresses the data's.
        fm_share: share of the batch with s = t. times: distribution of t and s.
        power, floor: p and c of the adaptive weight, of the mean over features in units of sigma_data^2; p = 0 for none.
    """

    name = "meanflow"
    recorded = ("derivative", "step_size", "improved", "fm_share", "times", "power", "floor")

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        derivative: str = "jvp",
        step_size: float = 5e-4,
        improved: bool = False,
        fm_share: float = 0.75,
        times: str = "logit_normal",
        power: float = 1.0,
        floor: float = 1e-2,
        label_dropout: float = 0.1,
        share_dropout: bool = True,
    ) -> None:
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        if flow_map.parametrization.name != "euler_fm":
            raise ValueError(f'parametrization: expected "euler_fm" for meanflow, got {flow_map.parametrization.name!r}')
        if derivative not in DERIVATIVES:
            raise ValueError(f"unknown derivative {derivative!r}; expected one of {list(DERIVATIVES)}")
        if not 0.0 < step_size < 0.5:
            raise ValueError(f"step_size: expected a number in (0, 0.5), got {step_size}")
        if not 0.0 <= power <= 2.0 or not floor > 0.0:
            raise ValueError(f"power and floor: expected 0 <= power <= 2 and floor > 0, got {power} and {floor}")
        self.derivative, self.step_size, self.improved = derivative, float(step_size), improved
        self.fm_share, self.times = check_share("fm_share", fm_share), check_times(times)
        self.power, self.floor = float(power), float(floor)
        self.least_part = least_part(self.fm_share)
        self.forwards = 3.0 + ((1.0 if derivative == "jvp" else 2.0) + improved) * (1.0 - self.fm_share)
        self.compiles = derivative == "difference"

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t and s, which is t on ``fm_share`` of the batch; r = s."""
        t, s = self._pair(groups, device, generator, self.times)
        s = torch.where(without_wait(self._jumps(groups), device), s, t)
        return t, s, s

    def _jumps(self, groups: int) -> Tensor:
        return ~evenly(groups, self.fm_share)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        # Where s = t the equation is u = v: no derivative, the network once.
        squared = apart(batch, lambda some: self._squared(some, jump=True), lambda some: self._squared(some, jump=False))
        return squared / (squared.detach() + self.floor) ** self.power, {}

    def _squared(self, batch: Batch, jump: bool) -> Tensor:
        """The mean over features of the squared error in units of sigma_data, ``[B]``. The gradient of both forms is that of
        the error through u alone."""
        t, s = batch.draws.t, batch.draws.s
        x_t = self.flow_map.add_noise(batch.x, batch.draws.noise, t)
        v = velocity_of(self, batch, t)
        if jump:
            u, change = self._average(batch, x_t, v)
            error = u + per_image(t - s, u) * change.detach() - v
        else:
            error = self.flow_map.sigma_data * self._network(batch, x_t, t, t, batch.draws.labels) - v
        return (error / self.flow_map.sigma_data).flatten(1).square().mean(1)

    def _average(self, batch: Batch, x_t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """u(x_t, t, s) and its derivative D u along the path."""
        t, s, labels = batch.draws.t, batch.draws.s, batch.draws.labels
        average = lambda x, time, until=s: self.flow_map.sigma_data * self._network(batch, x, time, until, labels)
        along = v
        with self._replayed(batch.x) as replay:
            if self.improved:
                with torch.no_grad(), replay():
                    along = average(x_t, t, t)
            if self.derivative == "jvp":
                with replay():
                    tangents = along.to(x_t.dtype), torch.ones_like(t)
                    u, change = torch.func.jvp(average, (x_t, t), tangents)  # type: ignore[misc]
                return u, change
            with replay():
                u = average(x_t, t)
            ends, h = [], self.step_size
            for sign in (1.0, -1.0):
                with torch.no_grad(), replay():
                    ends.append(average(x_t + sign * h * along, t + sign * h))
            return u, (ends[0] - ends[1]) / (2.0 * h)
