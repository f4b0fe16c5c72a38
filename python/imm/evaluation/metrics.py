"""Distances between sets of features: kernel distances, precision and recall, inception score. All arithmetic is float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imm import functional
from imm.data.images import to_float

#: Neighbours: 3 for precision and recall (Kynkaanniemi et al. 2019), 5 for density and coverage (Naeem et al. 2020).
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
#: KID (Binkowski et al. 2018) is a mean over subsets; these and the seed are torch-fidelity's.
SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020
#: Parts of the inception score.
SPLITS = 10


def _checked(name: str, features: Tensor, least: int) -> Tensor:
    if features.dim() != 2 or len(features) < least:
        raise ValueError(f"{name}: expected features [N, D] of at least {least} images, got {list(features.shape)}")
    features = features.detach().to(torch.float64)
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    return features


def _checked_pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = _checked("x", x, least), _checked("y", y, least)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y: expected features of one length, got {x.shape[1]} and {y.shape[1]}")
    return x, y.to(x.device)


def kernel_distance(x: Tensor, y: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE) -> tuple[float, float]:
    """KID: the unbiased squared MMD with k(a, b) = (a.b / D + 1)^3, over random subsets (Binkowski et al. 2018).

    Args:
        x, y: features ``[N, D]`` and ``[M, D]``. subsets: how many. subset_size: of each; at most the images that there are.

    Returns:
        Mean and standard deviation over the subsets. The mean is unbiased, hence slightly negative at times.

    Raises:
        ValueError: shapes, fewer than two images, values that are not finite.
    """
    x, y = _checked_pair(x, y, 2)
    size = min(subset_size, len(x), len(y))
    random = np.random.RandomState(SEED)
    scores = []
    for _ in range(subsets):
        a = x[torch.from_numpy(random.choice(len(x), size, replace=False)).to(x.device)]
        b = y[torch.from_numpy(random.choice(len(y), size, replace=False)).to(x.device)]
        aa, bb, ab = _polynomial(a, a), _polynomial(b, b), _polynomial(a, b)
        own = (aa.sum() - aa.diagonal().sum() + bb.sum() - bb.diagonal().sum()) / (size * (size - 1))
        scores.append(float(own - 2.0 * ab.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1.0) ** 3


@dataclass(frozen=True)
class Neighbourhoods:
    """Shares in [0, 1], but density, which may exceed 1.

    Attributes:
        precision: of the samples, those inside the ball of some real image.
        recall: of the real images, those inside the ball of some sample; both with balls to the third neighbour.
        density: real balls around a sample, over 5.
        coverage: of the real images, those with a sample in their ball; both with balls to the fifth neighbour.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(samples: Tensor, real: Tensor, rows: int = 1024) -> Neighbourhoods:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Args:
        samples: features ``[N, D]``. real: features ``[M, D]``. rows: of a distance matrix that is in memory at a time.

    Raises:
        ValueError: shapes, fewer than six images on either side, values that are not finite.
    """
    samples, real = _checked_pair(samples, real, DENSITY_NEIGHBOURS + 1)
    sample_radius = _radii(samples, (NEIGHBOURS,), rows)[0]
    real_radius, wide_radius = _radii(real, (NEIGHBOURS, DENSITY_NEIGHBOURS), rows)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    balls = 0.0
    reached, covered = [], []
    for part, radius, wide in zip(real.split(rows), real_radius.split(rows), wide_radius.split(rows), strict=True):
        distance = torch.cdist(part, samples)
        inside |= (distance <= radius[:, None]).any(0)
        reached.append((distance <= sample_radius).any(1))
        balls += float((distance < wide[:, None]).sum())
        covered.append((distance < wide[:, None]).any(1))
    mean = lambda flags: float(torch.cat(flags).double().mean())
    density = balls / (DENSITY_NEIGHBOURS * len(samples))
    return Neighbourhoods(float(inside.double().mean()), mean(reached), density, mean(covered))


def _radii(x: Tensor, neighbours: tuple[int, ...], rows: int) -> list[Tensor]:
    """Distance to the k-th nearest other image, per k."""
    nearest = [torch.cdist(part, x).topk(max(neighbours) + 1, largest=False).values for part in x.split(rows)]
    return [torch.cat(nearest)[:, k] for k in neighbours]


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """exp of the mean KL divergence of a picture's classes from all pictures' (Salimans et al. 2016).

    Args:
        logits: ``[N, classes]``, of the Inception network without its bias. splits: parts to compute it in, shuffled.

    Returns:
        Mean and standard deviation over the parts; 1 is the least.

    Raises:
        ValueError: fewer images than parts, values that are not finite.
    """
    logits = _checked("logits", logits, splits)
    n = len(logits)
    logits = logits[torch.from_numpy(np.random.RandomState(SEED).permutation(n)).to(logits.device)]
    scores = []
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].log_softmax(1)
        divergence = (log_p.exp() * (log_p - log_p.exp().mean(0, keepdim=True).log())).sum(1)
        scores.append(float(divergence.mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


class MMDReference:
    """Real features or pixels to measure the MMD of samples to.

    The squared MMD is the unbiased U-statistic with k(x, y) = exp(-||x - y|| / median distance of the real ones), by
    ``imm::mmd_gram``, on up to ``count`` real ones (the attribute ``count`` says how many) and no more samples than those: a
    random subset where there are more. Both sides are ``[N, D]``: floating, or uint8 pixels, of which only the rows taken
    become floats in [-1, 1].
    """

    def __init__(self, real: Tensor, count: int = 1000) -> None:
        if real.dim() != 2 or len(real) < 2:
            raise ValueError(f"real: expected [N, D] with at least two rows, got {list(real.shape)}")
        self.order = _shuffled(len(real))
        self.count = min(count, len(real))
        self._real = to_float(real[self.order[:count].to(real.device)])
        distance = torch.cdist(self._real, self._real)
        positive = distance[distance > 0]
        # All the same: any bandwidth will do.
        self._scale = real.shape[1] / float(positive.median()) if len(positive) else 1.0
        self._real_real = self._mean_off_diagonal(self._real)

    def score(self, samples: Tensor) -> float:
        """Squared MMD of ``[N, D]``, N >= 2; may be slightly negative."""
        if samples.dim() != 2 or len(samples) < 2 or samples.shape[1] != self._real.shape[1]:
            raise ValueError(f"samples: expected [N, {self._real.shape[1]}] with at least two rows, got {list(samples.shape)}")
        if len(samples) > self.count:
            samples = samples[_shuffled(len(samples))[: self.count].to(samples.device)]
        x = to_float(samples).to(self._real)
        cross = self._gram_sum(x, self._real) / (len(x) * len(self._real))
        return self._mean_off_diagonal(x) + self._real_real - 2.0 * cross

    def _gram_sum(self, x: Tensor, y: Tensor) -> float:
        scale = torch.tensor([self._scale], dtype=torch.float64, device=x.device)
        return float(functional.mmd_gram(x[None], y[None], scale).double().sum())

    def _mean_off_diagonal(self, x: Tensor) -> float:
        n = len(x)
        return (self._gram_sum(x, x) - n) / (n * (n - 1))
