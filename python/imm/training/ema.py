"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """``network``: a copy whose parameters follow ``ema <- beta ema + (1 - beta) live`` (the paper's 0.9999, no warm-up)."""

    def __init__(self, live: nn.Module, beta: float) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"ema: expected beta in [0, 1), got {beta}")
        self.beta = beta
        self.network = copy.deepcopy(live).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, live: nn.Module) -> None:
        """One step towards the live weights; buffers are copied."""
        torch._foreach_lerp_(list(self.network.parameters()), list(live.parameters()), 1.0 - self.beta)
        for mine, other in zip(self.network.buffers(), live.buffers(), strict=True):
            mine.copy_(other)
