"""A small causal transformer over continuous tokens: the reference of what :class:`imm.TokenSampler` asks of a backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalTransformer(nn.Module):
    """z_n of the class and the tokens before token n.

    The positions are learned. Slot 0 holds the class, slot n + 1 token n.

    Args:
        token_dim: D, features of a token. features: C, of z and of the blocks, a multiple of ``heads``. depth: blocks.
        max_tokens: T, the longest sequence.
        num_classes: classes 0 .. ``num_classes`` - 1; label ``num_classes`` means "none".

    Raises:
        ValueError: sizes other than these.
    """

    def __init__(self, token_dim: int, features: int, depth: int, heads: int, max_tokens: int, num_classes: int = 0) -> None:
        super().__init__()
        for name, size in (("token_dim", token_dim), ("depth", depth), ("heads", heads), ("max_tokens", max_tokens)):
            if size < 1:
                raise ValueError(f"{name}: expected a size >= 1, got {size}")
        if features < heads or features % heads:
            raise ValueError(f"features: expected a multiple of heads = {heads}, got {features}")
        if num_classes < 0:
            raise ValueError(f"num_classes: expected a count >= 0, got {num_classes}")
        self.token_dim, self.cond_dim, self.heads = token_dim, features, heads
        self.max_tokens, self.num_classes = max_tokens, num_classes
        self.token_embedder = nn.Linear(token_dim, features)
        self.class_embedder = nn.Embedding(num_classes + 1, features)
        self.positions = nn.Parameter(0.02 * torch.randn(max_tokens + 1, features))
        self.blocks = nn.ModuleList([Block(features, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(features)
        nn.init.normal_(self.class_embedder.weight, std=0.5)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """z of every token of whole sequences, for training: ``[B, T, D]`` and ``[B]`` int64 -> ``[B, T, C]``."""
        count = tokens.shape[1] if tokens.dim() == 3 else 0
        if not 1 <= count <= self.max_tokens or tokens.shape[2] != self.token_dim:
            raise ValueError(f"tokens: expected [B, 1..{self.max_tokens}, {self.token_dim}], got {list(tokens.shape)}")
        h = torch.cat([self.class_embedder(labels)[:, None], self.token_embedder(tokens[:, :-1])], 1) + self.positions[:count]
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def make_cache(self, rows: int, max_tokens: int) -> list[Tensor]:
        """Keys and values of each block, ``[rows, heads, slots, C / heads]`` zeros, for sequences up to ``max_tokens``."""
        if not 1 <= max_tokens <= self.max_tokens:
            raise ValueError(f"max_tokens: expected 1 to {self.max_tokens}, got {max_tokens}")
        shape = rows, self.heads, max_tokens, self.cond_dim // self.heads
        return [self.positions.new_zeros(shape).detach() for _ in range(2 * len(self.blocks))]

    def prefill(self, prefix: Tensor, cache: list[Tensor]) -> tuple[Tensor, int]:
        """z of the first token ``[B, C]`` for classes ``[B]`` int64, and how many slots of the cache they took: 1."""
        position = torch.zeros(1, dtype=torch.int64, device=prefix.device)
        return self._slot(self.class_embedder(prefix), position, cache), 1

    def decode(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
        """z of the next token ``[B, C]`` after ``token`` ``[B, D]``, which takes slot ``position`` ``[1]`` int64."""
        return self._slot(self.token_embedder(token.to(self.positions.dtype)), position, cache)

    def _slot(self, h: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
        h = (h + self.positions.index_select(0, position))[:, None]
        seen = torch.arange(cache[0].shape[2], device=h.device) <= position
        mask = torch.where(seen, 0.0, float("-inf")).to(h.dtype)[None]  # added: of bools every block would make one
        for block, keys, values in zip(self.blocks, cache[::2], cache[1::2], strict=True):
            assert isinstance(block, Block)
            h = block.slot(h, position, keys, values, mask)
        return self.norm(h)[:, 0]


class Block(nn.Module):
    """Attention and MLP, each after a LayerNorm and added."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.proj = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.fc1, self.fc2 = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, h: Tensor, causal: bool = True) -> Tensor:
        """All positions at once, ``[B, T, C]``; each sees those before and itself, or, not ``causal``, all."""
        return self._rest(h, F.scaled_dot_product_attention(*self._heads(h), is_causal=causal))

    def slot(self, h: Tensor, position: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """One position ``[B, 1, C]``, whose key and value are written into the cache; attends to slots in ``mask`` alone."""
        q, k, v = self._heads(h)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return self._rest(h, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))

    def _heads(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, count, _ = h.shape
        q, k, v = self.qkv(self.norm1(h)).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _rest(self, h: Tensor, attended: Tensor) -> Tensor:
        h = h + self.proj(attended.transpose(1, 2).flatten(2))
        return h + self.fc2(F.gelu(self.fc1(self.norm2(h)), approximate="tanh"))
