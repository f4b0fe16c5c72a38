"""Latency of generation, from seeds to images on the device: imm.Sampler beside eager and compiled loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from imm import sampling
from imm.benchmark.case import Case, Claim, Peer, Step
from imm.benchmark.networks import cost_of, random_dit, random_unet
from imm.benchmark.timing import captured
from imm.flow_map import FlowMap
from imm.networks import DiT
from imm.networks.dit import SIZES
from imm.sampler import Sampler

TESTS = {"test_sampler.py": "bits_of_the_eager_loop parity fixed_rows"}
#: "graph" and "replay": captured calls give the bits of the loop.
CUDA_TESTS = {
    "test_sampler.py": "bits parity fixed_rows graph replay",
    "test_triton_flow_step.py": "",
    "test_triton_adaln.py": "",
    "test_triton_attention.py": "float64",
}

#: Network, steps, images. With guidance, but for the network of the demo, which has one case in float32; a DiT has one in
#: bfloat16, and one in float32 where that is not too slow.
CPU_SHAPES = (("unet", 1, 1), ("unet", 4, 1), ("unet", 1, 64), ("S", 1, 1), ("S", 4, 1), ("S", 1, 8))
CUDA_SHAPES = (
    *(("XL", steps, images) for images in (1, 64) for steps in (1, 8)),
    *(("XL", steps, 1) for steps in (2, 4)),
    ("XL", 1, 8),
    ("XL", 1, 256),
)
GUIDANCE = 1.5

#: In the case's dtype, but for the last one.
SAMPLER, BARE, FIRST = "imm.Sampler", "the network alone", "imm.Sampler, first call (made and captured)"
STEPWISE, EAGER, COMPILED = "imm.Sampler, without a graph", "plain eager loop", "plain loop, torch.compile"
EAGER_32 = "plain eager loop, float32"
SAMPLER_COMPILED = "imm.Sampler, torch.compile of the network"
#: Of a call of imm.Sampler.
NETWORK, CONDITION, UPDATES = "part: the network, all steps", "part: the conditioning", "part: noise and updates, all steps"
MODES = {"unet": "UNet, seeds to images"} | {size: f"DiT-{size}/2, seeds to images" for size in SIZES}
CLAIMS = (
    Claim(SAMPLER, BARE, at_most=1.2, mode=MODES["unet"], up_to={"steps": 1, "images": 1}),
    Claim(EAGER, SAMPLER, at_least=1.0, mode=MODES["S"]),
    Claim(EAGER_32, SAMPLER, at_least=1.5),  # from one precision to another
)


def network(name: str, device: torch.device) -> nn.Module:
    return random_unet(device) if name == "unet" else random_dit(name, torch.float32, device)


def with_network(flow_map: FlowMap, made: nn.Module, dtype: torch.dtype) -> FlowMap:
    """The same flow map around a copy of a network in another dtype, in its plain form."""
    made = copy.deepcopy(made).to(dtype)
    if hasattr(made, "fused"):
        made.fused = False
    return FlowMap(made, **flow_map.settings).eval()


def eager(flow_map: FlowMap, times: Tensor, guidance: float | None) -> Peer:
    """The loop as the papers' code has it: each step from Python, coefficients and times made anew."""

    def prepare(seeds: Tensor, labels: Tensor) -> Step:
        def step() -> tuple[Tensor, ...]:
            x = sampling.initial_state(flow_map, seeds, flow_map.image_shape)
            return (sampling.pushforward(flow_map, x, times, labels, guidance),)

        return step

    return prepare


def compiled(flow_map: FlowMap, times: Tensor, guidance: float | None, mode: str | None) -> Peer:
    """The same loop around a compiled network, which is made when the peer is."""

    def prepare(*inputs: Any) -> Step:
        other = copy.copy(flow_map)
        other._modules = {**flow_map._modules, "network": torch.compile(flow_map.network, mode=mode)}
        return eager(other, times, guidance)(*inputs)

    return prepare


def with_compiled(flow_map: FlowMap) -> FlowMap:
    return FlowMap(torch.compile(copy.deepcopy(flow_map.network)), **flow_map.settings).eval()


def sampled(sampler: Sampler) -> Peer:
    return lambda seeds, labels: lambda: (sampler.sample(seeds, labels),)


def bare(flow_map: FlowMap, rows: int) -> Peer:
    """One evaluation of the network, which is not the loop's result: the floor of one step."""

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


def parts(flow_map: FlowMap, times: Tensor, images: int, guidance: float | None) -> dict[str, Peer]:
    """What a call of imm.Sampler consists of, each alone and with memory of its own."""
    table = sampling.step_table(flow_map, times)
    made, dtype, device = flow_map.network, flow_map.network_dtype, times.device
    copies = 1 if guidance is None else 2
    conditioned = isinstance(made, DiT)

    def labels_of(labels: Tensor) -> Tensor:
        return labels if guidance is None else torch.cat([torch.full_like(labels[:1], flow_map.num_classes), labels])

    def network(seeds: Tensor, labels: Tensor) -> Step:
        x = sampling.initial_state(flow_map, seeds, flow_map.image_shape).to(dtype).repeat(copies, 1, 1, 1)
        t, s = (torch.tensor(v, dtype=torch.float64, device=device)[:, None].repeat(1, len(x)) for v in (table.t, table.s))
        label = labels.repeat(copies)
        rows = torch.zeros(len(x), made.modulation_features, dtype=dtype, device=device) if conditioned else None

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            if conditioned:
                return tuple(made(x, modulation=rows) for _ in table.t)
            return tuple(made(x, t[i], s[i], label) for i in range(len(table)))

        return step

    def conditioning(seeds: Tensor, labels: Tensor) -> Step:
        both = torch.tensor([table.t, table.s], dtype=torch.float64, device=device).T.contiguous()
        label = labels_of(labels)

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            return (made.condition(both, label, distinct=False).rows,)

        return step

    def updates(seeds: Tensor, labels: Tensor) -> Step:
        shape = flow_map.image_shape
        g = torch.randn(images * copies, *shape, device=device).to(dtype)
        uncond = None if guidance is None else g[:images]
        weight = None if guidance is None else torch.full((images,), guidance, dtype=torch.float64, device=device)
        column = lambda values, i: torch.full((1,), values[i], dtype=torch.float64, device=device)
        columns = [[column(v, i) for v in (table.c_skip, table.c_out, table.c_in)] for i in range(len(table))]

        def step() -> tuple[Tensor, ...]:
            x = sampling.initial_state(flow_map, seeds, shape)
            for skip, out, c_in in columns:
                x, given = torch.ops.imm.sampling_step(x, g[-images:], skip, out, uncond, weight, None, None, 1, c_in, copies)
            return x, given

        return step

    found = {NETWORK: network, UPDATES: updates}
    return {**found, CONDITION: conditioning} if conditioned else found


def case(name: str, steps: int, images: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    cuda = device.type == "cuda"
    guidance = None if name == "unet" else GUIDANCE
    rows = images * (1 if guidance is None else 2)
    exact = cache(lambda: FlowMap(network(name, device)).eval())
    times = cache(lambda: sampling.time_grid(exact(), steps))
    plain = cache(lambda dtype: with_network(exact(), exact().network, dtype))
    own = cache(lambda: FlowMap(copy.deepcopy(exact().network).to(dtype), **exact().settings).eval())
    parts_of_a_call = cache(lambda: parts(own(), times(), images, guidance))

    def inputs() -> tuple[Any, ...]:
        for name in make:
            made(name)  # before what the peers allocate is counted
        parts_of_a_call()
        return torch.arange(images, device=device), torch.arange(images, device=device) % exact().num_classes

    def truth(seeds: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        wide = with_network(exact(), exact().network, torch.float64)
        x = sampling.initial_state(wide, seeds, wide.image_shape)
        parts = zip(x.double().split(2), labels.split(2), strict=True)
        return (torch.cat([sampling.pushforward(wide, a, times(), b, guidance, torch.float64) for a, b in parts]),)

    options: dict[str, Any] = {"steps": steps, "guidance": guidance, "dtype": dtype}
    make: dict[str, Callable[[], Peer]] = {
        SAMPLER: lambda: sampled(Sampler(exact(), **options)),
        EAGER: lambda: eager(plain(dtype), times(), guidance),
    }
    if name == "unet" or dtype != torch.float32:  # twice a DiT would be minutes of compiling
        make[COMPILED] = lambda: compiled(plain(dtype), times(), guidance, None)
    if name == "unet":  # has no fused form
        make[SAMPLER_COMPILED] = lambda: sampled(Sampler(with_compiled(exact()), **options))
    if dtype != torch.float32 and rows <= 16:  # seconds a call at more
        make[EAGER_32] = lambda: eager(plain(torch.float32), times(), guidance)
    if cuda:
        make[STEPWISE] = lambda: sampled(Sampler(exact(), graph=False, **options))
        for mode in ("reduce-overhead", "max-autotune"):
            make[f"{COMPILED} {mode}"] = lambda mode=mode: compiled(plain(dtype), times(), guidance, mode)
    if (steps, images) == (1, 1):
        make[FIRST] = lambda: lambda seeds, labels: lambda: (Sampler(exact(), **options).sample(seeds, labels),)
    made = cache(lambda peer: make[peer]())
    beside: dict[str, Peer] = {BARE: lambda *given: bare(own(), rows)(*given)} if steps == 1 else {}
    for part in (NETWORK, UPDATES) if name == "unet" else (NETWORK, UPDATES, CONDITION):
        beside[part] = lambda *given, part=part: parts_of_a_call()[part](*given)
    if cuda:  # a call of imm.Sampler launches no more than a graph
        beside = {name: lambda *given, peer=peer: captured(peer(*given)) for name, peer in beside.items()}
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
        ceilings=beside,
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
