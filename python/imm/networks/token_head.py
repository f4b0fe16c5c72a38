"""A head for continuous tokens: a residual MLP whose LayerNorms are modulated by z and two times (Li et al. 2024, MAR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imm.networks.embeddings import TimestepEmbedder, full_precision
from imm.networks.layers import linear

#: Of every LayerNorm.
EPS = 1e-6
#: From so many rows on oneDNN's matmul is faster than torch's on the CPU (1.9 against 5.5 ms for 8 rows of 512 x 10,240).
ONE_DNN_ROWS = 4


class TokenHead(nn.Module):
    """G(x, t, s | z) for one token x, conditioned on z, a backbone's output for the tokens before it.

    With a latent the head also takes noise xi, so that it can give several samples for one x_t
    (:class:`imm.objectives.EnergyScore`). The output is 0 at initialisation.

    Args:
        token_dim: D, features of a token. cond_dim: C, features of z.
        width: features of the blocks. depth: residual blocks.
        latent_dim: L, features of xi, 0 for none.
        frequencies: of the sinusoids of each time, an even number.

    Raises:
        ValueError: sizes below 1 (``latent_dim``: below 0).
    """

    num_classes = 0

    def __init__(
        self, token_dim: int, cond_dim: int, width: int = 1024, depth: int = 3, latent_dim: int = 0, frequencies: int = 256
    ) -> None:
        super().__init__()
        sizes = {"token_dim": token_dim, "cond_dim": cond_dim, "width": width, "depth": depth}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected a size >= 1, got {value}")
        if latent_dim < 0:
            raise ValueError(f"latent_dim: expected a size >= 0, got {latent_dim}")
        if frequencies < 2 or frequencies % 2:
            raise ValueError(f"frequencies: expected an even number >= 2, got {frequencies}")
        self.settings: dict[str, Any] = {**sizes, "latent_dim": latent_dim, "frequencies": frequencies}
        self.token_dim, self.cond_dim, self.latent_dim, self.width = token_dim, cond_dim, latent_dim, width
        self.x_embedder = nn.Linear(token_dim + latent_dim, width)
        self.z_embedder = nn.Linear(cond_dim, width)
        self.t_embedder = TimestepEmbedder(width, frequencies)
        self.s_embedder = TimestepEmbedder(width, frequencies)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)]
        )
        #: Shift, scale and gate of every block, shift and scale of the last layer: one matmul for all.
        self.modulation = nn.Linear(width, (3 * depth + 2) * width)
        self.final = nn.Linear(width, token_dim)
        for layer in (self.modulation, self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None = None,
        s: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cond: Tensor,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """The head's output for tokens.

        Args:
            x: ``[B, D]``.
            t, s: scaled times ``[B]``, float64 for their digits.
            labels: None; z has what the backbone knows of the class.
            cond: ``[B, C + L]``, z and xi.
            modulation: in place of z and the times, ``[B, (3 depth + 2) width]``: one step of :meth:`condition`'s.

        Returns:
            ``[B, D]``.

        Raises:
            ValueError: shapes other than these; labels; neither or both of times and modulation.
        """
        if x.dim() != 2 or x.shape[1] != self.token_dim:
            raise ValueError(f"x: expected [B, {self.token_dim}], got {list(x.shape)}")
        if cond.dim() != 2 or cond.shape[1] != self.cond_dim + self.latent_dim:
            raise ValueError(f"cond: expected [B, {self.cond_dim + self.latent_dim}], got {list(cond.shape)}")
        if labels is not None:
            raise ValueError(f"labels: expected None for a TokenHead, got {list(labels.shape)}")
        if modulation is None:
            if t is None or s is None:
                raise ValueError("t and s: expected the two times, or a modulation in their place, got neither")
            modulation = self.condition(cond, self.embed_times(t, s), each=True)
        elif t is not None or s is not None:
            raise ValueError("modulation: expected no times beside it, which it stands for")
        if self.latent_dim:
            x = torch.cat([x, cond[:, self.cond_dim :].to(x.dtype)], 1)
        rows = modulation.chunk(3 * len(self.blocks) + 2, 1)
        h = full_precision(self.x_embedder.weight, self.x_embedder, x)
        for i, block in enumerate(self.blocks):
            shift, scale, gate = rows[3 * i : 3 * i + 3]
            h = h + gate * block(_modulate(h, shift, scale))
        return full_precision(self.final.weight, self._last, h, *rows[-2:])

    def embed_times(self, t: Tensor, s: Tensor) -> Tensor:
        """The embedding of scaled times ``[N]``: ``[N, width]``."""
        weight = self.x_embedder.weight
        embed = lambda t, s: self.t_embedder(t) + self.s_embedder(s)
        return full_precision(weight, embed, t, s)

    def condition(self, cond: Tensor, times: Tensor, each: bool = False) -> Tensor:
        """What z and the times do to every layer.

        Args:
            cond: ``[B, C]`` or ``[B, C + L]``, of which the first C columns are z.
            times: of :meth:`embed_times`, ``[N, width]``, of N steps.
            each: the times are those of the rows, N = B.

        Returns:
            ``[N, B, (3 depth + 2) width]``, by one matmul, which reads its weights once for all steps; ``each``: of each row,
            ``[B, (3 depth + 2) width]``.
        """

        def project(z: Tensor, times: Tensor) -> Tensor:
            z = self.z_embedder(z)
            hidden = F.silu(times + z if each else times[:, None] + z)
            return linear(self.modulation, hidden) if hidden.numel() >= ONE_DNN_ROWS * self.width else self.modulation(hidden)

        return full_precision(self.modulation.weight, project, cond[:, : self.cond_dim], times)

    def _last(self, h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.final(_modulate(h, shift, scale))


def _modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[1:], eps=EPS) * (1.0 + scale) + shift
