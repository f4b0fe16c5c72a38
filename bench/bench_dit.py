"""A DiT, evaluated, and with its derivative by torch.func.jvp: the fused form beside the plain one, eager and compiled.
bench_objective.py trains one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, Claim, Peer, call
from harness.networks import cost_of, random_dit
from imm.networks import DiT
from imm.networks.dit import SIZES

TESTS = {"test_dit.py": "both_forms", "test_tangents.py": "fused_dit bfloat16"}
CUDA_TESTS = {"test_triton_adaln.py": "", "test_triton_attention.py": "float64"}

#: Size and rows: guidance takes two rows an image.
CPU_SHAPES = (("S", 2), ("S", 16))
CUDA_SHAPES = (("XL", 2), ("XL", 16), ("XL", 128), ("S", 128), ("XL", 512))
CPU_JVP, CUDA_JVP = ("S", 2), ("XL", 128)
TOKENS = 256  # of an image

FUSED, PLAIN, COMPILED = "imm fused", "plain", "torch.compile of the plain form"
FORWARD = "imm fused, without the derivative"
MAX_AUTOTUNE, COMPILED_FUSED = "torch.compile max-autotune of the plain form", "torch.compile of the fused form"
CLAIMS = (Claim(PLAIN, FUSED, at_least=1.1), Claim(FORWARD, FUSED, at_least=1 / 2.2, mode="jvp"))


def form(made: DiT, *, fused: bool) -> DiT:
    """The same weights in one of the two forms."""
    other = copy.copy(made)
    other.fused = fused
    return other


def outputs(network: Callable[..., Tensor], jvp: bool) -> Callable[..., tuple[Tensor, ...]]:
    """What a network gives: u; with ``jvp`` also its derivative as a step of MeanFlow takes it, along t and a velocity."""
    if not jvp:
        return lambda *given: (network(*given),)

    def both(x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        along = x.flip(1), torch.ones_like(t), torch.zeros_like(s)
        return torch.func.jvp(lambda *given: network(*given, labels), (x, t, s), along)

    return both


def evaluated(make: Callable[[], Callable[..., tuple[Tensor, ...]]]) -> Peer:
    """``make`` gives the function to measure when the peer is prepared."""
    return lambda *inputs: call(torch.no_grad()(make()))(*inputs)


def case(size: str, rows: int, device: torch.device, dtype: torch.dtype = torch.float32, *, jvp: bool = False) -> Case:
    features, depth, _ = SIZES[size]
    made = cache(lambda: random_dit(size, dtype, device))
    fused, plain = cache(lambda: form(made(), fused=True)), cache(lambda: form(made(), fused=False))

    def inputs() -> tuple[Any, ...]:
        made()  # before what the peers allocate is counted
        time = torch.full((rows,), 994.0, dtype=torch.float64, device=device)
        labels = torch.arange(rows, device=device) % 1001
        return torch.randn(rows, 4, 32, 32, device=device).to(dtype), time, time * 0.5, labels

    def truth(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        wide = outputs(form(copy.deepcopy(made()).double(), fused=False), jvp)
        with torch.no_grad():
            parts = [wide(x[i : i + 1].double(), *(v[i : i + 1] for v in rest)) for i in range(len(x))]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    peers: dict[str, Peer] = {
        FUSED: evaluated(lambda: outputs(fused(), jvp)),
        PLAIN: evaluated(lambda: outputs(plain(), jvp)),
        COMPILED: evaluated(lambda: torch.compile(outputs(plain(), jvp))),
    }
    if not jvp:  # torch.compile takes no derivative of an op of one's own
        peers[COMPILED_FUSED] = evaluated(lambda: torch.compile(outputs(fused(), jvp)))
    if device.type == "cuda" and not jvp:
        peers[MAX_AUTOTUNE] = evaluated(lambda: torch.compile(outputs(plain(), jvp), mode="max-autotune-no-cudagraphs"))
    cost = cost_of(size)
    return Case(
        op="dit",
        mode="jvp" if jvp else "forward",
        shape={"DiT": features, "depth": depth, "rows": rows},
        dtype=dtype,
        # Read the weights and the images, write as many numbers as images have. A derivative takes as many flops again, of
        # attention, 4 T^2 C a block, twice as many.
        bytes=cost.bytes(rows, dtype),
        flops=rows * (2 * cost.flops + 4 * depth * TOKENS**2 * features if jvp else cost.flops),
        inputs=inputs,
        truth=truth,
        tolerances=(1e-3 if dtype == torch.float32 else 0.1,) * (2 if jvp else 1),
        peers=peers,
        late=(COMPILED, COMPILED_FUSED, MAX_AUTOTUNE),
        ceilings={FORWARD: evaluated(lambda: outputs(fused(), False))} if jvp else {},
        products=True,
        caches=("warm",),
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    shapes = CUDA_SHAPES if cuda else CPU_SHAPES
    for dtype in (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16):
        for shape in shapes[:1] if quick else shapes:
            yield case(*shape, device, dtype)
        yield case(*(CUDA_JVP if cuda else CPU_JVP), device, dtype, jvp=True)
