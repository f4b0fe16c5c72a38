"""Defines the ops from the schema list and wires an op's rows (kernel, fake, autograd) in one call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from imm.ops import dispatch, native  # loading the native library defines its ops, so it comes first
from imm.ops.schemas import SCHEMAS

_LIBRARY = torch.library.Library("imm", "FRAGMENT")
_REPLACED: set[tuple[str, str]] = set()  # (op, device) whose native kernel IMM_IMPL took away


def _defined(op: str) -> bool:
    name, _, overload = op.partition(".")
    return torch._C._get_operation_overload(f"imm::{name}", overload) is not None


for _schema in SCHEMAS:
    if not _defined(_schema.partition("(")[0]):
        _LIBRARY.define(_schema)


def _overload(op: str) -> Any:
    name, _, overload = op.partition(".")
    return getattr(getattr(torch.ops.imm, name), overload or "default")


def _refuses_native(op: str, device_type: str, request: dispatch.Request) -> str | None:
    if reason := native.status() or dispatch.elsewhere(device_type, request):
        return reason
    if (op, device_type) in _REPLACED:
        return f"{dispatch.VARIABLE} asked for another implementation when imm was imported"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"imm::{op}", device_type.upper()):
        return f"the native library was built without {device_type}"
    return None


def register(
    op: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    native: Sequence[str] = (),
    triton: dispatch.Implementation | None = None,
    library: dispatch.Implementation | None = None,
) -> None:
    """Give ``imm::op`` its row of implementations, its fake and the kernel that chooses between them.

    ``check`` refuses bad arguments before any of these sees them. ``native``: devices that the native library has kernels for.
    It registers them for the device itself, so that calls reach them without a choice in Python. ``library``: torch's own
    kernel for the same, where it has one.
    """
    for device_type in native:
        run = lambda *args, **kwargs: _overload(op)(*args, **kwargs)
        refuses = functools.partial(_refuses_native, op, device_type)
        dispatch.add(op, dispatch.Implementation(device_type, run, refuses))
    if triton is not None:
        dispatch.add(op, triton)
    if library is not None:
        dispatch.add(op, library)
    dispatch.add(op, dispatch.Implementation("reference", reference))
    dispatch.check_by(op, check)

    def checked_fake(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return fake(*args, **kwargs)

    torch.library.register_kernel(f"imm::{op}", None, functools.partial(dispatch.call, op))
    torch.library.register_fake(f"imm::{op}", checked_fake)
    if op.endswith(".out") and globals()["native"].status() is not None:  # else csrc/ops.cpp does it
        _LIBRARY.impl(op, functools.partial(_out_form, op), "Autograd", with_keyset=True)


def no_result(*args: Any, **out: Any) -> None:
    """The fake of an out= form."""


def apply_forced() -> None:
    """Put Python's choice in place of the native kernels that IMM_IMPL sends elsewhere; once, after all ops are known."""
    for op in dispatch.names():
        choice = dispatch.forced(op)
        for device_type in ("cpu", "cuda"):
            key = device_type.upper()
            if choice in (None, device_type) or not torch._C._dispatch_has_kernel_for_dispatch_key(f"imm::{op}", key):
                continue
            _REPLACED.add((op, device_type))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that a kernel is replaced, which is what was asked for
                _LIBRARY.impl(op, functools.partial(dispatch.call, op), key, allow_override=True)


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
    """``torch.library.register_autograd`` for ``imm::op``, but a forward-mode tangent raises: torch would drop it.

    The kernel is at the op's Autograd key, which ``torch.func.jvp``, dual numbers and ``vmap`` of them all reach with the
    tangent still attached.
    """
    generated = make_autograd_impl(_overload(op), Info(backward, setup_context))

    def kernel(keyset: Any, *args: Any) -> Any:
        refuse_tangents(op, args)
        return generated(keyset, *args)

    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


def only(ctx: Any, arguments: NamedTuple, learning: set[str], refusal: str) -> None:
    """Raise RuntimeError where another argument than the ``learning`` ones asks for a gradient."""
    needed = {name for name, needs in zip(arguments._fields, ctx.needs_input_grad, strict=False) if needs}  # torch adds its own
    if needed - learning:
        raise RuntimeError(refusal)


def gradients(of: type[NamedTuple], **given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What a backward returns: the gradients of some of an op's arguments, None for the others."""
    return tuple(given.get(name) for name in of._fields)


def refuse_tangents(op: str, values: Iterable[Any]) -> None:
    """Raise NotImplementedError where a value carries a forward-mode tangent."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(v, torch.Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values):
        raise NotImplementedError(
            f"imm::{op} has no forward-mode derivative (torch.func.jvp, dual numbers): use torch's own operations, a network "
            "with fused=False, or a finite difference"
        )


def _out_form(op: str, keyset: Any, *args: Any, **out: Any) -> None:
    refuse_tangents(op, (*args, *out.values()))
    with torch._C._AutoDispatchBelowAutograd():
        _overload(op).redispatch(keyset & torch._C._after_autograd_keyset, *args, **out)


def no_second_derivative(op: str) -> None:
    """Make a second derivative through ``imm::op`` an error; without a formula torch would only warn."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"imm::{op} has no derivative: second derivatives are not supported")

    register_autograd(op, backward)


def refuse_gradients(op: str, *tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError where the out= form of an op would lose a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(f"{op}: the out= form has no derivative; detach the inputs or use no_grad")


def check_out(name: str, out: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor that a result does not fit: out= forms never resize."""
    if out.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {out.dtype}")
    if out.device != device:
        raise ValueError(f"{name}: expected the device {device}, got {out.device}")
