"""Distances between sets of points in few dimensions, and between distributions over few values."""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of the first set at a time.
_ROWS = 1024


def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|x - y| - E|x - x'| - E|y - y'|`` of two sets, unbiased: 0 in the mean for sets of one law (Szekely and Rizzo 2013).

    Args:
        x: ``[N, D]``. y: ``[M, D]``. Both with two points or more; computed in float64.

    Raises:
        ValueError: shapes other than these.
    """
    x, y = _checked(x, y)
    count, other = len(x), len(y)
    within = _total(x, x) / (count * (count - 1)) + _total(y, y) / (other * (other - 1))
    return float(2.0 * _total(x, y) / (count * other) - within)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 128, generator: torch.Generator | None = None) -> float:
    """The 2-Wasserstein distance of projections onto random directions, root of the mean square (Bonneel et al. 2015).

    Args:
        x: ``[N, D]``. y: ``[M, D]``. directions: their number. generator: of the directions.

    Raises:
        ValueError: shapes other than these.
    """
    x, y = _checked(x, y)
    if directions < 1:
        raise ValueError(f"directions: expected a count >= 1, got {directions}")
    unit = torch.randn(x.shape[1], directions, dtype=torch.float64, device=x.device, generator=generator)
    unit = unit / unit.norm(dim=0)
    first, second = (value @ unit for value in (x, y))
    if len(x) == len(y):
        gaps = first.sort(0).values - second.sort(0).values
    else:
        quantiles = (torch.arange(max(len(x), len(y)), dtype=torch.float64, device=x.device) + 0.5) / max(len(x), len(y))
        gaps = torch.quantile(first, quantiles, dim=0) - torch.quantile(second, quantiles, dim=0)
    return float(gaps.square().mean().sqrt())


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of ``|p - q|`` of two distributions over the same values, given as shares or as counts of any total.

    Raises:
        ValueError: shapes that differ, negative numbers, nothing at all.
    """
    if p.shape != q.shape or bool((p < 0).any()) or bool((q < 0).any()) or not float(p.sum()) > 0 or not float(q.sum()) > 0:
        raise ValueError(f"p and q: expected shares or counts of the same values, got {list(p.shape)} and {list(q.shape)}")
    return float(0.5 * (p.double() / p.double().sum() - q.double() / q.double().sum()).abs().sum())


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x and y: expected [N, D] and [M, D] with two points or more, got {list(x.shape)} and {list(y.shape)}"
        )
    return x.double(), y.double()


def _total(x: Tensor, y: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"  # the other form loses close pairs
    return torch.stack([torch.cdist(part, y, compute_mode=exact).sum() for part in x.split(_ROWS)]).sum()
