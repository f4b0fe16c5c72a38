"""CIFAR-10 in the two layouts that it is published in: Python's pickles and binary records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from imm.data.listing import Files
from imm.pickles import PickleError, TensorView, read_pickle

CLASSES = 10
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE = 32
_VALUES = 3 * _SIDE * _SIDE
_BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def find(files: Files) -> dict[str, Callable[[], Part]] | None:
    """The splits of CIFAR-10 among the files (images ``[N, 32, 32, 3]``, labels ``[N]``), or None where it is another set.

    Raises:
        ValueError: a layout of which a file is missing, or several of them.
    """
    layouts = []
    for ending in ("", ".bin"):
        first = _BATCHES["train"][0] + ending
        layouts += [(name.removesuffix(first), ending) for name in files.names if name == first or name.endswith("/" + first)]
    if not layouts:
        return None
    if len(layouts) > 1:
        raise ValueError(
            f"data: expected CIFAR-10 once in {files.path}, got {[f + _BATCHES['train'][0] + e for f, e in layouts]}"
        )
    folder, ending = layouts[0]
    needed = {split: [folder + name + ending for name in names] for split, names in _BATCHES.items()}
    missing = [name for name in (*needed["train"], *needed["test"]) if name not in files.names]
    if missing:
        raise ValueError(f"data: expected all of CIFAR-10 in {files.path}, found no {missing[0]}")
    read = _records if ending == ".bin" else _pickles
    return {split: partial(_joined, read, files, names) for split, names in needed.items()}


def _joined(read: Callable[[Files, str], Part], files: Files, names: list[str]) -> Part:
    parts = [read(files, name) for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _pickles(files: Files, name: str) -> Part:
    place = f"{name} of {files.path}"
    try:
        batch = read_pickle(files.read(name), ("data", "labels"))
    except PickleError as error:
        raise ValueError(f"data: expected a pickle of plain data, got {place}: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"data: expected a dict in {place}, got a {type(batch).__name__}")
    view, labels = batch.get("data"), batch.get("labels")
    if not isinstance(view, TensorView) or view.storage.dtype != torch.uint8 or view.shape[1:] != (_VALUES,):
        raise ValueError(f"data: expected an array data [N, {_VALUES}] of uint8 in {place}")
    if not isinstance(labels, list):
        raise ValueError(f"data: expected a list of labels in {place}, got a {type(labels).__name__}")
    data = view.tensor().numpy()
    return _planes(data), _checked(labels, len(data), place)


def _records(files: Files, name: str) -> Part:
    place = f"{name} of {files.path}"
    content = np.frombuffer(files.read(name), np.uint8)
    if len(content) % (1 + _VALUES):
        raise ValueError(f"data: expected records of {1 + _VALUES} bytes in {place}, got {len(content)} bytes")
    records = content.reshape(-1, 1 + _VALUES)
    return _planes(records[:, 1:]), _checked(records[:, 0].tolist(), len(records), place)


def _planes(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[N, 3072]``, red before green before blue -> ``[N, 32, 32, 3]``."""
    return data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


def _checked(labels: object, count: int, place: str) -> NDArray[np.int64]:
    if not isinstance(labels, list) or any(type(label) is not int or not 0 <= label < CLASSES for label in labels):
        raise ValueError(f"data: expected a list of classes 0..{CLASSES - 1} in {place}")
    if len(labels) != count or not count:
        raise ValueError(f"data: expected a label for each of the {count} images in {place}, got {len(labels)}")
    return np.array(labels, np.int64)
