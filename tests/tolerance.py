"""The tolerance policy, in one place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bound(dtype: torch.dtype, truth: Tensor, terms: int) -> float:
    """Largest absolute error accepted against float64 for a result made of sums of ``terms`` terms.

    Sums carry float32 (float64 for float64) partial sums, whose rounding grows like sqrt(terms); a 16-bit result adds the
    rounding of its largest value.
    """
    accumulate = torch.promote_types(dtype, torch.float32)
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    relative = 4.0 * math.sqrt(max(terms, 1)) * torch.finfo(accumulate).eps
    if accumulate != dtype:
        relative += 2.0 * torch.finfo(dtype).eps
    return largest * relative + torch.finfo(accumulate).tiny


def distance(value: Tensor, truth: Tensor) -> float:
    """The norm of the error over that of the truth."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm())


def assert_close(value: Tensor, truth: Tensor, terms: int, dtype: torch.dtype | None = None) -> None:
    """``value`` within :func:`bound` of ``truth``, elementwise and, as a whole, with the same direction."""
    value, truth = value.detach(), truth.detach().double()
    limit = bound(dtype or value.dtype, truth, terms)
    error = float((value.double() - truth).abs().max()) if truth.numel() else 0.0
    assert error <= limit, f"error {error:.3e} above {limit:.3e}"
    if truth.numel() > 1 and float(truth.norm()) > 0:
        cosine = torch.nn.functional.cosine_similarity(value.double().flatten(), truth.flatten(), dim=0)
        assert float(cosine) > 0.999, f"cosine {float(cosine)}"
