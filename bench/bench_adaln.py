"""gated_residual_adaln: z = x + gate y and its modulated norm, as between attention and MLP of a DiT block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.case import Case, Claim, Peer, Step, call, compiled

TESTS = {"test_adaln.py": ""}
CUDA_TESTS = {"test_triton_adaln.py": ""}

#: Images, tokens, features: DiT-S and DiT-XL on latents of 32 x 32 in patches of 2; two rows are one image with guidance.
CPU_SHAPES = ((8, 256, 384), (2, 256, 1152))
CUDA_SHAPES = ((128, 256, 1152), (16, 256, 1152), (2, 256, 1152), (512, 256, 1152), (128, 256, 384))
EPS = 1e-6

FUSED, EAGER, COMPILED = "imm", "eager", "torch.compile of the eager form"
CLAIMS = (Claim(COMPILED, FUSED, at_least=1.0), Claim(EAGER, FUSED, at_least=1.0))


def plain(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As in a transformer block of torch's own operations."""
    z = x + gate[:, None] * y
    return z, F.layer_norm(z, z.shape[2:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def fused(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.imm.gated_residual_adaln(*inputs, EPS)


def trained(form: Callable[..., tuple[Tensor, Tensor]]) -> Peer:
    """Both results and the five gradients; the last two inputs are the results' own."""

    def prepare(*inputs: Tensor) -> Step:
        *inputs, grad_z, grad_h = inputs
        leaves = [v.detach().requires_grad_() for v in inputs]

        def step() -> tuple[Tensor, ...]:
            z, h = form(*leaves)
            return torch.autograd.grad((z, h), leaves, (grad_z, grad_h))

        return step

    return prepare


def case(B: int, T: int, C: int, device: torch.device, dtype: torch.dtype = torch.float32, *, backward: bool = True) -> Case:
    def inputs() -> tuple[Any, ...]:
        tokens = [torch.randn(B, T, C, device=device).to(dtype) for _ in range(4 if backward else 2)]
        return *tokens[:2], *torch.randn(B, 3 * C, device=device).to(dtype).chunk(3, dim=1), *tokens[2:]

    run = trained if backward else call
    peers: dict[str, Peer] = {FUSED: run(fused), COMPILED: compiled(plain, run), EAGER: run(plain)}
    tokens = B * T * C * dtype.itemsize
    rounding = 4 * torch.finfo(dtype).eps
    tolerance = max(rounding, 2e-5)
    return Case(
        op="adaln",
        mode="forward + backward" if backward else "forward",
        shape={"B": B, "T": T, "C": C},
        dtype=dtype,
        # Forward: read x, y, write z, h. Backward: read z, y and the gradients of z and h, write those of x and y.
        bytes=(10 if backward else 4) * tokens,
        # Forward: gate and residual 2, mean 1, deviation 3, norm and modulation 4 an element.
        flops=(30 if backward else 10) * B * T * C,
        inputs=inputs,
        truth=lambda *given: run(plain)(*(v.double() for v in given))(),
        tolerances=(tolerance,) * (5 if backward else 2),
        peers=peers,
        late=(COMPILED,),
        # In 16 bits these round the sums over tokens, or what they add.
        rough={EAGER: 16 * rounding, COMPILED: 16 * rounding} if dtype.itemsize == 2 else {},
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32, torch.bfloat16):
        for shape in shapes[:1] if quick else shapes:
            for backward in (False, True):
                yield case(*shape, device, dtype, backward=backward)
        if quick:
            return
