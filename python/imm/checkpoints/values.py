"""What a published snapshot's pickle is turned into: inert values, none of which can run or be called."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from imm.checkpoints.format import CheckpointError

#: OmegaConf's records of settings -> the attribute that has the value; a container's holds records again.
OMEGACONF = {
    "omegaconf.listconfig.ListConfig": "_content",
    "omegaconf.dictconfig.DictConfig": "_content",
    **{f"omegaconf.nodes.{kind}Node": "_val" for kind in ("Any", "Boolean", "Bytes", "Float", "Integer", "String")},
}
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Budget:
    """Steps that may still be taken; :meth:`spend` refuses when none are left."""

    __slots__ = ("left",)

    def __init__(self, steps: int) -> None:
        self.left = steps

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise CheckpointError("expected a snapshot of a network, got more objects than one has")


class Table(list[tuple[Any, Any]]):
    """A dict of the file as its pairs, in order; a later pair wins."""

    __slots__ = ()

    def as_dict(self, what: str) -> dict[str, Any]:
        """The pairs as a dict. Raises CheckpointError unless every key is a plain name."""
        return {plain_name(key, what): value for key, value in self}


class Object:
    """Stands for any object with attributes: the name of its class and the :class:`Table` of its attributes.

    The name is the class's own, which has no dots; of OmegaConf's records it is the full one.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: Table | None = None) -> None:
        self.class_name, self.state = class_name, state


class NumpyType:
    """``numpy.dtype`` of one scalar."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


class Storage:
    """A torch storage: dtype, number of elements, and its bytes in the file."""

    __slots__ = ("data", "dtype", "length")

    def __init__(self, dtype: torch.dtype, length: int) -> None:
        self.dtype, self.length = dtype, length
        self.data: memoryview | None = None


class TensorView:
    """A tensor in the file: ``shape`` and ``stride`` inside a storage, checked. :meth:`tensor` copies it out."""

    __slots__ = ("_offset", "_storage", "extent", "shape", "stride")

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self._storage, self._offset, self.shape, self.stride = storage, offset, shape, stride
        # From the first to the last element, gaps between them included; 0 for an empty tensor.
        self.extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if 0 not in shape else 0

    @property
    def nbytes(self) -> int:
        """Bytes that :meth:`tensor` copies."""
        return self.extent * self._storage.dtype.itemsize

    def tensor(self) -> Tensor:
        """A contiguous tensor of its own on the CPU, in the file's dtype."""
        data, dtype = self._storage.data, self._storage.dtype
        if data is None:
            raise CheckpointError("tensor: expected its storage in the file, got none")
        if not self.extent:
            return torch.empty(self.shape, dtype=dtype)
        start = self._offset * dtype.itemsize
        own = bytearray(data[start : start + self.nbytes])
        # A bool of torch is 0 or 1; a byte of the file can be anything.
        flat = torch.frombuffer(own, dtype=torch.uint8) != 0 if dtype == torch.bool else torch.frombuffer(own, dtype=dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


def plain_name(value: Any, what: str) -> str:
    """The value, where it is a name that an attribute or a parameter can have. Raises CheckpointError otherwise."""
    if type(value) is not str or not _NAME.fullmatch(value) or value.startswith("__"):
        raise CheckpointError(f"{what}: expected a plain name, got {short(value)}")
    return value


def short(value: Any) -> str:
    """The value on one short line, without walking it."""
    if type(value) is str:
        return repr(value[:80])
    return repr(value) if value is None or type(value) in (bool, int, float) else f"a {type(value).__name__.strip('_').lower()}"
