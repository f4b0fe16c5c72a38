"""Scores that see whether the tokens of a sequence fit together, which scores of single images or tokens hardly do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imm.functional import energy_score

if TYPE_CHECKING:
    from imm.sampling import Sampler


def covariance_slope(samples: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor) -> float:
    """The covariance between different tokens over the real one: 1 for real sequences, 0 for independent tokens.

    The slope of a regression through 0 of the samples' covariance, between every feature of every two different tokens, on
    that of the real data, both with the mean of each class taken off.

    Args:
        samples: ``[N, T, D]`` with labels ``[N]``. real: ``[M, T, D]`` with labels ``[M]``.

    Raises:
        ValueError: shapes other than these; a class with fewer than two sequences.
    """
    if samples.dim() != 3 or real.dim() != 3 or samples.shape[1:] != real.shape[1:]:
        raise ValueError(f"samples: expected [N, {', '.join(map(str, real.shape[1:]))}], got {list(samples.shape)}")
    tokens, features = real.shape[1:]
    other = ~torch.eye(tokens, dtype=torch.bool).repeat_interleave(features, 0).repeat_interleave(features, 1)
    made, wanted = (_within_classes(*pair)[other.to(pair[0].device)] for pair in ((samples, labels), (real, real_labels)))
    return float((made.to(wanted) * wanted).sum() / wanted.square().sum())


def _within_classes(sequences: Tensor, labels: Tensor) -> Tensor:
    """The covariance inside a class, averaged over sequences, ``[T D, T D]`` float64."""
    flat, labels = sequences.flatten(1).double(), labels.to(sequences.device)
    if len(labels) != len(flat):
        raise ValueError(f"labels: expected {len(flat)}, got {len(labels)}")
    total = flat.new_zeros(flat.shape[1], flat.shape[1])
    for label in labels.unique():
        own = flat[labels == label]
        if len(own) < 2:
            raise ValueError(f"labels: expected two sequences or more of class {int(label)}, got {len(own)}")
        own = own - own.mean(0)
        total += own.T @ own * (len(own) / (len(own) - 1))
    return total / len(flat)


def forced_energy_score(sampler: Sampler, cond: Tensor, tokens: Tensor, samples: int = 2) -> float:
    """Energy score ``E 2 |x - y| - |x - x'|`` of a head given the real tokens before. Lower is better, and the data's own
    distribution has the lowest (Gneiting and Raftery 2007). Norms are over all features.

    Args:
        sampler: of the head, seeds from 0 on. cond: z of the real tokens before each token, ``[N, C]``.
        tokens: the real tokens, ``[N, D]``. samples: of the head for each.
    """
    count = len(tokens)
    drawn = [sampler.sample(range(n * count, (n + 1) * count), cond=cond) for n in range(samples)]
    return float(energy_score(torch.stack(drawn, 1).float(), tokens[:, None].to(drawn[0]).float()).mean())
