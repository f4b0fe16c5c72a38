"""Sets of pictures that are decoded when they are asked for, by threads, because they would take too much memory at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Bytes of decoded pictures up to which a set is decoded into memory.
LARGE = 2**30
_THREADS = 8


class LazyPixels:
    """Stands for a tensor ``[N, C, H, W]`` uint8 of pictures in files; its rows are decoded at each use.

    Args:
        read: decodes a picture by its number, ``[C, H, W]`` uint8. shape: ``[N, C, H, W]``. stamps: a text of each picture that
            changes when its file does. held: open files to keep.
    """

    dtype = torch.uint8

    def __init__(
        self, read: Callable[[int], np.ndarray[Any, Any]], shape: Sequence[int], stamps: Callable[[int], str], held: Any = None
    ) -> None:
        self.shape, self._read, self._stamps, self._held = torch.Size(shape), read, stamps, held
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "pictures")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """Rows of a slice or of ``[n]`` int64. Raises ValueError for a broken picture, which it names."""
        numbers = range(len(self))[index] if isinstance(index, slice) else index.tolist()
        out = np.empty((len(numbers), *self.shape[1:]), np.uint8)

        def fill(place: int) -> None:  # in the thread: no decoded picture waits for its copy
            out[place] = self._read(numbers[place])

        for _ in self._pool.map(fill, range(len(numbers))):
            pass
        return torch.from_numpy(out)

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows, ``size`` at a time."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def dim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return False

    def stamp(self) -> str:
        """A sha256 of all stamps, which reads no picture."""
        out = hashlib.sha256()
        for number in range(len(self)):
            out.update(f"{self._stamps(number)}\n".encode())
        return out.hexdigest()
