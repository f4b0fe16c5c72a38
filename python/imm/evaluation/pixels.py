"""Label match, spread and MMD on raw pixels: enough to tell digits from blurs on small, class-labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imm.evaluation.metrics import MMDReference


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
    """Real images to score samples against; the MMD is that of :class:`MMDReference`, on up to ``mmd_count`` images a side."""

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, mmd_count: int = 1000) -> None:
        if len(images) != len(labels) or len(images) < 2:
            raise ValueError(f"expected as many labels as images, at least two, got {len(images)} and {len(labels)}")
        self.real = images.flatten(1)
        self.labels = labels
        self.num_classes = num_classes
        self._mmd = MMDReference(self.real, mmd_count)
        self._within = self._within_class_std(self.real, labels)

    def score(self, images: Tensor, labels: Tensor) -> PixelScores:
        """Scores of samples ``[N, ...]`` asked for with ``labels`` ``[N]``."""
        return PixelScores(*self.label_scores(images, labels), self._mmd.score(images.flatten(1).to(self.real)))

    def label_scores(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """Label match and spread alone."""
        flat = images.flatten(1).to(self.real)
        match = (self._nearest(flat) == labels).double().mean()
        return float(match), float(self._within_class_std(flat, labels) / self._within)

    def score_real(self) -> PixelScores:
        """The real images against themselves: nearest other image, and one random half against the other by MMD."""
        distance = torch.cdist(self.real, self.real)
        distance.fill_diagonal_(float("inf"))
        match = (self.labels[distance.argmin(1)] == self.labels).double().mean()
        other = self.real[self._mmd.order[self._mmd.count : 2 * self._mmd.count]]
        return PixelScores(float(match), 1.0, self._mmd.score(other) if len(other) > 1 else float("nan"))

    def score_class_means(self, count: int = 1000) -> PixelScores:
        """What blurs would get: every sample the mean image of its class."""
        labels = torch.arange(count) % self.num_classes
        means = torch.stack([self.real[self.labels == c].mean(0) for c in range(self.num_classes)])
        return self.score(means[labels], labels)

    def _nearest(self, flat: Tensor) -> Tensor:
        return torch.cat([self.labels[torch.cdist(part, self.real).argmin(1)] for part in flat.split(1000)])

    def _within_class_std(self, flat: Tensor, labels: Tensor) -> Tensor:
        """Root of the pixel variance inside a class, averaged over pixels and the classes with two images or more."""
        present = [flat[labels == c] for c in range(self.num_classes) if int((labels == c).sum()) > 1]
        if not present:
            return torch.tensor(float("nan"))
        return torch.stack([group.double().var(0).mean() for group in present]).mean().sqrt()
