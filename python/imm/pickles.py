"""Pickles of others, read without running anything, in a process that the system limits (:mod:`imm.unpickling`).

A pickle is a program. The process that read one is not trusted: it answers with JSON and bytes, of which every size and number
is checked here. It is given the open file, no path, no environment, and nothing that it could write to.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from imm import unpickling

_DTYPES = {name: getattr(torch, name) for name in unpickling.ITEM}
#: What is no value here, nor a key.
OTHER = object()
_MAX_STORAGES = 100_000
_NAME = re.compile(r"(?!__)[A-Za-z0-9_-]{1,128}")


class PickleError(ValueError):
    """A pickle that cannot be read, or holds what it should not; one line."""


class Record:
    """Stands for any object: the name of its class, and its attributes.

    The name is the class's own, which has no dots; of OmegaConf's records it is the full one.
    """

    __slots__ = ("attributes", "class_name")

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.attributes: Any = None


@dataclass(frozen=True)
class TensorView:
    """A tensor in the file: ``shape`` and ``stride`` inside a storage, checked. :meth:`tensor` copies it out."""

    storage: Tensor
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """From the first to the last element, gaps between them included; 0 for an empty tensor."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if 0 not in self.shape else 0

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last element."""
        return self.extent * self.storage.itemsize

    def tensor(self) -> Tensor:
        """A contiguous tensor of its own on the CPU, in the file's dtype."""
        out = self.storage.as_strided(self.shape, self.stride, self.offset).clone(memory_format=torch.contiguous_format)
        # A bool of torch is 0 or 1; a byte of the file can be anything.
        return out.view(torch.uint8) != 0 if out.dtype == torch.bool else out


def read_pickle(source: Path | bytes, keys: Sequence[str] = ()) -> Any:
    """What a pickle or a file of ``torch.save`` (either of its formats) holds; nothing named in it is imported or called.

    Args:
        source: the file, or its bytes. keys: of a dict only these are read, where there are any.

    Returns:
        None, bools, numbers, texts of up to 1,000 characters, ``torch.dtype``, dicts, lists (tuples and sets too), objects as
        :class:`Record`, tensors and arrays of NumPy as :class:`TensorView`, NumPy's scalars as Python's; ``OTHER`` stands for
        what is none of these. Keys that are bytes become texts. Objects may refer to each other in circles.

    Raises:
        PickleError: a file that is truncated or malformed, names anything that is not on the list, declares sizes beyond its
            own, or takes more memory or time to read than a file of its size should.
    """
    if not isinstance(source, bytes) and not source.is_file():
        raise PickleError("expected a file, found none")
    try:
        with tempfile.TemporaryFile() if isinstance(source, bytes) else open(source, "rb") as file:
            if isinstance(source, bytes):
                file.write(source)
                file.flush()
            return _read(file, keys)
    except OSError as error:
        raise PickleError(f"expected a file that can be read, got: {error}") from error


def _read(file: IO[bytes], keys: Sequence[str]) -> Any:
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise PickleError("expected a file that can be read, got an empty one")
    if os.name != "posix":
        raise PickleError("expected a system that can limit the process that reads a pickle (Linux), got another")
    command = [sys.executable, "-I", "-S", unpickling.__file__, *keys]
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as child:
        assert child.stdout is not None
        try:
            return decoded(child.stdout, size)
        except EOFError as error:
            code = child.wait()
            if code == -signal.SIGXCPU:
                ended = "more time than a file of its size takes"
            else:
                ended = f"an end by {signal.Signals(-code).name}" if code < 0 else f"an end with status {code}"
            raise PickleError(f"expected a file that the reader comes to the end of, got {ended}") from error
        finally:
            child.kill()


def decoded(stream: IO[bytes], size: int) -> Any:
    """What :func:`imm.unpickling.answer` wrote about a file of ``size`` bytes. Raises EOFError where it ends early."""
    (length,) = struct.unpack("<Q", _take(stream, 8))
    if length > unpickling.MAX_ANSWER:
        raise PickleError("expected fewer objects than a network has, got more")
    text = _take(stream, length)
    try:
        answer = json.loads(text)
        if "refused" in answer:
            raise PickleError("".join(c if c.isprintable() else "?" for c in str(answer["refused"])[:1000]))
        kinds = [(_DTYPES[dtype], int(count)) for dtype, count in answer["storages"]]
        good = len(kinds) <= _MAX_STORAGES and all(count >= 0 for _, count in kinds)
        if not good or sum(dtype.itemsize * count for dtype, count in kinds) > size:
            raise PickleError("expected storages of the file's size in all, got more")
        storages = [torch.empty(count, dtype=dtype, device="cpu") for dtype, count in kinds]
        for storage in storages:
            if stream.readinto(storage.view(torch.uint8).numpy()) != storage.nbytes:  # type: ignore[attr-defined]
                raise EOFError
        return _values(answer["nodes"], storages)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, UnicodeError) as error:
        raise PickleError(f"expected an answer of the reader, got: {error!r:.200}") from error
    except ValueError as error:
        raise error if isinstance(error, PickleError) else PickleError(f"expected JSON of the reader, got: {error}") from error


def _take(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _values(nodes: list[Any], storages: list[Tensor]) -> Any:
    """The one item of the list that the first node is."""
    made = [_empty(node, storages) for node in nodes]

    def value(reference: Any) -> Any:
        return made[reference[0]] if type(reference) is list else reference

    def key(reference: Any) -> Any:
        return OTHER if type(reference) is list else reference

    for whole, (kind, *rest) in zip(made, nodes, strict=True):
        if kind == "list":
            whole.extend(map(value, rest[0]))
        elif kind == "dict":
            whole.update(zip(map(key, rest[0]), map(value, rest[1]), strict=True))
        elif kind == "record":
            whole.attributes = value(rest[1])
    return made[0][0]


def _empty(node: list[Any], storages: list[Tensor]) -> Any:
    """A node's object, before other nodes are put into it."""
    kind, *rest = node
    if kind in ("list", "dict"):
        return [] if kind == "list" else {}
    if kind == "record":
        plain_name(rest[0].replace(".", "_") if type(rest[0]) is str else rest[0], "class_name")
        return Record(rest[0])
    if kind == "type":
        return _DTYPES.get(rest[0].removeprefix("torch."), OTHER)
    return _view(storages[rest[0]], *rest[1:]) if kind == "tensor" else OTHER


def _view(storage: Tensor, offset: Any, shape: Any, stride: Any) -> TensorView:
    """Every element lies inside the storage, and there are no more of them than it has."""
    for sizes in (shape, stride, [offset]):
        if type(sizes) is not list or len(sizes) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
            raise PickleError(f"tensor: expected an offset, up to 8 sizes and strides, got {sizes!s:.200}")
    if len(shape) != len(stride):
        raise PickleError("tensor: expected as many strides as sizes, got others")
    view = TensorView(storage, offset, tuple(shape), tuple(stride))
    # Elements that share memory would multiply what is read. Beside a 0, which counts as 1, the sizes may not be huge either.
    if math.prod(n or 1 for n in shape) > (view.extent or 2**31) or view.extent > len(storage) - offset:
        raise PickleError(
            f"expected a tensor inside its storage of {len(storage)}, got {shape} with strides {stride} from {offset}"
        )
    return view


def plain_name(value: Any, what: str) -> str:
    """The value, where it is a name that an attribute or a parameter can have. Raises PickleError otherwise."""
    if type(value) is not str or not _NAME.fullmatch(value):
        raise PickleError(f"{what}: expected a plain name, got {unpickling.short(value)}")
    return value
