"""Label match, spread and MMD on raw pixels: enough to tell digits from blurs on small, class-labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imm.data.images import to_float
from imm.evaluation.metrics import MMDReference

#: Pixels that are floats at a time.
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class PixelScores:
    """What :meth:`PixelReference.score` finds.

    Attributes:
        label_match: share of samples whose nearest real image has the requested class.
        spread: within-class pixel standard deviation as a share of the real one.
        mmd: squared MMD to the real images on raw pixels (unbiased; may be slightly negative).
    """

    label_match: float
    spread: float
    mmd: float


class PixelReference:
    """Real images to score samples against; the MMD is that of :class:`MMDReference`, on up to ``mmd_count`` images a side.

    Images are ``[N, ...]``, floating in [-1, 1] or uint8. Those of uint8 become floats a part at a time: whole sets of floats
    would not fit into memory.
    """

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, mmd_count: int = 1000) -> None:
        if len(images) != len(labels) or len(images) < 2:
            raise ValueError(f"expected as many labels as images, at least two, got {len(images)} and {len(labels)}")
        self.real = images.flatten(1)
        self.labels = labels
        self.num_classes = num_classes
        self.mmd_count = mmd_count
        self._within = self._within_class_std(self.real, labels)

    @cached_property
    def _mmd(self) -> MMDReference:
        return MMDReference(self.real, self.mmd_count)

    def score(self, images: Tensor, labels: Tensor) -> PixelScores:
        """Scores of samples ``[N, ...]`` asked for with ``labels`` ``[N]``."""
        return PixelScores(*self.label_scores(images, labels), self._mmd.score(images.flatten(1).to(self.real.device)))

    def label_scores(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Label match and spread alone."""
        flat = images.flatten(1).to(self.real.device)
        match = (self._nearest(flat) == labels).double().mean()
        return float(match), float(self._within_class_std(flat, labels) / self._within)

    def score_real(self) -> PixelScores:
        """The real images against themselves: nearest other image, and one random half against the other by MMD."""
        real = to_float(self.real)
        distance = torch.cdist(real, real)
        distance.fill_diagonal_(float("inf"))
        match = (self.labels[distance.argmin(1)] == self.labels).double().mean()
        other = self.real[self._mmd.order[self._mmd.count : 2 * self._mmd.count]]
        return PixelScores(float(match), 1.0, self._mmd.score(other) if len(other) > 1 else float("nan"))

    def score_class_means(self, count: int = 1000) -> PixelScores:
        """What blurs would get: every sample the mean image of its class."""
        labels = torch.arange(count) % self.num_classes
        means = torch.stack([to_float(self.real[self.labels == c]).mean(0) for c in range(self.num_classes)])
        return self.score(means[labels], labels)

    def _nearest(self, flat: Tensor) -> Tensor:
        """Labels of the nearest real images."""
        rows = max(1, _AT_ONCE // max(flat.shape[1], 1))
        least = torch.full((len(flat),), float("inf"), device=flat.device)
        labels = self.labels.new_zeros(len(flat))
        for block, own in zip(self.real.split(rows), self.labels.split(rows), strict=True):
            real = to_float(block)
            some = min(rows, 1000)
            for part, best, label in zip(flat.split(some), least.split(some), labels.split(some), strict=True):
                distance, index = torch.cdist(to_float(part).to(real), real).min(1)
                nearer = distance < best
                best[nearer], label[nearer] = distance[nearer].to(best), own[index[nearer]]
        return labels

    def _within_class_std(self, flat: Tensor, labels: Tensor) -> Tensor:
        """Root of the pixel variance inside a class, averaged over pixels and the classes with two images or more."""
        rows = [(labels == c).nonzero().flatten() for c in range(self.num_classes)]
        present = [of_class for of_class in rows if len(of_class) > 1]
        if not present:
            return torch.tensor(float("nan"))
        return torch.stack([self._variances(flat, of_class).mean() for of_class in present]).mean().sqrt()

    def _variances(self, flat: Tensor, rows: Tensor) -> Tensor:
        """The variance ``[D]`` float64 of each pixel over the rows."""
        columns = max(1, _AT_ONCE // len(rows))
        return torch.cat([to_float(part[rows]).double().var(0) for part in flat.split(columns, 1)])
