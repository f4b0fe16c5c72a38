"""The Laplace MMD as training scripts have it, and a loss as a training loop calls it: what op files and whole steps share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.case import Peer, Step

EPS = 1e-8


def loss_of(mean_kernel: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Squared MMD of each group from the means ``[G]`` of a kernel over all pairs."""
    return lambda y_t, y_r: mean_kernel(y_t, y_t) + mean_kernel(y_r, y_r) - 2 * mean_kernel(y_t, y_r)


def plain_mmd(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Tensor:
    """Eq. 67 for the Laplace kernel with every difference in memory: y_t, y_r ``[G, M, D]``, scale ``[G]`` -> ``[G]``."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(EPS**2).sqrt()  # [G, M, M]
        return torch.exp(-scale[:, None, None] * distance / x.shape[2]).mean((1, 2))

    return loss_of(mean_kernel)(y_t, y_r)


def trained_with(loss: Callable[..., Tensor], learned: int = 0) -> Peer:
    """A peer as a training loop calls it: loss ``[G]``, backward to input ``learned``, a fresh gradient each step."""

    def prepare(*inputs: Any) -> Step:
        leaf = inputs[learned].detach().requires_grad_()
        given = (*inputs[:learned], leaf, *inputs[learned + 1 :])

        def step() -> tuple[Tensor, ...]:
            leaf.grad = None
            value = loss(*given)
            value.sum().backward()
            assert leaf.grad is not None
            return value.detach(), leaf.grad

        return step

    return prepare
