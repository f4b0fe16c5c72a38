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


def register_autograd(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None, *, tangents: bool = False
) -> None:
    """``torch.library.register_autograd`` for ``imm::op``, and its forward-mode derivative.

    With ``tangents``, by :func:`register_tangents`; without, a tangent raises, which torch would drop. The kernel is at the
    op's Autograd key, which ``torch.func.jvp``, dual numbers and ``vmap`` of them all reach with the tangent still attached.
    """
    generated = make_autograd_impl(_overload(op), Info(backward, setup_context))

    def differentiable(keyset: Any, *args: Any) -> Any:
        try:
            return generated(keyset, *args)
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            raise RuntimeError(
                f"imm::{op}: expected a gradient by torch.autograd, got torch.func.grad, vjp or jacrev, which torch does not "
                "support for ops"
            ) from error

    def kernel(keyset: Any, *args: Any) -> Any:
        if not tangents:
            refuse_tangents(op, args)
        if forward_ad._current_level < 0:
            return differentiable(keyset, *args)
        duals = [forward_ad.unpack_dual(a) if isinstance(a, torch.Tensor) else None for a in args]
        if all(dual is None or dual.tangent is None for dual in duals):
            return differentiable(keyset, *args)
        primals = [a if dual is None else dual.primal for a, dual in zip(args, duals, strict=True)]
        given = [torch.zeros_like(d.primal) if d.tangent is None else d.tangent for d in duals if d is not None]
        found = _overload(f"{op}_jvp")(*primals, *given)
        count = len(found) // 2
        made = tuple(forward_ad.make_dual(*pair) for pair in zip(found[:count], found[count:], strict=True))
        return made if count > 1 else made[0]

    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


def register_tangents(
    op: str,
    reference: Callable[..., tuple[torch.Tensor, ...]],
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    native: Sequence[str] = (),
    triton: dispatch.Implementation | None = None,
) -> None:
    """Register ``imm::op_jvp``, the forward-mode derivative of an op that :func:`register_autograd` sends there.

    It takes the op's arguments and then a tangent for each tensor, of its shape and dtype; it returns the op's results and then
    their tangents. The results have the gradients of the op's. The tangents have none: a second derivative is an error.
    ``check``, ``fake``, ``backward`` and ``setup_context`` are the op's; ``native`` is as in :func:`register`.
    """
    names = [a.name for a in _overload(f"{op}_jvp")._schema.arguments]
    own, results = (len(getattr(_overload(op)._schema, what)) for what in ("arguments", "returns"))

    def check_all(*args: Any) -> None:
        check(*args[:own])
        primals = [a for a in args[:own] if isinstance(a, torch.Tensor)]
        for name, tangent, like in zip(names[own:], args[own:], primals, strict=True):
            if (tangent.shape, tangent.dtype, tangent.device) != (like.shape, like.dtype, like.device):
                raise ValueError(
                    f"{name}: expected {list(like.shape)} of {like.dtype} on {like.device} as {name[1:]} is, "
                    f"got {list(tangent.shape)} of {tangent.dtype} on {tangent.device}"
                )

    def fake_all(*args: Any) -> tuple[torch.Tensor, ...]:
        both = [fake(*args[:own]) for _ in range(2)]
        return tuple(v for found in both for v in (found if isinstance(found, tuple) else (found,)))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # None tells that nobody asked for a tangent's
        setup_context(ctx, inputs[:own], output[:results] if results > 1 else output[0])
        ctx.like = [(v.shape, v.dtype, v.device) for v in output[:results]]

    def backward_of_results(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        for grad in grads[results:]:
            if grad is not None:
                _refuse_unless_zero(grad, f"imm::{op}_jvp: a tangent has no derivative: second derivatives are not supported")
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=False)
        ]
        return *backward(ctx, *given), *(None for _ in names[own:])

    register(f"{op}_jvp", check=check_all, reference=reference, fake=fake_all, native=native, triton=triton)
    register_autograd(f"{op}_jvp", backward_of_results, setup)


def _refuse_unless_zero(grad: torch.Tensor, message: str) -> None:
    """Raise RuntimeError for a gradient; zeros are what an autograd function around the op, such as FSDP's, makes of none. On
    CUDA the device raises, so that nothing waits for it."""
    if grad.device.type == "cpu":
        if bool(grad.any()):
            raise RuntimeError(message)
    else:
        torch._assert_async(~grad.any(), message)


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
            f"imm::{op} has no forward-mode derivative (torch.func.jvp, dual numbers): use torch's own operations or a finite "
            "difference"
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
