"""What the studies on points and on short strings share: a small network that sees both times, and its training."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from imm.flow_map import FlowMap
from imm.objectives import Objective
from imm.training import EMA

#: (step, generator) -> the loss.
LossOf = Callable[[int, torch.Generator], Tensor]
#: Of AdamW, reached after so many steps and left for a linear decay half way; of the average of the weights.
_RATE, _WARMUP, _AVERAGE = 2e-3, 100, 0.99


class MLP(nn.Module):
    """x ``[B, D]`` and both times, as sines and cosines, through hidden layers of one width.

    ``given_s=False`` hides s within the network, as ``second_time="none"`` does within the flow map, which IMM refuses.
    """

    num_classes = 0
    frequencies: Tensor

    def __init__(self, dim: int, width: int = 128, depth: int = 3, given_s: bool = True) -> None:
        super().__init__()
        self.given_s = given_s
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(-1, 7, dtype=torch.float64), persistent=False)
        sizes = [dim + 4 * 8, *[width] * depth]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None) -> Tensor:
        phase = torch.cat([time[:, None] * self.frequencies for time in (t, s if self.given_s else torch.zeros_like(s))], 1)
        return self.layers(torch.cat([x, phase.sin().to(x.dtype), phase.cos().to(x.dtype)], 1))


def flow_map(dim: int, seed: int = 0, width: int = 128, given_s: bool = True) -> FlowMap:
    """A flow map of points ``[B, dim]`` with fresh weights."""
    torch.manual_seed(seed)
    return FlowMap(MLP(dim, width, given_s=given_s), time_scale=1.0)


def train(model: FlowMap, loss_of: LossOf, steps: int, seed: int = 0) -> tuple[FlowMap, list[float]]:
    """AdamW: the average of the weights, and the gradient's norm at each step."""
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    rate = lambda step: min(1.0, (step + 1) / _WARMUP, 2 * (1 - step / steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    average, norms = EMA(model, _AVERAGE), []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step, generator).backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        optimizer.step()
        schedule.step()
        average.update(model)
    assert isinstance(average.network, FlowMap)
    return average.network, norms


def fit(objective: Objective, sample: Callable[[torch.Generator], Tensor], steps: int) -> FlowMap:
    """The average of a flow map's weights after training by one of the engine's losses on ``sample(generator)``."""

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        objective.step = step
        return objective(sample(generator).float(), generator=generator)[0]

    return train(objective.flow_map, loss_of, steps)[0]
