"""Defines the ops from the schema list and wires an op's rows (kernel, fake, autograd) in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from imm.ops import dispatch
from imm.ops.schemas import SCHEMAS

_LIBRARY = torch.library.Library("imm", "FRAGMENT")
for _schema in SCHEMAS:
    if not hasattr(torch.ops.imm, _schema.partition("(")[0]):
        _LIBRARY.define(_schema)


def register(op: str, *, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Give ``imm::op`` its reference implementation, its fake and the kernel that chooses between implementations."""
    dispatch.add(op, dispatch.Implementation("reference", reference))
    torch.library.register_kernel(f"imm::{op}", None, functools.partial(dispatch.call, op))
    torch.library.register_fake(f"imm::{op}", fake)


def no_second_derivative(op: str) -> None:
    """Make a second derivative through ``imm::op`` an error; without a formula torch would only warn."""

    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"imm::{op} has no derivative: second derivatives are not supported")

    torch.library.register_autograd(f"imm::{op}", backward)
