"""A small convolutional U-Net with two times: trains on two CPU cores in minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imm.networks.embeddings import LabelEmbedder, TimestepEmbedder, check_image, full_precision
from imm.networks.layers import GroupNorm


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(math.gcd(min(8, channels // 4), channels), channels)


class ResidualBlock(nn.Module):
    """Norm, SiLU, conv, scale and shift by the conditioning, norm, SiLU, dropout, conv, plus the skip."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.affine = nn.Linear(condition, 2 * out_channels)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        # Under autocast conv1 and conv2 alone compute in 16 bits: norms and sums are in the dtype of x.
        h = self.conv1(F.silu(self.norm1(x))).to(x.dtype)
        scale, shift = full_precision(self.conv1.weight, self.affine, condition)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), scale + 1.0))
        return self.conv2(self.dropout(h)) + full_precision(self.conv1.weight, self.skip, x)


class UNet(nn.Module):
    """U-Net on ``[B, channels, resolution, resolution]`` images, conditioned on two times and a class.

    Args:
        channels, resolution: of the image; the resolution is halved between levels.
        num_classes: 0 for an unconditional network; label ``num_classes`` means "none".
        width: channels of the first level.
        multipliers: channels of each level over ``width``.
        blocks: residual blocks per level and side.
        dropout: in the residual blocks.

    The output is 0 at initialisation. The default, for 16x16 grey images, has 169 k parameters. Weights are in channels-last
    memory, and so is then what lies between layers: the same results to rounding, faster.
    """

    #: What :class:`imm.Sampler` makes a copy in another dtype in; the weights are in it from the beginning.
    channels_last = True

    def __init__(
        self,
        channels: int = 1,
        resolution: int = 16,
        num_classes: int = 10,
        width: int = 16,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if resolution % 2 ** (len(multipliers) - 1):
            raise ValueError(
                f"resolution: expected a multiple of {2 ** (len(multipliers) - 1)} for {len(multipliers)} levels, "
                f"got {resolution}"
            )
        if width < 4 or width % 4:
            raise ValueError(f"width: expected a positive multiple of 4, got {width}")
        self.settings: dict[str, Any] = {
            "channels": channels,
            "resolution": resolution,
            "num_classes": num_classes,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "dropout": dropout,
        }
        self.channels, self.resolution, self.num_classes = channels, resolution, num_classes
        condition = 4 * width
        self.t_embedder = TimestepEmbedder(condition, frequencies=condition)
        self.s_embedder = TimestepEmbedder(condition, frequencies=condition)
        self.y_embedder = LabelEmbedder(num_classes, condition) if num_classes else None
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = width, []
        for level, multiplier in enumerate(multipliers):
            if level:
                self.down.append(nn.AvgPool2d(2))
            for _ in range(blocks):
                self.down.append(ResidualBlock(current, width * multiplier, condition, dropout))
                current = width * multiplier
                skips.append(current)
        self.middle = ResidualBlock(current, current, condition, dropout)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks):
                self.up.append(ResidualBlock(current + skips.pop(), width * multiplier, condition, dropout))
                current = width * multiplier
            if level:
                self.up.append(nn.Upsample(scale_factor=2))
        self.norm_out = _norm(current)
        self.conv_out = nn.Conv2d(current, channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """x ``[B, channels, resolution, resolution]``, scaled times ``[B]``, labels ``[B]`` int64 or None -> x's shape."""
        check_image(x, self.channels, self.resolution)
        weight = self.conv_in.weight
        condition = full_precision(weight, self._condition, t, s, labels)
        h, skips = full_precision(weight, self.conv_in, x), []
        for module in self.down:
            if isinstance(module, ResidualBlock):
                h = module(h, condition)
                skips.append(h)
            else:
                h = module(h)
        h = self.middle(h, condition)
        for module in self.up:
            h = module(torch.cat([h, skips.pop()], dim=1), condition) if isinstance(module, ResidualBlock) else module(h)
        return full_precision(weight, self._end, h)

    def units(self) -> list[nn.Module]:
        """What is sharded apart: each residual block, and the network."""
        return [*(module for module in self.modules() if isinstance(module, ResidualBlock)), self]

    def _condition(self, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        condition = self.t_embedder(t) + self.s_embedder(s)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)
        return F.silu(condition)

    def _end(self, h: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(h)))
