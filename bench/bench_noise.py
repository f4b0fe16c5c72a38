"""noise: standard normal numbers of each image's own. Every peer gives the same numbers, so torch.randn is none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, Peer, Step, call, compiled, writing
from imm.functional import noise
from imm.ops import noise as ops

TESTS = {"test_noise.py": ""}
CUDA_TESTS = {"test_triton_noise.py": ""}

#: Images of CIFAR-10 and latents of ImageNet.
SHAPES = ((256, 3 * 32 * 32), (256, 4 * 32 * 32))
STEP = 3
COMPILED = "torch.compile of the reference"


def preallocated(seeds: Tensor, numel: int) -> Step:
    return writing(torch.ops.imm.noise.out, torch.empty(len(seeds), numel, device=seeds.device), seeds, numel, STEP)


def triton(seeds: Tensor, numel: int) -> Step:
    from imm_kernels.noise import noise as launch

    return call(launch)(seeds, numel, STEP)


def case(B: int, D: int, device: torch.device) -> Case:
    def inputs() -> tuple[Any, ...]:
        return torch.randint(2**62, (B,), device=device), D

    peers: dict[str, Peer] = {
        "imm out=": preallocated,
        "imm": call(lambda seeds, numel: torch.ops.imm.noise(seeds, numel, STEP)),
        "imm as a user calls it": call(lambda seeds, numel: noise(seeds, (numel,), STEP)),
        COMPILED: lambda seeds, numel: compiled(ops.noise)(seeds, numel, STEP),
        "reference": call(lambda seeds, numel: ops.noise(seeds, numel, STEP)),
    }
    if device.type == "cuda":
        peers["triton"] = triton
    return Case(
        op="noise",
        mode="normal",
        shape={"B": B, "D": D},
        dtype=torch.float32,
        # I/O: read one int64 seed per image; write [B, D]. The arithmetic, not the bytes, is what takes the time.
        bytes=4 * B * D + 8 * B,
        # Per two numbers in float64: two uniforms (add, multiply), log, product, root, product, cos, sin, two products; the
        # integer rounds of Philox are not counted.
        flops=6 * B * D,
        arithmetic=torch.float64,
        inputs=inputs,
        # On the CPU, where the reference's arithmetic is float64 until the last rounding.
        truth=lambda seeds, numel: (ops.noise(seeds.cpu(), numel, STEP).double().to(seeds.device),),
        tolerances=(1e-6,),
        peers=peers,
        late=(COMPILED,),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape in SHAPES[:1] if quick else SHAPES:
        yield case(*shape, device)
