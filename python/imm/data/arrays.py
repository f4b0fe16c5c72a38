"""Whole arrays: npz files of images or latents, and MNIST's IDX files."""

from __future__ import annotations

import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from imm.data import lazy
from imm.data.listing import MAX_ARRAY, MAX_CLASSES, MAX_FILE, Files, gunzip

_IDX = re.compile(r"(?P<folder>.*/)?(?P<split>train|t10k|test)-images[.-]idx3-ubyte(\.gz)?")
#: The arrays of images and of labels: this library's names, others', and those of the ADM reference batches.
_IMAGES, _LABELS, _CLASS_NAMES = ("images", "arr_0"), ("labels", "label", "arr_1"), "class_names"
#: What ADM's reference batches have beside images: read by :mod:`imm.evaluation`.
MOMENTS = ("mu", "sigma")
#: The arrays of latents: values, or the mean and the standard deviation of each.
_LATENTS, _MEAN, _STD = "latents", "latents_mean", "latents_std"
_TOKENS = "tokens"
#: What zipfile and numpy raise for a broken file; numpy reads an array's header as Python source.
_BROKEN = (
    *(KeyError, OSError, ValueError, TypeError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile),
    *(SyntaxError, tokenize.TokenError),
)
_PART = 1000  # images at a time
#: Of a member of a zip, which its name and its extra field follow.
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Arrays:
    """What an npz file holds.

    Attributes:
        values: images ``[N, H, W, 1 or 3]`` uint8, or latents ``[N, C, h, h]``. deviations: like latents, or None.
        labels: ``[N]`` or None. class_names: or None. unread: the names of other arrays.
    """

    values: np.ndarray
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...] | None
    unread: list[str]
    deviations: np.ndarray | None = None


def read_npz(path: Path) -> Arrays:
    """The images of an npz file, with their labels and class names, if there are any.

    Raises:
        ValueError: a broken file, other arrays, labels that are no classes, or an array that would unpack to more than
            ``MAX_ARRAY`` bytes.
    """
    known = names_in(path)
    if not known & set(_IMAGES):
        raise ValueError(
            f"data: expected an .npz file with an array called images or arr_0 (for training: or {_LATENTS}, or {_MEAN} and "
            f"{_STD}), got {sorted(known)[:4]} in {path}"
        )
    name = _one_of(_IMAGES, known, path)
    assert name is not None
    images, labels, class_names, unread = _labelled(path, known, (name,))
    values = images[name]
    if values.ndim == 3:
        values = values[..., None]
    if values.dtype != np.uint8 or values.ndim != 4 or values.shape[3] not in (1, 3) or not values.size:
        raise ValueError(
            f"data: expected images [N, H, W] or [N, H, W, 1 or 3] of uint8, "
            f"got {list(values.shape)} of {values.dtype} ({path})"
        )
    return Arrays(values, _checked_labels(labels, len(values), path), class_names, unread)


def has_latents(path: Path) -> bool:
    """Whether the npz file has an array of latents. Raises ValueError for a broken file."""
    return bool(names_in(path) & {_LATENTS, _MEAN, _STD})


def read_latents(path: Path) -> Arrays:
    """The latents of an npz file, with their standard deviations (both float16 or float32), labels and class names.

    The file holds ``latents``, or ``latents_mean`` and ``latents_std`` of one shape and dtype; and perhaps the others.

    Raises:
        ValueError: a broken file, other arrays, images beside the latents, values that are not finite, negative deviations,
            labels that are no classes, or an array that would unpack to more than ``MAX_ARRAY`` bytes.
    """
    known = names_in(path)
    arrays = sorted(known & {_LATENTS, _MEAN, _STD, *_IMAGES})
    if arrays not in ([_LATENTS], [_MEAN, _STD]):
        raise ValueError(
            f"data: expected an .npz file with {_LATENTS}, or {_MEAN} and {_STD}, got {' and '.join(arrays)} in {path}"
        )
    found, labels, class_names, unread = _labelled(path, known, tuple(arrays))
    latents, deviations = found[arrays[0]], found.get(_STD)
    for name in arrays:
        array = found[name]
        if array.dtype not in (np.float16, np.float32) or array.ndim != 4 or not array.size or array.shape[2] != array.shape[3]:
            raise ValueError(
                f"data: expected {name} [N, C, h, h] of float16 or float32, got {list(array.shape)} of {array.dtype} ({path})"
            )
        if (array.shape, array.dtype) != (latents.shape, latents.dtype):
            raise ValueError(
                f"data: expected {name} like {arrays[0]}, {list(latents.shape)} of {latents.dtype}, "
                f"got {list(array.shape)} of {array.dtype} ({path})"
            )
        for start in range(0, len(array), _PART):
            part = array[start : start + _PART]
            wrong = ~np.isfinite(part)
            if name == _STD:
                wrong |= part < 0
            if wrong.any():
                index = tuple(np.argwhere(wrong)[0])
                raise ValueError(
                    f"data: expected finite values{' >= 0' if name == _STD else ''} in {name}, "
                    f"got {part[index]} in number {start + index[0]} ({path})"
                )
    return Arrays(latents, _checked_labels(labels, len(latents), path), class_names, unread, deviations)


def read_tokens(path: Path) -> Arrays:
    """Sequences of continuous tokens, ``[N, T, D]`` float16 or float32: an npy file of them, or the array ``tokens`` of an npz
    file, with its labels and class names, if there are any.

    Raises:
        ValueError: a broken file, another array, values that are not finite, labels that are no classes, or an array that would
            unpack to more than ``MAX_ARRAY`` bytes.
    """
    labels, class_names = None, None
    unread: list[str] = []
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False, mmap_mode="r")
        except _BROKEN as error:
            raise ValueError(f"tokens: expected a whole .npy file of numbers, got {path}: {error}") from error
    else:
        known = names_in(path)
        if _TOKENS not in known:
            raise ValueError(f"tokens: expected an .npz file with an array called {_TOKENS}, got {sorted(known)[:4]} in {path}")
        found, labels, class_names, unread = _labelled(path, known, (_TOKENS,))
        values = found[_TOKENS]
    if values.dtype not in (np.float16, np.float32) or values.ndim != 3 or not values.size:
        got = f"{list(values.shape)} of {values.dtype}"
        raise ValueError(f"tokens: expected [N, T, D] of float16 or float32, got {got} ({path})")
    for start in range(0, len(values), _PART):
        if not np.isfinite(values[start : start + _PART]).all():
            raise ValueError(f"tokens: expected finite values, got NaN or infinity in {start} to {start + _PART} ({path})")
    if path.suffix == ".npy" and values.nbytes <= lazy.LARGE:
        values = np.array(values)
    return Arrays(values, _checked_labels(labels, len(values), path), class_names, unread)


def _one_of(names: tuple[str, ...], known: set[str], path: Path) -> str | None:
    """The one of the names that a file has, if any. Raises ValueError for two: which counts is not known."""
    found = [name for name in names if name in known]
    if len(found) > 1:
        raise ValueError(f"data: expected one array of {', '.join(names)} in {path}, got {' and '.join(found)}")
    return found[0] if found else None


def _labelled(
    path: Path, known: set[str], names: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[str, ...] | None, list[str]]:
    """Those arrays, labels, class names, and the names of the arrays that are none of these."""
    label = _one_of(_LABELS, known, path)
    wanted = (*names, *([label] if label else []), *([_CLASS_NAMES] if _CLASS_NAMES in known else []))
    found = read_arrays(path, wanted)
    class_names = found.get(_CLASS_NAMES)
    if class_names is not None and (class_names.ndim != 1 or class_names.dtype.kind != "U"):
        raise ValueError(
            f"data: expected {_CLASS_NAMES} as a list of text in {path}, got {list(class_names.shape)} of {class_names.dtype}"
        )
    return (
        found,
        None if label is None else found[label],
        None if class_names is None else tuple(class_names.tolist()),
        sorted(known - set(wanted)),
    )


def names_in(path: Path) -> set[str]:
    """The names of an npz file's arrays. Raises ValueError for another file, and for a name twice."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except _BROKEN as error:
        raise ValueError(f"data: expected a whole .npz file, got {path}: {error}") from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"data: expected every name once in {path}, got {twice[0]!r} twice")
    return set(names)


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the arrays that are there; large ones are mapped where they are not compressed. Raises ValueError for a broken
    file, and for an array too large that cannot be mapped; no pickle is run."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _read_array(path, name, file) for name in names if name in file.files}
    except _BROKEN as error:
        raise ValueError(f"data: expected a whole .npz file of numbers, got {path}: {error}") from error


def _read_array(path: Path, name: str, file: Mapping[str, np.ndarray]) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
    too_large = ValueError(f"{info.filename} is larger than {MAX_ARRAY} bytes, and compressed or not aligned")
    if info.file_size > MAX_ARRAY and info.compress_type != zipfile.ZIP_STORED:
        raise too_large
    _check_header(path, name)
    mapped = _mapped(path, info) if info.file_size > lazy.LARGE else None
    if mapped is None and info.file_size > MAX_ARRAY:
        raise too_large
    return file[info.filename] if mapped is None else mapped


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray | None:
    """An array of an npz file that is not read but mapped: its pages are shared by all processes, and leave memory when it is
    short. None where it is compressed, or of another order or alignment than the processor's."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        return None
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        head = raw.read(_LOCAL.size)
        *_, name_size, extra_size = _LOCAL.unpack(head)
        raw.seek(info.header_offset + _LOCAL.size + name_size + extra_size)
        shape, columns, dtype = read_header(raw)
        start = raw.tell()
    if columns or dtype.hasobject or not dtype.isnative or start % dtype.itemsize:
        return None
    return np.memmap(path, dtype, "r", start, shape)


def _checked_labels(labels: np.ndarray | None, count: int, path: Path) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(f"data: expected labels [{count}] of integers, got {list(labels.shape)} of {labels.dtype} ({path})")
    wrong = (labels < 0) | (labels >= MAX_CLASSES)
    if wrong.any():
        raise ValueError(f"data: expected labels from 0 to {MAX_CLASSES - 1}, got {labels[wrong][0]} ({path})")
    return labels.astype(np.int64)


def find_idx(files: Files) -> dict[str, Callable[[], tuple[NDArray[np.uint8], NDArray[np.int64]]]] | None:
    """The splits of MNIST's IDX layout among the files, or None where it is not that layout."""
    found = [match for match in map(_IDX.fullmatch, files.names) if match]
    splits = {"train" if match["split"] == "train" else "test": match[0] for match in found}
    if len(splits) < len(found):
        raise ValueError(f"data: expected one file of images a split in {files.path}, got {[match[0] for match in found]}")
    order = [split for split in ("train", "test") if split in splits]
    return {split: partial(read_idx, files, splits[split]) for split in order} or None


def read_idx(files: Files, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``[N, H, W, 1]`` of an ``...images-idx3-ubyte`` file, gzip or not, and the labels ``[N]`` of the file beside it.

    Raises:
        ValueError: no such files, broken ones, or as many labels as images not.
    """
    folder, slash, last = name.rpartition("/")
    plain = last.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [folder + slash + plain + suffix for suffix in ("", ".gz")]
    labels_name = next((candidate for candidate in beside if candidate in files.names), None)
    if "images" not in last or labels_name is None:
        raise ValueError(f"data: expected the labels {beside[0]} beside {name} in {files.path}, found none")
    images = _idx_array(files, name, 3)
    labels = _idx_array(files, labels_name, 1)
    if len(labels) != len(images):
        raise ValueError(f"data: expected {len(images)} labels in {labels_name} of {files.path}, got {len(labels)}")
    return images[..., None], labels.astype(np.int64)


def _idx_array(files: Files, name: str, dims: int) -> NDArray[np.uint8]:
    """Two zero bytes, 8 for uint8, the number of dimensions, each of them as 4 bytes, most significant first, and the array."""
    content = gunzip(files.read(name), MAX_FILE, f"{name} of {files.path}")
    header = 4 + 4 * dims
    if content[:4] != bytes((0, 0, 8, dims)) or len(content) < header:
        raise ValueError(f"data: expected an IDX file of {dims}-dimensional uint8, got {name} of {files.path}")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape) or not math.prod(shape):
        raise ValueError(
            f"data: expected {math.prod(shape)} bytes for {list(shape)} in {name} of {files.path}, got {len(content) - header}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in column order, and dtype of an npy file; its values are next."""
    version = np.lib.format.read_magic(file)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def _check_header(path: Path, name: str) -> None:
    """That the array's size is what its header says: numpy asks for the memory before it reads."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        shape, _, dtype = read_header(file)
        size = archive.getinfo(f"{name}.npy").file_size - file.tell()
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} has {size} bytes for {list(shape)} of {dtype}")
