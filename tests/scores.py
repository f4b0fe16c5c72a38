"""The energy score as its definition reads, in float64: what the implementations are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _distance(x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float]) -> Tensor:
    """d of every pair, [G, N, M]; at distance 0 without a gradient."""
    square = (x[:, :, None] - y[:, None]).square().sum(-1)
    root = torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
    scale = scale.double()[:, None, None]
    if kernel == "energy":
        return scale * root
    rates = [b * scale / x.shape[2] for b in bandwidths]
    of = {
        "laplace": lambda rate: -torch.expm1(-rate * root),
        "rbf": lambda rate: -torch.expm1(-0.5 * rate * square),
        "imq": lambda rate: rate * square / (1.0 + rate * square),
    }[kernel]
    return torch.stack([of(rate) for rate in rates]).mean(0)


def energy_score(
    x: Tensor,
    y: Tensor,
    pair: float,
    weight: Tensor | None = None,
    scale: Tensor | None = None,
    kernel: str = "energy",
    bandwidths: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [G], the sum of its terms' magnitudes [G], and the gradient of the losses' sum [G, N, D]."""
    x, y = x.detach().double().requires_grad_(), y.detach().double()
    G = len(x)
    scale = torch.ones(G, device=x.device) if scale is None else scale.expand(G)
    weight = torch.ones(G, device=x.device).double() if weight is None else weight.double().expand(G)
    across = 2.0 * _distance(x, y, scale, kernel, bandwidths).mean((1, 2))
    within = pair * _distance(x, x, scale, kernel, bandwidths).sum((1, 2))
    loss = weight * (across - within)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), (weight * (across + within)).detach(), grad


def pair_weight(N: int, alpha: float) -> float:
    return (N - 1 + alpha) / (N * N * (N - 1)) if N > 1 else 0.0


def assert_matches(found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor, Tensor]) -> None:
    """Loss within 2e-6 of its terms, gradient within 1e-6 of its norm; of 16 bits, the rounding of the gradient too."""
    (loss, grad), (exact, terms, exact_grad) = found, right
    narrow = 0.0 if grad.dtype in (torch.float32, torch.float64) else torch.finfo(grad.dtype).eps
    assert ((loss.double() - exact).abs() <= 2e-6 * terms).all(), ((loss.double() - exact).abs() / terms).max()
    error = (grad.double() - exact_grad).norm() / exact_grad.norm().clamp_min(1e-30)
    assert grad.shape == exact_grad.shape
    assert error <= 1e-6 + narrow, error
