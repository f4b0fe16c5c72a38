"""flow_map_mmd: the loss of a flow map's branches and its gradient to the network's output, beside the same in separate ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness.case import COPY, Case, Claim, Peer, call, compiled
from harness.networks import EPS, plain_mmd, trained_with
from imm.functional import flow_map_mmd_loss, flow_step, mmd_loss
from imm.ops import flow_map_mmd

TESTS = {"test_mmd.py": "flow_map"}
CUDA_TESTS = {"test_triton_mmd.py": "flow_map"}

CPU_SHAPES = ((256, 4, 3072), (512, 4, 4096))
CUDA_SHAPES = ((1024, 4, 4096), (1024, 4, 3072), (256, 16, 4096))
KERNEL = ("laplace", [1.0], EPS, False)

USER, SEPARATE, EAGER, COMPILED = "imm as training calls it", "imm in separate ops", "eager", "torch.compile of the eager form"
CLAIMS = (Claim("imm", COPY, at_most=1.5), Claim(SEPARATE, USER, at_least=1.0))

Inputs = tuple[Tensor, ...]  # x_t, x_r, g_t, g_r [G, M, D], c_skip_t, c_out_t, c_skip_r, c_out_r, scale [G]


def eager_particles(x: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    return c_skip.float()[:, None, None] * x + c_out.float()[:, None, None] * g


def eager_form(x_t: Tensor, x_r: Tensor, g_t: Tensor, g_r: Tensor, *numbers: Tensor) -> Tensor:
    y_t, y_r = eager_particles(x_t, g_t, *numbers[:2]), eager_particles(x_r, g_r, *numbers[2:4])
    return plain_mmd(y_t, y_r, numbers[4])


def separate_form(x_t: Tensor, x_r: Tensor, g_t: Tensor, g_r: Tensor, *numbers: Tensor) -> Tensor:
    return mmd_loss(flow_step(x_t, g_t, *numbers[:2]), flow_step(x_r, g_r, *numbers[2:4]), numbers[4])


def trained(form: Callable[..., Tensor]) -> Peer:
    """With the gradient to g_t."""
    return trained_with(form, learned=2)


def truth(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The reference in float64."""
    return flow_map_mmd.flow_map_mmd(*(v.double() for v in inputs), None, None, *KERNEL)


def case(G: int, M: int, D: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    def inputs() -> tuple[Any, ...]:
        x = torch.randn(2, G, M, D, device=device)
        g = torch.randn(G, M, D, device=device)
        near = [(v + 0.1 * torch.randn_like(v)) for v in (x[0], g)]
        numbers = [torch.rand(G, dtype=torch.float64, device=device) + 0.2 for _ in range(2)]
        scale = torch.full((G,), D**0.5, device=device)
        return x[0], near[0], g.to(dtype), near[1].to(dtype), *numbers, *numbers, scale

    return Case(
        op="flow_map_mmd",
        mode="loss + gradient",
        shape={"G": G, "M": M, "D": D},
        dtype=dtype,
        # I/O: read x_t, x_r in float32, g_t, g_r [G, M, D], four coefficients in float64 and scale [G]; write the gradient to
        # g_t and the loss [G].
        bytes=G * M * D * (8 + 3 * dtype.itemsize) + 40 * G,
        # Two products and a sum per particle and feature, then as mmd.
        flops=6 * G * M * D + 6 * G * D * (2 * M * M - M),
        inputs=inputs,
        truth=truth,
        tolerances=(1e-3, 1e-4 if dtype == torch.float32 else 1e-2),
        peers={
            "imm": call(lambda *inputs: torch.ops.imm.flow_map_mmd(*inputs, None, None, *KERNEL)),
            USER: trained(flow_map_mmd_loss),
            SEPARATE: trained(separate_form),
            COMPILED: compiled(eager_form, trained),
            EAGER: trained(eager_form),
        },
        late=(COMPILED,),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    shapes = CUDA_SHAPES if cuda else CPU_SHAPES
    for shape in shapes[:1] if quick else shapes:
        yield case(*shape, device, torch.bfloat16 if cuda else torch.float32)
