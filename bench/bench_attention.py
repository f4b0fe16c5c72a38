"""timestep_attention: attention from the packed projection, [B, T, 3 H d] -> [B, T, H d], beside torch's with each backend; and
its forward-mode tangent beside that of torch's math path, the only one that has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.case import L2, Case, Claim, Peer, Step, call, compiled

TESTS = {"test_attention.py": "", "test_tangents.py": "definition"}
CUDA_TESTS = {"test_triton_attention.py": ""}

#: Rows, tokens, heads, head size: DiT-S and DiT-XL; guidance takes two rows an image.
CPU_SHAPES = ((8, 256, 6, 64), (2, 256, 16, 72))
CUDA_SHAPES = ((128, 256, 16, 72), (16, 256, 16, 72), (2, 256, 16, 72), (128, 256, 6, 64), (512, 256, 16, 72))
#: Of those, what a tangent is taken of.
TANGENTS = {"cpu": ((16, 256, 6, 64), *CPU_SHAPES[1:]), "cuda": CUDA_SHAPES[:3]}

IMM, FLEX, COMPILED = "imm", "FlexAttention", "torch.compile of SDPA"
MATH, COMPILED_MATH = "SDPA math", "torch.compile of SDPA math"
BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
CLAIMS = (Claim("SDPA", IMM, at_least=0.95), Claim(MATH, IMM, at_least=2.0, mode="tangent"))
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, T, d] -> [B, H, T, d]


def unpacked(attention: Attention, heads: int) -> Callable[[Tensor], Tensor]:
    """As a network calls it: views of the projection, and the result's heads side by side again."""

    def run(qkv: Tensor) -> Tensor:
        B, T, _ = qkv.shape
        q, k, v = qkv.reshape(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return attention(q, k, v).transpose(1, 2).reshape(B, T, -1)

    return run


def forced(backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)(q, k, v)


def forward(run: Callable[[Tensor], Tensor]) -> Peer:
    return lambda qkv, grad: lambda: (run(qkv),)


def trained(run: Callable[[Tensor], Tensor]) -> Peer:
    def prepare(qkv: Tensor, grad: Tensor) -> Step:
        leaf = qkv.detach().requires_grad_()
        return lambda: torch.autograd.grad(run(leaf), leaf, grad)

    return prepare


def case(
    B: int, T: int, H: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32, *, backward: bool = True
) -> Case:
    def inputs() -> tuple[Any, ...]:
        return tuple(torch.randn(B, T, n * H * d, device=device).to(dtype) for n in (3, 1))

    measured = trained if backward else forward
    attentions: dict[str, Attention] = {"SDPA": F.scaled_dot_product_attention}
    if device.type == "cuda":
        attentions |= {name: forced(backend) for name, backend in BACKENDS.items()} | {FLEX: flex}
    peers = {IMM: measured(lambda qkv: torch.ops.imm.timestep_attention(qkv, H)[0])}
    peers |= {name: measured(unpacked(attention, H)) for name, attention in attentions.items()}
    peers[COMPILED] = compiled(unpacked(F.scaled_dot_product_attention, H), measured)

    def truth(qkv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        """A few rows at a time: float64 scores of all of them would not fit."""
        exact = measured(unpacked(F.scaled_dot_product_attention, H))
        parts = [exact(q.double(), g.double())() for q, g in zip(qkv.split(8), grad.split(8), strict=True)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    elements = B * T * H * d
    # Keys and values are read by each program of a head: one for up to 256 keys of many heads, else one for 64 queries.
    programs = 1 if T <= 256 and d <= 80 and B * H > 132 else -(-T // 64)
    return Case(
        op="attention",
        mode="forward + backward" if backward else "forward",
        shape={"B": B, "T": T, "H": H, "d": d},
        dtype=dtype,
        # Forward: read q, k, v and write the result. Backward: read these and the gradient, write three gradients.
        bytes=(12 if backward else 4) * elements * dtype.itemsize,
        # Two products of 2 T flops an element; the backward has five.
        flops=(14 if backward else 4) * T * elements,
        inputs=inputs,
        truth=truth,
        tolerances=(2e-5 if dtype == torch.float32 else 4e-2,),
        peers=peers,
        late=(COMPILED, FLEX),
        products=True,
        kernel={} if backward else {L2: (1 + 2 * programs) * elements * dtype.itemsize},
    )


def tangent_case(B: int, T: int, H: int, d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    """torch.func.jvp: the result and its tangent."""

    def inputs() -> tuple[Any, ...]:
        return tuple(torch.randn(B, T, 3 * H * d, device=device).to(dtype) for _ in range(2))

    def along(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        return lambda qkv, dqkv: torch.func.jvp(run, (qkv,), (dqkv,))

    math = along(unpacked(forced(SDPBackend.MATH), H))

    def truth(qkv: Tensor, dqkv: Tensor) -> tuple[Tensor, ...]:
        parts = [math(q.double(), dq.double()) for q, dq in zip(qkv.split(8), dqkv.split(8), strict=True)]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    elements = B * T * H * d
    return Case(
        op="attention",
        mode="tangent",
        shape={"B": B, "T": T, "H": H, "d": d},
        dtype=dtype,
        # Reads q, k, v and their tangents, writes the result and its.
        bytes=8 * elements * dtype.itemsize,
        # Six products of 2 T flops an element.
        flops=12 * T * elements,
        inputs=inputs,
        truth=truth,
        tolerances=(2e-5 if dtype == torch.float32 else 4e-2,) * 2,
        peers={
            IMM: call(along(lambda qkv: torch.ops.imm.timestep_attention(qkv, H)[0])),
            MATH: call(math),
            COMPILED_MATH: compiled(math),
        },
        late=(COMPILED_MATH,),
        products=True,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16):
        for backward in (False, True):
            for shape in shapes[:1] if quick else shapes:
                yield case(*shape, device, dtype, backward=backward)
        for shape in TANGENTS[device.type][: 1 if quick else None]:
            yield tangent_case(*shape, device, dtype)
        if quick:
            return
