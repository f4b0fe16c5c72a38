"""A backbone and its head as one network: what a checkpoint of sequences holds, and what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from imm.networks.causal import CausalTransformer
from imm.networks.token_head import TokenHead


class TokenModel(nn.Module):
    """A :class:`TokenHead` on the z of a :class:`CausalTransformer`. A :class:`imm.FlowMap` around it is the head's.

    Args:
        backbone: arguments of the CausalTransformer. head: arguments of the TokenHead but for ``token_dim`` and ``cond_dim``,
            which are the backbone's.

    Raises:
        ValueError, TypeError: arguments that these do not take.
    """

    def __init__(self, backbone: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings = {"backbone": dict(backbone), "head": dict(head)}
        self.backbone = CausalTransformer(**backbone)
        self.token_dim, self.cond_dim = self.backbone.token_dim, self.backbone.cond_dim
        self.head = TokenHead(self.token_dim, self.cond_dim, **head)
        self.latent_dim, self.num_classes = self.head.latent_dim, self.backbone.num_classes
        self.max_tokens = self.backbone.max_tokens

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, *, cond: Tensor) -> Tensor:
        """The head's output for tokens ``[B, D]`` and z, as :meth:`TokenHead.forward`; z has what is known of the labels."""
        return self.head(x, t, s, cond=cond)

    def units(self) -> list[nn.Module]:
        """What is sharded apart: the backbone's blocks, the backbone and the head, which losses call one by one."""
        return [*self.backbone.blocks, self.backbone, self.head]
