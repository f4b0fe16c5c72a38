"""The images of a step, which follow from (seed, step)."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imm.data import ImageData, augmentation, to_float
from imm.distributed import Processes
from imm.training.config import TrainConfig


class _Rows(NamedTuple):
    pixels: Any
    deviations: Any
    labels: Any
    mirrored: Any


class Batches:
    """The batches of a run, on ``device``; ``labelled``: whether the network takes labels. The data stay where they are: in the
    host's memory, a mapped file, or files of pictures."""

    def __init__(self, data: ImageData, config: TrainConfig, device: torch.device, where: Processes, *, labelled: bool) -> None:
        self._config, self._where, self._device = config, where, device
        self._pixels, self._deviations = data.pixels, data.deviations
        self._labels = data.labels if labelled else None
        self.shape = data.shape
        self._permutation: tuple[int, Tensor] | None = None
        # On the CPU another thread would take from training what it gives; decoding pictures has threads of its own.
        self._ahead = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._next: tuple[int, Future[_Rows]] | None = None

    def take(self, step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """This process's images; the labels of the whole batch; how this process's images were augmented.

        Seeds torch's default generators. What is random is drawn for the whole batch, whatever the processes.
        """
        config, mine = self._config, self._where.share(self._config.batch)
        torch.manual_seed(mix(config.seed, step))
        rows = self._take_ahead(step)
        images, labels = to_float(rows.pixels.to(self._device, non_blocking=True)), rows.labels
        if labels is not None:
            labels = labels.to(self._device, non_blocking=True)
        if config.xflip:
            mirrored = rows.mirrored[mine, None, None, None].to(self._device, non_blocking=True)
            images = torch.where(mirrored, images.flip(3), images)
        if rows.deviations is not None:  # a new sample of the posterior at every step, as in the paper (section I.1)
            noise = torch.randn(config.batch, *images.shape[1:], dtype=images.dtype, device=images.device)
            images = torch.addcmul(images, to_float(rows.deviations.to(self._device, non_blocking=True)), noise[mine])
        told = None
        if config.augment:
            transforms = augmentation.draw(config.batch, config.augment, images.device)[mine]
            images, told = augmentation.transform(images, transforms), augmentation.labels(transforms)
        return images, labels, told

    def _take_ahead(self, step: int) -> _Rows:
        """The rows of a step, and the next step's begun: they are read while the device trains."""
        if self._ahead is None:
            return self._rows(self.indices(step))
        known, self._next = self._next, None
        rows = known[1].result() if known is not None and known[0] == step else self._rows(self.indices(step))
        self._next = step + 1, self._ahead.submit(self._rows, self.indices(step + 1))
        return rows

    def _rows(self, index: Tensor) -> _Rows:
        """What the data have of a step: this process's pixels and deviations; labels, and what is mirrored, of the batch."""
        mirrored, index = index >= len(self._pixels), index % len(self._pixels)
        own = index[self._where.share(len(index))]
        deviations = None if self._deviations is None else self._deviations[own]
        labels = None if self._labels is None else self._labels[index]
        rows = _Rows(self._pixels[own].contiguous(), deviations, labels, mirrored)
        return rows if self._ahead is None else _Rows(*(None if v is None else v.pin_memory() for v in rows))

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
        return torch.cat(parts)


def mix(seed: int, step: int) -> int:
    """One generator seed for (seed, step); steps below 0 are the epochs'. A CPU generator takes its low 32 bits only."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step}".encode()).digest()[:8], "big") >> 1
