"""The images of a step, which follow from (seed, step)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from imm.data import ImageData, augmentation, to_float
from imm.distributed import Processes
from imm.training.config import TrainConfig


class Batches:
    """The batches of a run on data that lie on ``device``; ``labelled``: whether the network takes labels."""

    def __init__(self, data: ImageData, config: TrainConfig, device: torch.device, where: Processes, *, labelled: bool) -> None:
        self._config, self._where = config, where
        self._pixels = data.pixels.to(device)
        self._deviations = None if data.deviations is None else data.deviations.to(device)
        self._labels = data.labels.to(device) if labelled and data.labels is not None else None
        self.shape = data.shape
        self._permutation: tuple[int, Tensor] | None = None

    def take(self, step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """This process's images; the labels of the whole batch; how this process's images were augmented.

        Seeds torch's default generators. What is random is drawn for the whole batch, whatever the processes.
        """
        config, where = self._config, self._where
        torch.manual_seed(mix(config.seed, step))
        index = self.indices(step)
        mirrored, index = index >= len(self._pixels), index % len(self._pixels)
        mine = where.share(len(index))
        images = to_float(self._pixels[index[mine]])
        labels = None if self._labels is None else self._labels[index]
        if config.xflip:
            images = torch.where(mirrored[mine, None, None, None], images.flip(3), images)
        if self._deviations is not None:  # a new sample of the posterior at every step, as in the paper (section I.1)
            noise = torch.randn(len(index), *images.shape[1:], dtype=images.dtype, device=images.device)
            images = torch.addcmul(images, to_float(self._deviations[index[mine]]), noise[mine])
        told = None
        if config.augment:
            transforms = augmentation.draw(len(index), config.augment, images.device)[mine]
            images, told = augmentation.transform(images, transforms), augmentation.labels(transforms)
        return images, labels, told

    def indices(self, step: int) -> Tensor:
        """The images of a step: positions step * batch, ... of the epochs' permutations, one after the other.

        With ``xflip``, indices at or above the number of images mean mirrored images.
        """
        count = len(self._pixels) * (2 if self._config.xflip else 1)
        position = step * self._config.batch
        parts, left = [], self._config.batch
        while left:
            epoch, offset = divmod(position, count)
            if self._permutation is None or self._permutation[0] != epoch:
                generator = torch.Generator().manual_seed(mix(self._config.seed, -1 - epoch))
                self._permutation = epoch, torch.randperm(count, generator=generator)
            parts.append(self._permutation[1][offset : offset + left])
            position, left = position + len(parts[-1]), left - len(parts[-1])
        return torch.cat(parts).to(self._pixels.device)


def mix(seed: int, step: int) -> int:
    """One generator seed for (seed, step); steps below 0 are the epochs'. A CPU generator takes its low 32 bits only."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1
