"""A DiT, evaluated: the fused form beside the plain one, eager and compiled. bench_objective.py trains one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, Claim, Peer, Step
from harness.networks import cost_of, random_dit
from imm.networks import DiT
from imm.networks.dit import SIZES

TESTS = {"test_dit.py": "both_forms"}
CUDA_TESTS = {"test_triton_adaln.py": "", "test_triton_attention.py": "float64"}

#: Size and rows: guidance takes two rows an image.
CPU_SHAPES = (("S", 2), ("S", 16))
CUDA_SHAPES = (("XL", 2), ("XL", 16), ("XL", 128), ("S", 128), ("XL", 512))

FUSED, PLAIN, COMPILED = "imm fused", "plain", "torch.compile of the plain form"
MAX_AUTOTUNE, COMPILED_FUSED = "torch.compile max-autotune of the plain form", "torch.compile of the fused form"
CLAIMS = (Claim(PLAIN, FUSED, at_least=1.1),)


def form(made: DiT, *, fused: bool) -> DiT:
    """The same weights in one of the two forms."""
    other = copy.copy(made)
    other.fused = fused
    return other


def evaluated(make: Callable[[], Callable[..., Tensor]]) -> Peer:
    """``make`` gives the network's form when the peer is prepared."""

    def prepare(x: Tensor, *rest: Tensor) -> Step:
        call = make()

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            return (call(x, *rest),)

        return step

    return prepare


def case(size: str, rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    features, depth, _ = SIZES[size]
    made = cache(lambda: random_dit(size, dtype, device))
    fused, plain = cache(lambda: form(made(), fused=True)), cache(lambda: form(made(), fused=False))

    def inputs() -> tuple[Any, ...]:
        made()  # before what the peers allocate is counted
        time = torch.full((rows,), 994.0, dtype=torch.float64, device=device)
        labels = torch.arange(rows, device=device) % 1001
        return torch.randn(rows, 4, 32, 32, device=device).to(dtype), time, time * 0.5, labels

    def truth(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            wide = form(copy.deepcopy(made()).double(), fused=False)
            return (torch.cat([wide(x[i : i + 1].double(), *(v[i : i + 1] for v in rest)) for i in range(len(x))]),)

    peers: dict[str, Peer] = {
        FUSED: evaluated(fused),
        PLAIN: evaluated(plain),
        COMPILED: evaluated(lambda: torch.compile(plain())),
        COMPILED_FUSED: evaluated(lambda: torch.compile(fused())),
    }
    if device.type == "cuda":
        peers[MAX_AUTOTUNE] = evaluated(lambda: torch.compile(plain(), mode="max-autotune-no-cudagraphs"))
    cost = cost_of(size)
    return Case(
        op="dit",
        mode="forward",
        shape={"DiT": features, "depth": depth, "rows": rows},
        dtype=dtype,
        # Read the weights and the images, write as many numbers as images have.
        bytes=cost.bytes(rows, dtype),
        flops=rows * cost.flops,
        inputs=inputs,
        truth=truth,
        tolerances=(1e-3 if dtype == torch.float32 else 0.1,),
        peers=peers,
        late=(COMPILED, COMPILED_FUSED, MAX_AUTOTUNE),
        products=True,
        caches=("warm",),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    shapes = CUDA_SHAPES if cuda else CPU_SHAPES
    for dtype in (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16):
        for shape in shapes[:1] if quick else shapes:
            yield case(*shape, device, dtype)
