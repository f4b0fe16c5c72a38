"""Latency of generation, from seeds to images on the device: imm.Sampler beside eager and compiled loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from harness.case import Case, Claim, Peer, Step, call
from harness.networks import cost_of, random_dit, random_unet
from harness.timing import captured
from imm import sampling
from imm.flow_map import FlowMap
from imm.networks.dit import SIZES
from imm.sampling import Sampler

TESTS = {"test_sampler.py": "bits_of_the_eager_loop parity fixed_rows"}
CUDA_TESTS = {
    "test_sampler.py": "bits parity fixed_rows",
    "test_sampler_graphs.py": "",
    "test_triton_noise.py": "",
    "test_triton_adaln.py": "",
    "test_triton_attention.py": "float64",
}

#: Network, steps, images. With guidance, but for the network of the demo, which has one case in float32; a DiT has one in
#: bfloat16, and one in float32 where that is not too slow.
CPU_SHAPES = (("unet", 1, 1), ("unet", 4, 1), ("unet", 1, 64), ("S", 1, 1), ("S", 4, 1), ("S", 1, 8))
_OF_XL = (1, 1), (8, 1), (1, 64), (8, 64), (2, 1), (4, 1), (1, 8), (1, 256)
CUDA_SHAPES = tuple(("XL", *shape) for shape in _OF_XL)
GUIDANCE = 1.5

#: In the case's dtype, but for the last one.
SAMPLER, BARE = "imm.Sampler", "the network alone"
STEPWISE, EAGER, COMPILED = "imm.Sampler, without a graph", "plain eager loop", "plain loop, torch.compile"
EAGER_32 = "plain eager loop, float32"
MODES = {"unet": "UNet, seeds to images"} | {size: f"DiT-{size}/2, seeds to images" for size in SIZES}
CLAIMS = (
    Claim(SAMPLER, BARE, at_most=1.2, mode=MODES["unet"], up_to={"steps": 1, "images": 1}),
    Claim(EAGER, SAMPLER, at_least=1.0, mode=MODES["S"]),
    Claim(EAGER_32, SAMPLER, at_least=1.5),  # from one precision to another
)


def with_network(flow_map: FlowMap, made: nn.Module, dtype: torch.dtype) -> FlowMap:
    """The same flow map around a copy of a network in another dtype, in its plain form."""
    made = copy.deepcopy(made).to(dtype)
    if hasattr(made, "fused"):
        made.fused = False
    return FlowMap(made, **flow_map.settings).eval()


def eager(flow_map: FlowMap, times: Tensor, guidance: float | None) -> Peer:
    """The loop as the papers' code has it: each step from Python, coefficients and times made anew."""
    start = lambda seeds: sampling.initial_state(flow_map, seeds, flow_map.image_shape)
    return call(lambda seeds, labels: sampling.pushforward(flow_map, start(seeds), times, labels, guidance))


def compiled(flow_map: FlowMap, times: Tensor, guidance: float | None, mode: str | None) -> Peer:
    """The same loop; the network is compiled when the peer is made."""
    made = lambda: FlowMap(torch.compile(flow_map.network, mode=mode), **flow_map.settings).eval()
    return lambda *inputs: eager(made(), times, guidance)(*inputs)


def bare(flow_map: FlowMap, rows: int) -> Peer:
    """One evaluation of the network, which is not the loop's result: the lower bound of one step."""

    def prepare(seeds: Tensor, labels: Tensor) -> Step:
        right = sampling.initial_state(flow_map, seeds, flow_map.image_shape)
        x = torch.cat([right] * (rows // len(right))).to(flow_map.network_dtype)
        time = torch.full((rows,), 994.0, dtype=torch.float64, device=x.device)
        label = labels.repeat(rows // len(labels))

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            return (flow_map.network(x, time, time, label),)

        return step

    return prepare


def case(name: str, steps: int, images: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    cuda = device.type == "cuda"
    guidance = None if name == "unet" else GUIDANCE
    rows = images * (1 if guidance is None else 2)
    exact = cache(lambda: FlowMap(random_unet(device) if name == "unet" else random_dit(name, torch.float32, device)).eval())
    times = cache(lambda: sampling.time_grid(exact(), steps))
    plain = cache(lambda dtype: with_network(exact(), exact().network, dtype))
    own = cache(lambda: FlowMap(copy.deepcopy(exact().network).to(dtype), **exact().settings).eval())

    def inputs() -> tuple[Any, ...]:
        for name in make:
            made(name)  # before what the peers allocate is counted
        return torch.arange(images, device=device), torch.arange(images, device=device) % exact().num_classes

    def truth(seeds: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        wide = with_network(exact(), exact().network, torch.float64)
        x = sampling.initial_state(wide, seeds, wide.image_shape)
        parts = zip(x.double().split(2), labels.split(2), strict=True)
        return (torch.cat([sampling.pushforward(wide, a, times(), b, guidance, torch.float64) for a, b in parts]),)

    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype}
    make: dict[str, Callable[[], Peer]] = {
        SAMPLER: lambda: call(Sampler(exact(), **options).sample),
        EAGER: lambda: eager(plain(dtype), times(), guidance),
    }
    if name == "unet" or dtype != torch.float32:  # twice a DiT would be minutes of compiling
        make[COMPILED] = lambda: compiled(plain(dtype), times(), guidance, None)
    if dtype != torch.float32 and rows <= 16:  # seconds a call at more
        make[EAGER_32] = lambda: eager(plain(torch.float32), times(), guidance)
    if cuda:
        make[STEPWISE] = lambda: call(Sampler(exact(), graph=False, **options).sample)
        for mode in ("reduce-overhead", "max-autotune"):
            make[f"{COMPILED} {mode}"] = lambda mode=mode: compiled(plain(dtype), times(), guidance, mode)
    made = cache(lambda peer: make[peer]())
    alone: Peer = lambda *given: bare(own(), rows)(*given)
    if cuda:  # a call of imm.Sampler launches no more than a graph
        alone = lambda *given: captured(bare(own(), rows)(*given))
    cost = cost_of(name)
    return Case(
        op="sampler",
        mode=MODES[name],
        shape={"steps": steps, "images": images},
        dtype=dtype,
        # What the network must move at each step, but the weights of its conditioning once; write the images in float32.
        bytes=steps * cost.bytes(rows, dtype) - (steps - 1) * dtype.itemsize * cost.conditioning + 4 * images * cost.image,
        flops=steps * rows * cost.flops,
        inputs=inputs,
        truth=truth,
        tolerances=(1e-3 if dtype == torch.float32 else 0.1,),
        peers={peer: lambda *given, peer=peer: made(peer)(*given) for peer in make},
        late=tuple(peer for peer in make if "torch.compile" in peer),
        ceilings={BARE: alone} if steps == 1 else {},
        products=True,
        caches=("warm",),
        # A latency: each call as it is launched, not captured once more.
        rounds=9 if cuda else 0,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    shapes = CUDA_SHAPES if cuda else CPU_SHAPES
    for name, steps, images in shapes[:1] if quick else shapes:
        if name != "unet":
            yield case(name, steps, images, device, torch.bfloat16)
        if name == "unet" or (images == 1 and steps <= (1 if cuda else 4)):
            yield case(name, steps, images, device)
