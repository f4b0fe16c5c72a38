"""DiT with two times: the diffusion transformer that IMM trains on ImageNet latents (paper section I.1).

Parameter names and shapes are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imm.networks.embeddings import LabelEmbedder, TimestepEmbedder, check_image

#: size -> (hidden features, blocks, heads)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def position_table(features: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos table, ``[1, side^2, features]``: columns in the first half of the features, rows in the second."""
    quarter = features // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    phase = torch.arange(side, dtype=torch.float64)[:, None] * omega  # [side, quarter]
    axis = torch.cat([phase.sin(), phase.cos()], dim=1)  # [side, features / 2]
    column = axis[None, :, :].expand(side, side, -1)
    row = axis[:, None, :].expand(side, side, -1)
    return torch.cat([column, row], dim=2).reshape(1, side * side, features).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift for ``[B, T, C]`` tokens and ``[B, C]`` modulations."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    """``[B, channels, H, W]`` -> ``[B, T, features]``, patches in row-major order."""

    def __init__(self, channels: int, features: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, features, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention on ``[B, T, C]`` with q, k and v packed as rows of one projection."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, features = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, features))


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear with four times the features between."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero transformer block: both halves are shifted, scaled and gated by the conditioning."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(features, heads)
        self.norm2 = nn.LayerNorm(features, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(features, 6 * features))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """LayerNorm, modulation and the projection to patches."""

    def __init__(self, features: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(features, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(features, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(features, 2 * features))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer conditioned on two times and a class through adaLN.

    Args:
        size: "S", "B", "L" or "XL" (features, blocks, heads: ``SIZES``).
        patch: side of a patch; divides ``resolution``.
        channels, resolution: of the (latent) image, ``[B, channels, resolution, resolution]``.
        num_classes: 0 for an unconditional network; label ``num_classes`` means "none".

    The output is 0 at initialisation.
    """

    def __init__(
        self, size: str = "S", patch: int = 2, channels: int = 4, resolution: int = 32, num_classes: int = 1000
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"unknown DiT size {size!r}; expected one of {list(SIZES)}")
        if patch < 1 or resolution % patch:
            raise ValueError(f"patch: expected a divisor of resolution = {resolution}, got {patch}")
        self.settings: dict[str, Any] = {
            "size": size,
            "patch": patch,
            "channels": channels,
            "resolution": resolution,
            "num_classes": num_classes,
        }
        features, depth, heads = SIZES[size]
        self.patch, self.channels, self.resolution, self.num_classes = patch, channels, resolution, num_classes
        self.x_embedder = PatchEmbed(channels, features, patch)
        self.t_embedder = TimestepEmbedder(features)
        self.s_embedder = TimestepEmbedder(features)
        self.y_embedder = LabelEmbedder(num_classes, features) if num_classes else None
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_table(features, resolution // patch))
        self.blocks = nn.ModuleList([Block(features, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(features, patch * patch * channels)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
            elif "_embedder.mlp" in name or "embedding_table" in name:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """x ``[B, channels, resolution, resolution]``, scaled times ``[B]``, labels ``[B]`` int64 or None -> x's shape."""
        check_image(x, self.channels, self.resolution)
        condition = self.t_embedder(t) + self.s_embedder(s)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(labels)
        tokens = self.x_embedder(x) + self.pos_embed.to(x.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._unpatchify(self.final_layer(tokens, condition))

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        side, p, c = self.resolution // self.patch, self.patch, self.channels
        grid = tokens.reshape(-1, side, side, p, p, c)  # patches hold (row, column, channel)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, side * p, side * p)
