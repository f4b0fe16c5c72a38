"""Which implementation of an op runs, and the reason.

Every op has one or more implementations, best first, the last of them "reference" (plain torch, any device). Each has one
predicate that answers "yes" (None) or the reason why not; calls, error messages and ``imm doctor`` all ask that predicate. A
call checks its arguments and chooses once for each signature: shapes, dtypes, devices and values.
``IMM_IMPL=mmd_loss:reference,flow_step:reference`` forces an implementation, for debugging; set it before importing imm, which
then takes the native CPU kernels of those ops away (they are registered for the CPU directly and do not pass through here).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VARIABLE = "IMM_IMPL"
_ELSEWHERE = "needs tensors on "


@dataclass(frozen=True)
class Request:
    """What a predicate may look at: the device, the widest dtype and the shape of the op's first tensor."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> Request:
        return cls(tensor.device, tensor.dtype, tuple(tensor.shape))


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: ``run`` takes the op's arguments, ``refuses`` a Request and returns a reason or None."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Request], str | None] = field(default=lambda request: None)


def elsewhere(device_type: str, request: Request) -> str | None:
    """The reason of an implementation of ``device_type`` where the tensors are somewhere else, else None."""
    return None if request.device.type == device_type else f"{_ELSEWHERE}{device_type}, got {request.device.type}"


_TABLE: dict[str, list[Implementation]] = {}
_CHECKS: dict[str, Callable[..., None]] = {}
#: What runs, by op and signature; bounded, since shapes and steps may be many.
_CHOSEN: dict[tuple[Any, ...], Callable[..., Any]] = {}
_MOST = 10_000
#: Types of arguments that a signature holds as they are; the others are tensors and lists.
_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})


def add(op: str, implementation: Implementation) -> None:
    """Append an implementation; call in order of preference, "reference" last."""
    _TABLE.setdefault(op, []).append(implementation)


def check_by(op: str, check: Callable[..., None]) -> None:
    """Have ``check`` refuse bad arguments of an op, by shapes, dtypes, devices and values that are not in tensors."""
    _CHECKS[op] = check


def names() -> list[str]:
    """The ops in the table."""
    return list(_TABLE)


def forced(op: str) -> str | None:
    """The implementation that IMM_IMPL asks for, if any. Raises ValueError where the variable names nothing known."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    wanted = {}
    for item in text.split(","):
        name, _, choice = item.strip().partition(":")
        if name not in _TABLE or choice not in [i.name for i in _TABLE[name]]:
            known = "; ".join(f"{o}: {', '.join(i.name for i in table)}" for o, table in _TABLE.items())
            raise ValueError(f"{VARIABLE}: expected OP:IMPLEMENTATION[,...] from [{known}], got {item!r}")
        wanted[name] = choice
    # mmd_loss_bwd, flow_step.out, ... go where mmd_loss and flow_step go, unless named themselves, if they can.
    owners = [name for name in wanted if op == name or op.startswith((f"{name}_", f"{name}."))]
    if not owners:
        return None
    choice = wanted[max(owners, key=len)]
    return choice if choice in [i.name for i in _TABLE[op]] else None


def explain(op: str, request: Request) -> list[tuple[str, str | None]]:
    """(implementation, reason why it would not run or None) for a request, best first."""
    choice = forced(op)
    rows = []
    for implementation in _TABLE[op]:
        reason = implementation.refuses(request)
        if reason is None and choice not in (None, implementation.name):
            reason = f"{VARIABLE} asks for {choice}"
        rows.append((implementation.name, reason))
    return rows


def describe(op: str, request: Request) -> str:
    """The implementation that runs, and why none of the better ones for the device does."""
    chosen = select(op, request).name
    reasons = []
    for name, reason in explain(op, request):
        if name == chosen:
            break
        if reason is not None and not reason.startswith(_ELSEWHERE):
            reasons.append(f"{name}: {reason}")
    return f"{chosen} ({'; '.join(reasons) or 'first choice'})"


def select(op: str, request: Request) -> Implementation:
    """The first implementation that accepts. Raises RuntimeError with every reason where none does."""
    rows = explain(op, request)
    for implementation, (_, reason) in zip(_TABLE[op], rows, strict=True):
        if reason is None:
            return implementation
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rows)
    raise RuntimeError(f"imm::{op} has no implementation for {request}: {reasons}")


def run(op: str, name: str, *args: Any, **kwargs: Any) -> Any:
    """Run one implementation of an op, whatever others there are; for tests and measurements."""
    _CHECKS[op](*args, **kwargs)
    return next(i for i in _TABLE[op] if i.name == name).run(*args, **kwargs)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run an op through the table."""
    values = (*args, *kwargs.values()) if kwargs else args
    # Exact types, since isinstance of Tensor is slow, and numbers of devices (-1: the CPU), since devices are slow to look up.
    signature = (
        op,
        *[v if type(v) in _PLAIN else tuple(v) if type(v) is list else (v.shape, v.dtype, v.get_device()) for v in values],
    )
    run = _CHOSEN.get(signature)
    if run is None:
        _CHECKS[op](*args, **kwargs)
        run = select(op, Request.of(args[0])).run
        if len(_CHOSEN) >= _MOST:
            _CHOSEN.clear()
        _CHOSEN[signature] = run
    return run(*args, **kwargs)
