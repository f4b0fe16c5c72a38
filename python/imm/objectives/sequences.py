"""The loss of whole sequences: every token a row of a head's loss, conditioned on the backbone's z of the tokens before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imm.networks import TokenModel
from imm.objectives.base import Draws, Objective

#: Losses that may train the backbone too. The others compare the head with itself, and a z without any information on the
#: context would make that easy: they train a head on the z of a trained backbone.
TRAIN_BACKBONE = ("fm", "energy")


@dataclass(frozen=True)
class SequenceDraws:
    """What the loss of a batch of sequences draws. ``tokens``: the head's draws, one row a token, in the order of
    :meth:`SequenceObjective.forward`. ``labels``: ``[B]`` after dropout. ``groups``: of the head's loss in one unit of
    sequences."""

    tokens: Draws
    labels: Tensor
    groups: int
    particles: int

    def part(self, start: int, stop: int) -> SequenceDraws:
        """Those of the units, ``particles`` sequences each, from ``start`` to before ``stop``."""
        labels = self.labels[start * self.particles : stop * self.particles]
        return replace(self, tokens=self.tokens.part(start * self.groups, stop * self.groups), labels=labels)


class SequenceObjective(nn.Module):
    """The mean of a head's loss over all tokens of sequences; a trainer takes it like any objective.

    A group of M particles has the tokens at one position of M sequences: they share the position (docs/learn/tokens.md).

    Args:
        objective: the head's loss, for a flow map around a :class:`imm.networks.TokenModel`. Its ``label_dropout`` applies to
            the sequences' classes. "fm" and "energy" train the backbone too; the other losses leave it unchanged.

    Raises:
        TypeError: a flow map around another network.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective.flow_map.network, TokenModel):
            raise TypeError(f"network: expected a TokenModel, got {type(objective.flow_map.network).__name__}")
        self.objective, self.flow_map = objective, objective.flow_map
        self.particles, self.name, self.forwards = objective.particles, objective.name, objective.forwards
        self.compiles, self.step, self.least_part = objective.compiles, 0, objective.least_part

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the head's loss."""
        return self.objective.settings

    def draw(self, x: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> SequenceDraws:
        """Times, noise and label dropout for a batch of sequences ``[B, T, D]`` with labels ``[B]`` or None."""
        self._check(x)
        labels = self.flow_map.checked_labels(labels, len(x), x.device)
        none = x.new_zeros(len(x), dtype=torch.int64)  # of a backbone without classes
        labels = none if labels is None else labels
        if self.flow_map.num_classes:
            drop = torch.rand(len(x), device=x.device, generator=generator) < self.objective.label_dropout
            labels = torch.where(drop, self.flow_map.num_classes, labels)
        return SequenceDraws(self.objective.draw(self._rows(x), None, generator), labels, x.shape[1], self.particles)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        augment: Tensor | None = None,
        generator: torch.Generator | None = None,
        grad_scale: Tensor | float | None = None,
        draws: SequenceDraws | None = None,
        pairs: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics of a batch of sequences.

        Args:
            x: ``[B, T, D]``, B a multiple of ``particles``. labels: ``[B]`` int64, or None. augment: None. draws: those of
                :meth:`draw`. generator, grad_scale, pairs: as in :meth:`imm.objectives.Objective.forward`.

        Raises:
            ValueError: as there; sequences of another shape.
        """
        if augment is not None:
            raise ValueError(f"augment: expected None for sequences, got {list(augment.shape)}")
        if draws is None:
            draws = self.draw(x, labels, generator)
        self._check(x)
        self.objective.step = self.step
        network: Any = self.flow_map.network
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.name in TRAIN_BACKBONE):
            z = network.backbone(x, draws.labels)
        loss, stats = self.objective(
            self._rows(x), cond=self._rows(z), draws=draws.tokens, grad_scale=grad_scale, pairs=pairs, generator=generator
        )
        # In units of sequences, as the trainer counts them.
        return loss, {**stats, "nonfinite": (stats["nonfinite"] + x.shape[1] - 1) // x.shape[1]}

    def _rows(self, values: Tensor) -> Tensor:
        """``[B, T, ...]`` -> ``[B T, ...]``: M sequences after one another, within these the positions, within these the M."""
        M = self.particles
        return values.unflatten(0, (-1, M)).transpose(1, 2).flatten(0, 2)

    def _check(self, x: Tensor) -> None:
        network: Any = self.flow_map.network
        D, T = network.token_dim, network.max_tokens
        if x.dim() != 3 or x.shape[2] != D or not 1 <= x.shape[1] <= T or not x.is_floating_point():
            raise ValueError(f"x: expected floating [B, 1..{T}, {D}], got {list(x.shape)} of {x.dtype}")
        if not len(x) or len(x) % self.particles:
            raise ValueError(f"x: expected a batch that is a multiple of particles = {self.particles}, got {len(x)}")


#: What a trainer takes.
AnyObjective = Objective | SequenceObjective
AnyDraws = Draws | SequenceDraws
