"""DiT with two times: the diffusion transformer that IMM trains on ImageNet latents (paper section I.1).

Parameter names and shapes are those of the published checkpoints. The forward has two forms of one function: the plain one is
written in torch's operations; the fused one runs on the ops of imm, which read and write the tokens between two products once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imm.networks.embeddings import LabelEmbedder, TimestepEmbedder, check_image, full_precision
from imm.networks.layers import attention, is_linear, linear, run_block
from imm.ops.attention import TOKENS
from imm.ops.timestep_embedding import MAX_PERIOD

#: Of every LayerNorm.
EPS = 1e-6
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

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        if fused and x.shape[1] <= TOKENS:
            qkv = linear(self.qkv, x)
            return linear(self.proj, torch.ops.imm.timestep_attention(qkv, self.heads)[0])
        batch, tokens, features = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, d]
        out = attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, features))


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear with four times the features between."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, features)

    def forward(self, x: Tensor, fused: bool = False) -> Tensor:
        if fused:
            return linear(self.fc2, linear(self.fc1, x, gelu=True))
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """adaLN-Zero transformer block: both halves are shifted, scaled and gated by the conditioning."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, elementwise_affine=False, eps=EPS)
        self.attn = Attention(features, heads)
        self.norm2 = nn.LayerNorm(features, elementwise_affine=False, eps=EPS)
        self.mlp = MLP(features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(features, 6 * features))

    def forward(
        self, x: Tensor, modulation: Tensor, h: Tensor | None = None, following: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """One block: x ``[B, T, C]``, modulation ``[B, 6 C]`` -> ``[B, T, C]``.

        Fused, with h, the norm of x that this block's modulation has shifted and scaled already, and the modulation of the
        layer that follows: also that layer's h.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        if h is None or following is None:
            x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
            return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        x, h = torch.ops.imm.gated_residual_adaln(x, self.attn(h, fused=True), gate1, shift2, scale2, EPS)
        shift, scale = following[:, : 2 * x.shape[2]].chunk(2, dim=1)
        y = self.mlp(h, fused=True)
        if following.shape[1] == 2 * x.shape[2]:  # the last layer's h is in y's dtype: under autocast in full precision
            y = y.to(x.dtype)
        return torch.ops.imm.gated_residual_adaln(x, y, gate2, shift, scale, EPS)


class FinalLayer(nn.Module):
    """LayerNorm, modulation and the projection to patches."""

    def __init__(self, features: int, out_features: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(features, elementwise_affine=False, eps=EPS)
        self.linear = nn.Linear(features, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(features, 2 * features))

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        """x ``[B, T, C]``, modulation ``[B, 2 C]``, or None where x is normalised and modulated -> ``[B, T, out_features]``."""
        if modulation is None:
            return self.linear(x)
        shift, scale = modulation.chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Diffusion transformer conditioned on two times and a class through adaLN.

    Args:
        size: "S", "B", "L" or "XL" (features, blocks, heads: ``SIZES``).
        patch: side of a patch; divides ``resolution``.
        channels, resolution: of the (latent) image, ``[B, channels, resolution, resolution]``.
        num_classes: 0 for an unconditional network; label ``num_classes`` means "none".
        fused: run on the ops of imm; else on torch's own. The same function to rounding.
        checkpointing: in training, keep only each block's input and run the block again in the backward.

    ``fused`` and ``checkpointing`` may be set at any time; checkpoints do not hold them. The output is 0 at initialisation.
    """

    def __init__(
        self,
        size: str = "S",
        patch: int = 2,
        channels: int = 4,
        resolution: int = 32,
        num_classes: int = 1000,
        *,
        fused: bool = True,
        checkpointing: bool = False,
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
        self.fused, self.checkpointing = fused, checkpointing
        #: Numbers that the times and the class give one image: six rows of features a block and two for the last layer.
        self.modulation_features = (6 * depth + 2) * features
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

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """The network's output for an image, two times and a class.

        Args:
            x: ``[B, channels, resolution, resolution]``.
            t, s: scaled times ``[B]``, float64 for their digits.
            labels: ``[B]`` int64, or None for an unconditional network.
            modulation: in place of times and labels, ``[B, modulation_features]``: one step of a :meth:`conditioner`'s.

        Returns:
            x's shape.

        Raises:
            ValueError: x or modulation of another shape, or neither or both of times and modulation.
        """
        check_image(x, self.channels, self.resolution)
        weight = self.x_embedder.proj.weight
        if modulation is None:
            if t is None or s is None:
                raise ValueError("t and s: expected the two times, or a modulation in their place, got neither")
            condition = full_precision(weight, self._condition, t, s, labels)
            modulations = [full_precision(weight, project, condition) for project in self._projections()]
        else:
            if t is not None or s is not None or labels is not None:
                raise ValueError("modulation: expected no times or labels beside it, which it stands for")
            if modulation.shape != (x.shape[0], self.modulation_features):
                raise ValueError(
                    f"modulation: expected one step's [{x.shape[0]}, {self.modulation_features}], got {list(modulation.shape)}"
                )
            features = 6 * self.final_layer.linear.in_features
            modulations = list(modulation.split(features, dim=1))  # the last one is shorter
        # The first operand's layout is the sum's: tokens in rows, which no kernel has to copy.
        tokens = self.pos_embed.to(x.dtype) + full_precision(weight, self.x_embedder, x)
        return self._unpatchify((self._fused if self.fused else self._plain)(tokens, modulations))

    def _embeddings(self, t: Tensor, s: Tensor) -> Tensor:
        """What the two times give the condition, ``[B, features]``."""
        if not self.fused:
            return self.t_embedder(t) + self.s_embedder(s)
        dim, dtype = self.t_embedder.frequencies, self.x_embedder.proj.weight.dtype
        sinusoids = torch.ops.imm.timestep_embedding(t, s, dim, MAX_PERIOD, dtype)
        return self.t_embedder.mlp(sinusoids[0]) + self.s_embedder.mlp(sinusoids[1])

    def _condition(self, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """SiLU of the times and the class, from which every layer's modulation is one linear map, ``[B, features]``."""
        condition = self._embeddings(t, s)
        return F.silu(condition if self.y_embedder is None else condition + self.y_embedder(labels))

    def _projections(self) -> list[nn.Module]:
        """The linear maps to the modulations, each block's and the last layer's."""
        return [layer.adaLN_modulation[1] for layer in (*self.blocks, self.final_layer)]

    def _plain(self, tokens: Tensor, modulations: list[Tensor]) -> Tensor:
        for block, modulation in zip(self.blocks, modulations, strict=False):
            tokens = run_block(self.checkpointing, block, tokens, modulation)
        return full_precision(self.final_layer.linear.weight, self.final_layer, tokens, modulations[-1])

    def _fused(self, tokens: Tensor, modulations: list[Tensor]) -> Tensor:
        shift, scale = modulations[0][:, : 2 * tokens.shape[2]].chunk(2, dim=1)
        h = torch.ops.imm.adaln_modulate(tokens, shift, scale, EPS)
        for block, modulation, following in zip(self.blocks, modulations, modulations[1:], strict=False):
            tokens, h = run_block(self.checkpointing, block, tokens, modulation, h, following)
        return full_precision(self.final_layer.linear.weight, self.final_layer, h, None)

    def units(self) -> list[nn.Module]:
        """What is sharded apart: each block, its modulation, which :meth:`forward` calls before it, and the network."""
        return [*self._projections(), *self.blocks, self]

    def conditioner(self, times: Tensor) -> Conditioner:
        """The modulations of a sampling run's steps, as a function of the class: :class:`Conditioner`."""
        return Conditioner(self, times)

    def _unpatchify(self, tokens: Tensor) -> Tensor:
        side, p, c = self.resolution // self.patch, self.patch, self.channels
        grid = tokens.reshape(-1, side, side, p, p, c)  # patches hold (row, column, channel)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, c, side * p, side * p)


class Conditioner:
    """The modulations of every step of a sampling run, as a function of the class.

    What only depends on the weights and the times is computed once: the steps' embeddings and, where nobody has replaced or
    hooked a layer, the weights of all layers' modulations as one matrix. A call is then four kernels, whatever the number of
    steps and layers. The matrix is a copy, a third of the network's memory, and does not follow the weights when they change.

    Args:
        network: without gradients to it.
        times: ``[N, 2]`` float64, each step's scaled t and s.

    Raises:
        ValueError: times of another shape.
    """

    @torch.no_grad()
    def __init__(self, network: DiT, times: Tensor) -> None:
        if times.dim() != 2 or times.shape[1] != 2 or not times.is_floating_point():
            raise ValueError(f"times: expected t and s of each step, [N, 2], got {list(times.shape)} of {times.dtype}")
        self.classes = network.y_embedder
        self.times = network._embeddings(times[:, 0], times[:, 1])[:, None]  # [N, 1, C]
        self.projections: list[Callable[[Tensor], Tensor]] = list(network._projections())
        if all(is_linear(p) for p in self.projections):
            weight, bias = (torch.cat([getattr(p, name) for p in self.projections]) for name in ("weight", "bias"))
            self.projections = [partial(F.linear, weight=weight, bias=bias)]

    @torch.no_grad()
    def __call__(self, labels: Tensor | None) -> Tensor:
        """labels ``[R]`` int64, a row each, or None for an unconditional network: one row -> ``[N, R, modulation_features]``
        in the weights' dtype. To rounding what ``forward`` computes from times and labels; images of one class may share a row.

        Raises:
            ValueError: labels missing, or given to an unconditional network.
        """
        if (labels is None) != (self.classes is None):
            raise ValueError(f"labels: expected {'none' if self.classes is None else '[R] int64'}, got {labels}")
        condition = self.times if self.classes is None else self.times + self.classes(labels)  # [N, R, C]
        condition = F.silu(condition)
        modulations = [project(condition) for project in self.projections]
        return modulations[0] if len(modulations) == 1 else torch.cat(modulations, dim=2)
