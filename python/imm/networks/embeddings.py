"""What the networks share: embeddings of times and labels, and the check of their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from imm.networks.layers import autocasts
from imm.ops.timestep_embedding import sinusoids


def full_precision(weight: Tensor, function: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """``function(*inputs)`` outside autocast, with inputs of 16 bits in the dtype of ``weight``, a weight that it uses; where
    autocast is off, the call itself.

    For what must not be rounded in a network that trains in half precision: its first and last layer, what its times go
    through (embeddings, scales and shifts), and what lies beside the residual branches. The loss sees the difference of two
    outputs at nearby times, in which the same rounding cancels and unlike rounding stays (docs/howto/precision.md).
    """
    device = weight.device.type
    if not autocasts(device):
        return function(*inputs)
    half = (torch.bfloat16, torch.float16)
    with torch.autocast(device, enabled=False):
        return function(*(v.to(weight.dtype) if v is not None and v.dtype in half else v for v in inputs))


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
        return self.mlp(sinusoids(t, self.frequencies).to(next(self.mlp.parameters()).dtype))


def ignore_second_time(network: nn.Module) -> None:
    """Make a network of ours ignore its second time, as if it were 0; in place.

    A velocity, which has seen no other, becomes the start of a flow map: the layer that takes the second time has weights 0 and
    learns from there.
    """
    zero, own = torch.zeros(1, dtype=torch.float64), cast(Any, getattr(network, "head", network))
    with torch.no_grad():
        if isinstance(getattr(own, "s_embedder", None), TimestepEmbedder):
            layer, features = own.s_embedder.mlp[0], sinusoids(zero, own.s_embedder.frequencies)
        elif hasattr(own, "map_layer0_s"):
            layer, features = own.map_layer0_s, own._sinusoids(zero)
        else:
            raise ValueError(f"network: expected one of imm.networks, got {type(network).__name__}")
        layer.bias += nn.functional.linear(features.to(layer.weight), layer.weight)[0]
        layer.weight.zero_()


class LabelEmbedder(nn.Module):
    """One row per class and a last one for "none": ``[B]`` int64 -> ``[B, out_features]``."""

    def __init__(self, num_classes: int, out_features: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, out_features)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)
