"""DDPM++ with two times: the convolutional U-Net that IMM trains on CIFAR-10 (paper section I.1).

The architecture is that of Song et al., "Score-based generative modeling through stochastic differential equations" (2021,
appendix H), with the second time embedded beside the first. Parameter names and shapes are those of the published checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imm.networks.embeddings import check_image, full_precision
from imm.networks.layers import GroupNorm, attention, run_block
from imm.ops.timestep_embedding import MAX_PERIOD, sinusoids

#: Of every GroupNorm.
EPS = 1e-6
#: Sums of a branch and its skip keep their variance.
SKIP_SCALE = math.sqrt(0.5)
#: Gains at initialisation: of the layer that ends a residual branch, or the network; and of queries, keys and values.
SMALL, ATTENTION_GAIN = 1e-5, math.sqrt(0.2)


def _norm(channels: int) -> GroupNorm:
    groups = min(32, channels // 4)
    if channels % groups:
        raise ValueError(f"width and multipliers: expected channels that {groups} groups divide, got {channels} in one layer")
    return GroupNorm(groups, channels, EPS)


class ResampledConv2d(nn.Conv2d):
    """A convolution on half the side, of the mean of 2x2 pixels, or on twice the side, where each pixel is repeated."""

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, up: bool) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.up = up
        # Published files hold the box filter as a buffer; it is computed as a mean or a repetition.
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if not self.up:
            return super().forward(F.avg_pool2d(x, 2))
        if self.kernel_size == (1, 1):  # equal pixels have equal results: a quarter of the work
            return F.interpolate(super().forward(x), scale_factor=2.0)
        return super().forward(F.interpolate(x, scale_factor=2.0))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}resample_filter")
        if isinstance(found, Tensor) and not found.is_meta and not bool((found == 0.25).all()):
            raise ValueError(f"{prefix}resample_filter: expected the 2x2 box filter (0.25), got {found.flatten().tolist()}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Block(nn.Module):
    """Norm, SiLU, conv, plus the conditioning, norm, SiLU, dropout, conv, plus the skip; then self-attention with one head.

    ``resample``: "down" or "up" between levels, None elsewhere.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        condition: int,
        dropout: float,
        *,
        resample: str | None = None,
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm0 = _norm(in_channels)
        self.affine = nn.Linear(condition, out_channels)
        self.norm1 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if resample is not None:
            self.conv0: nn.Conv2d = ResampledConv2d(in_channels, out_channels, 3, up=resample == "up")
            self.skip: nn.Module = ResampledConv2d(in_channels, out_channels, 1, up=resample == "up")
        else:
            self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = _norm(out_channels)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x ``[B, in_channels, H, W]``, condition ``[B, condition]`` -> ``[B, out_channels, H', W']``."""
        # Under autocast the convolutions of the branches alone compute in 16 bits: norms and sums are in the dtype of x.
        weight = self.conv0.weight
        h = self.conv0(F.silu(self.norm0(x))).to(x.dtype)
        h = h + full_precision(weight, self.affine, condition)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = (h + full_precision(weight, self.skip, x)) * SKIP_SCALE
        return (self._attend(self.norm2(x)) + x) * SKIP_SCALE if self.attention else x

    def _attend(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        packed = self.qkv(x).flatten(2).unflatten(1, (channels, 3))  # q, k and v alternate: [B, C, 3, H W]
        q, k, v = packed.permute(2, 0, 3, 1).contiguous()[:, :, None]  # [B, one head, H W, C]
        out = attention(q, k, v)
        return self.proj(out.squeeze(1).transpose(1, 2).unflatten(2, (height, width)))


class DDPMpp(nn.Module):
    """DDPM++ U-Net on ``[B, channels, resolution, resolution]`` images, conditioned on two times and a class.

    Args:
        channels, resolution: of the image; the resolution is halved between levels.
        num_classes: 0 for an unconditional network; label ``num_classes`` means "none".
        width: channels of the first convolution, and numbers of a time's sinusoids.
        multipliers: channels of each level over ``width``.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        attention: sides of the images at which the encoder's blocks, and the decoder's last one, attend.
        dropout: in the residual blocks.
        augment_dim: numbers that describe an image's augmentation in training; 0 for none.
        checkpointing: in training, keep only each block's input and run the block again in the backward.

    The defaults are the published CIFAR-10 network's, 56 M parameters. ``checkpointing`` may be set at any time; checkpoints do
    not hold it. Weights are drawn by Xavier's rule, those of the layer that ends a residual branch 1e-5 times that, so that a
    block begins as its skip (Song et al., appendix H; the IMM release's gains), those of queries, keys and values sqrt(0.2)
    times. The last layer ends one too: the output is nearly 0 at initialisation. Weights are in channels-last memory, and so is
    then what lies between layers: the same results to rounding, faster.

    Raises:
        ValueError: for any value other than these.
    """

    #: What :class:`imm.Sampler` makes a copy in another dtype in; the weights are in it from the beginning.
    channels_last = True

    def __init__(
        self,
        channels: int = 3,
        resolution: int = 32,
        num_classes: int = 0,
        width: int = 128,
        multipliers: Sequence[int] = (2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.2,
        augment_dim: int = 0,
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not multipliers or min(multipliers) < 1 or blocks < 1:
            raise ValueError(f"multipliers and blocks: expected numbers >= 1, got {list(multipliers)} and {blocks}")
        last = 2 ** (len(multipliers) - 1)
        if resolution < last or resolution % last:
            raise ValueError(f"resolution: expected a multiple of {last} for {len(multipliers)} levels, got {resolution}")
        if width < 4 or width % 4:
            raise ValueError(f"width: expected a positive multiple of 4, got {width}")
        sides = [resolution >> level for level in range(len(multipliers))]
        if any(side not in sides for side in attention):
            raise ValueError(f"attention: expected sides of levels, out of {sides}, got {list(attention)}")
        if num_classes < 0 or augment_dim < 0:
            raise ValueError(f"num_classes and augment_dim: expected numbers >= 0, got {num_classes} and {augment_dim}")
        self.settings: dict[str, Any] = {
            "channels": channels,
            "resolution": resolution,
            "num_classes": num_classes,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "dropout": dropout,
            "augment_dim": augment_dim,
        }
        self.channels, self.resolution, self.num_classes, self.augment_dim = channels, resolution, num_classes, augment_dim
        self.checkpointing = checkpointing
        condition = 4 * width
        self.map_label = nn.Linear(num_classes, width) if num_classes else None
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer0_s = nn.Linear(width, condition), nn.Linear(width, condition)
        self.map_layer1, self.map_layer1_s = nn.Linear(condition, condition), nn.Linear(condition, condition)

        def block(channels_in: int, channels_out: int, **options: Any) -> Block:
            return Block(channels_in, channels_out, condition, dropout, **options)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        current, skips = width, [width]
        for level, (side, multiplier) in enumerate(zip(sides, multipliers, strict=True)):
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = nn.Conv2d(channels, width, 3, padding=1)
            else:
                self.enc[f"{side}x{side}_down"] = block(current, current, resample="down")
                skips.append(current)
            for i in range(blocks):
                self.enc[f"{side}x{side}_block{i}"] = block(current, width * multiplier, attention=side in attention)
                current = width * multiplier
                skips.append(current)
        for level, (side, multiplier) in reversed(list(enumerate(zip(sides, multipliers, strict=True)))):
            if side == sides[-1]:
                self.dec[f"{side}x{side}_in0"] = block(current, current, attention=True)
                self.dec[f"{side}x{side}_in1"] = block(current, current)
            else:
                self.dec[f"{side}x{side}_up"] = block(current, current, resample="up")
            for i in range(blocks + 1):
                attend = i == blocks and side in attention
                self.dec[f"{side}x{side}_block{i}"] = block(current + skips.pop(), width * multiplier, attention=attend)
                current = width * multiplier
            if level == 0:
                self.dec[f"{side}x{side}_aux_norm"] = _norm(current)
                self.dec[f"{side}x{side}_aux_conv"] = nn.Conv2d(current, channels, 3, padding=1)
        self._initialise()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                small = name.endswith(("conv1.weight", "proj.weight", "aux_conv.weight"))
                gain = SMALL if small else ATTENTION_GAIN if name.endswith("qkv.weight") else 1.0
                nn.init.xavier_uniform_(parameter, gain=gain)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The network's output for an image, two times and a class.

        Args:
            x: ``[B, channels, resolution, resolution]``.
            t, s: scaled times ``[B]``, float64 for their digits.
            labels: ``[B]`` int64, or None for an unconditional network.
            augment: ``[B, augment_dim]``, how the images were augmented; None (as in sampling): not at all.

        Returns:
            x's shape.

        Raises:
            ValueError: x or augment of another shape; labels missing, or given to an unconditional network.
        """
        check_image(x, self.channels, self.resolution)
        weight = self.map_layer0.weight
        condition = full_precision(weight, self._condition, t, s, labels, augment)
        h, skips = x, []
        # By name: a block that torch.compile wrapped is no Block.
        for name, module in self.enc.items():
            h = (
                full_precision(weight, module, h)
                if name.endswith("_conv")
                else run_block(self.checkpointing, module, h, condition)
            )
            skips.append(h)
        for name, module in self.dec.items():
            if "_aux_" in name:
                end = (lambda h, norm=module: F.silu(norm(h))) if name.endswith("_norm") else module
                h = full_precision(weight, end, h)
            else:
                h = torch.cat([h, skips.pop()], dim=1) if "_block" in name else h
                h = run_block(self.checkpointing, module, h, condition)
        return h

    def units(self) -> list[nn.Module]:
        """What is sharded apart: each block, and the network."""
        return [*(module for module in self.modules() if isinstance(module, Block)), self]

    def _sinusoids(self, times: Tensor) -> Tensor:
        """sin then cos of ``width / 2`` frequencies from 1 to 1/10000, both ends included: ``[B, width]``."""
        width = self.map_layer0.in_features
        half = width // 2
        # 10000^(-i / (half - 1)) is the op's frequency of a period that is longer by half / (half - 1) in the exponent.
        embedded = sinusoids(times, width, MAX_PERIOD ** (half / (half - 1))).roll(half, dims=-1)
        return embedded.to(self.map_layer0.weight.dtype)

    def _condition(self, t: Tensor, s: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        first, second = self._sinusoids(t), self._sinusoids(s)
        if (labels is None) != (self.map_label is None):
            raise ValueError(f"labels: expected {'none' if self.map_label is None else '[B] int64'}, got {labels}")
        if self.map_label is not None and labels is not None:
            classes = torch.arange(self.num_classes, device=labels.device)
            one_hot = (labels[:, None] == classes).to(first.dtype)  # zeros for "none"
            first = first + self.map_label(one_hot * math.sqrt(self.num_classes))
        if augment is not None:
            if self.map_augment is None or augment.shape != (len(first), self.augment_dim):
                wanted = "none for augment_dim = 0" if self.map_augment is None else f"[{len(first)}, {self.augment_dim}]"
                raise ValueError(f"augment: expected {wanted}, got {list(augment.shape)}")
            first = first + self.map_augment(augment.to(first.dtype))
        first = self.map_layer1(F.silu(self.map_layer0(first)))
        second = self.map_layer1_s(F.silu(self.map_layer0_s(second)))
        return F.silu(first + second)
