"""What the networks share: embeddings of times and labels, and the check of their input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of a scaled time: cos then sin of dim / 2 frequencies max_period^(-i / (dim / 2)).

    The phase is float64: at t = 994 neighbouring training times differ by 1e-3, below bfloat16's and float16's resolution.

    Args:
        t: ``[B]``, floating. dim: even.

    Returns:
        ``[B, dim]`` float64.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=t.device)
    phase = t.double()[:, None] * torch.exp(-math.log(max_period) / half * index)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


def check_image(x: Tensor, channels: int, resolution: int) -> None:
    """Raises ValueError unless x is ``[B, channels, resolution, resolution]``."""
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, resolution, resolution):
        raise ValueError(f"x: expected [B, {channels}, {resolution}, {resolution}], got {list(x.shape)}")


class TimestepEmbedder(nn.Module):
    """Sinusoids, Linear, SiLU, Linear: ``[B]`` times -> ``[B, out_features]``."""

    def __init__(self, out_features: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, out_features), nn.SiLU(), nn.Linear(out_features, out_features))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequencies).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One row per class and a last one for "none": ``[B]`` int64 -> ``[B, out_features]``."""

    def __init__(self, num_classes: int, out_features: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, out_features)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
