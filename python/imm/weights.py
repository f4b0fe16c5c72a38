"""Names of weights, and what changes the last bits of a module's output besides their values: alignment in memory, and asking
for gradients."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

from torch import Tensor, nn

_T = TypeVar("_T")
#: What torch.compile calls the module that it wraps, which is then a part of the names of its weights.
_COMPILED = "_orig_mod"
#: Bytes: where torch's allocators begin a tensor at least.
ALIGNMENT = 64


def plain_name(name: str) -> str:
    """A weight's name as it is without torch.compile, of the whole or of any part."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def plain_names(state: Mapping[str, _T]) -> dict[str, _T]:
    """A state dict under :func:`plain_name`."""
    return {plain_name(name): value for name, value in state.items()}


def own_names(module: nn.Module, state: Mapping[str, _T]) -> dict[str, _T]:
    """A state dict under the names of the module's own, where they differ by torch.compile only."""
    own = {plain_name(name): name for name in nn.Module.state_dict(module)}
    return {own.get(plain_name(name), name): value for name, value in state.items()}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where torch.compile wrapped it."""
    inner = module._modules.get(_COMPILED)
    return module if inner is None else unwrapped(inner)


def own_memory(module: nn.Module) -> None:
    """Give each parameter and buffer memory that is its own and aligned, in place; values and strides stay as they are.

    For modules that a library loads: it may leave their weights in a mapped file, at whatever address they have there. Products
    of matrices choose their kernels by alignment, so that the same weights would give other last bits than in the module that
    was saved; and who writes that file writes into the module.

    The parameters stay the same objects. Tensors that were one memory under several names, with the same shape and strides, are
    so afterwards; weights on the meta device, and subclasses of Tensor, which have memory in their own ways, are left alone.
    """
    moved: dict[tuple[Any, ...], Tensor] = {}
    for tensor in _tensors(module):
        data = tensor.data
        key = (data.device, data.data_ptr(), data.dtype, data.shape, data.stride())
        if not data.numel():
            continue
        if key not in moved:
            moved[key] = data.clone()
        tensor.data = moved[key]


def is_aligned(module: nn.Module) -> bool:
    """Whether every parameter and buffer begins where torch's allocators could have put it."""
    return all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in chain(module.parameters(), module.buffers()):
        if not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter):
            yield tensor


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within, no parameter of the module asks for a gradient; after the last of several calls at once they are as before.

    Under ``no_grad`` as well: ``torch.matmul`` makes one product of many for a weight that asks, and a batch of products
    for one that does not, and these differ in the last bit.
    """
    with _LOCK:
        calls = _FROZEN.setdefault(module, _Calls())
        if not calls.count:
            calls.asking = [parameter for parameter in module.parameters() if parameter.requires_grad]
        calls.count += 1
        for parameter in calls.asking:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _LOCK:
            calls.count -= 1
            if not calls.count:
                for parameter in calls.asking:
                    parameter.requires_grad_(True)
                del _FROZEN[module]


class _Calls:
    """The calls of :func:`frozen` under way for a module, and the parameters that asked for gradients before them."""

    def __init__(self) -> None:
        self.count = 0
        self.asking: list[nn.Parameter] = []


_LOCK = threading.Lock()
_FROZEN: weakref.WeakKeyDictionary[nn.Module, _Calls] = weakref.WeakKeyDictionary()
