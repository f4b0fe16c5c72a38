"""flow_step with guidance: x_s = c_skip x + c_out (g_u + w (g - g_u)), one coefficient per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, Peer, Step, call, compiled, writing
from imm.functional import flow_step
from imm.ops import flow_step as ops

TESTS = {"test_flow_step.py": ""}
CUDA_TESTS: dict[str, str] = {}

#: Images of CIFAR-10 and latents of ImageNet.
SHAPES = ((256, 3, 32, 32), (256, 4, 32, 32))
COMPILED = "torch.compile of the expression"


def expression(x: Tensor, g: Tensor, g_uncond: Tensor, c_skip: Tensor, c_out: Tensor, guidance: Tensor) -> Tensor:
    """The form found in sampling scripts, with coefficients in the state's dtype."""
    c_skip, c_out, guidance = (c.to(x.dtype)[:, None, None, None] for c in (c_skip, c_out, guidance))
    return c_skip * x + c_out * (g_uncond + guidance * (g - g_uncond))


def arguments(x: Tensor, g: Tensor, g_uncond: Tensor, c_skip: Tensor, c_out: Tensor, guidance: Tensor) -> tuple[Any, ...]:
    """The inputs in the op's order, without noise."""
    return x, g, c_skip, c_out, g_uncond, guidance, None, None, 0


def preallocated(*inputs: Tensor) -> Step:
    return writing(torch.ops.imm.flow_step.out, torch.empty_like(inputs[0]), *arguments(*inputs))


def user(x: Tensor, g: Tensor, g_uncond: Tensor, c_skip: Tensor, c_out: Tensor, guidance: Tensor) -> Tensor:
    return flow_step(x, g, c_skip, c_out, g_uncond=g_uncond, guidance=guidance)


def of_op(function: Callable[..., Tensor]) -> Peer:
    """A peer that takes the op's arguments."""
    return lambda *inputs: call(function)(*arguments(*inputs))


def case(B: int, C: int, H: int, W: int, device: torch.device) -> Case:
    D = C * H * W

    def inputs() -> tuple[Any, ...]:
        images = [torch.randn(B, C, H, W, device=device) for _ in range(3)]
        return *images, *(torch.rand(B, dtype=torch.float64, device=device) + 0.5 for _ in range(3))

    peers: dict[str, Peer] = {
        "imm out=": preallocated,
        "imm": of_op(torch.ops.imm.flow_step),
        "imm as a user calls it": call(user),
        COMPILED: compiled(expression),
        "eager expression": call(expression),
        "reference": of_op(ops.flow_step),
    }
    return Case(
        op="flow_step",
        mode="guided",
        shape={"B": B, "D": D},
        dtype=torch.float32,
        # I/O: read x, g, g_u [B, D] and three float64 coefficients per image; write x_s [B, D].
        bytes=4 * 4 * B * D + 3 * 8 * B,
        # c_skip x + c_out (g_u + w (g - g_u)): three products, two sums, one difference per element.
        flops=6 * B * D,
        inputs=inputs,
        truth=lambda *given: (expression(*(v.double() for v in given)),),
        tolerances=(1e-6,),
        peers=peers,
        late=(COMPILED,),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape in SHAPES[:1] if quick else SHAPES:
        yield case(*shape, device)
