"""The time of continuous tokens: all steps of a head for one token given z, at published shapes, and whole sequences with a
backbone; beside the loop that published code has, which makes each step's modulations anew."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from harness.case import Case, Claim, Peer, Step, call
from harness.measure import copy_peer
from harness.networks import random_network
from harness.timing import captured
from imm.flow_map import FlowMap
from imm.functional import noise
from imm.networks import CausalTransformer, TokenHead
from imm.ops import native
from imm.sampling import TokenSampler, time_grid
from imm.sampling.package import TokenPackage, export_tokens
from imm.sampling.tokens import HeadSteps

TESTS = {"test_tokens.py": "jumps_of_the_head batch_the_length python_loop_bitwise"}
CUDA_TESTS = {"test_triton_noise.py": ""}


class Head(NamedTuple):
    """Blocks and features of a head, numbers of a token and of z."""

    depth: int
    width: int
    dim: int
    cond: int


class Backbone(NamedTuple):
    """Blocks and attention heads, slots of the cache, classes. The features, and the numbers of a token, are its head's."""

    depth: int
    heads: int
    slots: int
    classes: int


#: MAR (Li et al. 2024), SphereAR (Ke and Xue 2025), pocket-tts, CALM, and examples/tokens.py.
HEADS = {
    "MAR-B": Head(6, 1024, 16, 768),
    "MAR-L": Head(8, 1280, 16, 1024),
    "MAR-H": Head(12, 1536, 16, 1280),
    "pocket-tts": Head(6, 512, 32, 1024),
    "CALM": Head(4, 1024, 128, 1024),
    "SphereAR-B": Head(6, 768, 16, 768),
    "SphereAR-L": Head(8, 1024, 16, 1024),
    "SphereAR-H": Head(12, 1280, 16, 1280),
    "digits": Head(2, 96, 16, 96),
}
#: MAR's encoder and decoder as one causal stack.
BACKBONES = {"digits": Backbone(3, 4, 16, 10), "MAR-B": Backbone(24, 12, 256, 1000), "pocket-tts": Backbone(6, 16, 125, 0)}

#: Head, steps, tokens at a time, and whether there are compiled peers: unrolled, eight steps compile for half a minute.
CPU_HEADS = (
    ("pocket-tts", 8, 1, True),
    ("pocket-tts", 1, 1, False),
    ("pocket-tts", 2, 1, False),
    ("pocket-tts", 4, 1, False),
    ("pocket-tts", 2, 8, False),
    ("pocket-tts", 2, 64, False),
    ("MAR-B", 2, 1, False),
    ("SphereAR-B", 2, 1, False),
    ("CALM", 1, 1, False),
)
_MANY = 100  # steps, after which what a token begins with in the caches is nothing
CUDA_HEADS = tuple(
    (name, steps, rows, steps in (2, 8) and rows == 1)
    for name in HEADS
    if name != "digits"
    for steps in (2, 1, 4, *(8,) * (name == "pocket-tts"), _MANY)
    for rows in (1, 64, 8)
)
#: Networks, steps, sequences, tokens of each, whether there is a package.
CPU_SEQUENCES = (("digits", 1, 1, 16, True), ("digits", 4, 1, 16, True), ("digits", 1, 64, 16, False))
CUDA_SEQUENCES = (
    ("MAR-B", 2, 1, 64, True),
    ("MAR-B", 1, 1, 64, False),
    ("MAR-B", 2, 64, 64, False),
    ("pocket-tts", 1, 1, 64, False),
    ("digits", 1, 1, 16, False),
)

F32 = torch.float32
OURS, ANEW = "imm.sampling HeadSteps", "modulations of each step anew"
PLAIN, COMPILED, OURS_COMPILED = "plain eager loop", "plain loop, torch.compile", "imm.sampling HeadSteps, torch.compile"
EACH_STEP = "copy of all weights' bytes at each step"
SAMPLER, STEPWISE = "imm.TokenSampler", "imm.TokenSampler, without a graph"
IN_PYTHON, PACKAGE = "imm.TokenSampler, Python loop", "imm.package.TokenPackage"
#: Weights of so many bytes stay in a cache from one token to the next.
_CACHED = 4 << 20


def head_mode(name: str, steps: int) -> str:
    return f"head of {name}, {steps} step{'s' * (steps > 1)}"


def sequence_mode(name: str, steps: int) -> str:
    return f"sequence of {name}, {steps} head step{'s' * (steps > 1)}"


CLAIMS = (
    Claim(ANEW, OURS, at_least=1.5, mode=head_mode("pocket-tts", 8), up_to={"rows": 1}),
    Claim(PLAIN, OURS, at_least=1.5, mode=head_mode("pocket-tts", 8), up_to={"rows": 1}),
    Claim(IN_PYTHON, PACKAGE, at_least=3.0, mode=sequence_mode("digits", 1), up_to={"sequences": 1}),
    Claim(IN_PYTHON, PACKAGE, at_least=4.0, mode=sequence_mode("digits", 4), up_to={"sequences": 1}),
)


def make_head(name: str) -> TokenHead:
    head = HEADS[name]
    return TokenHead(head.dim, head.cond, head.width, head.depth)


def make_backbone(name: str) -> CausalTransformer:
    head, made = HEADS[name], BACKBONES[name]
    return CausalTransformer(head.dim, head.cond, made.depth, made.heads, made.slots, made.classes)


@lru_cache(maxsize=1)  # the cases of a head follow one another
def random_head(name: str, device: torch.device, dtype: torch.dtype) -> FlowMap:
    small = lambda name, parameter: parameter.dim() < 2 or "modulation" in name
    made = random_network(lambda: make_head(name), lambda name, p: 0.02 if small(name, p) else p[0].numel() ** -0.5)
    return FlowMap(made.to(device=device, dtype=dtype)).eval()


@lru_cache(maxsize=1)
def random_networks(name: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, FlowMap]:
    """Backbone and head."""
    backbone = random_network(lambda: make_backbone(name), lambda name, p: None)
    return backbone.to(device=device, dtype=dtype), random_head(name, device, dtype)


class Weights(NamedTuple):
    """Numbers of the weights that z passes through on its way to the modulations (``z``, then ``modulation``), of those that a
    token passes through (``token``), and of a backbone's."""

    z: int
    modulation: int
    token: int
    backbone: int = 0

    @property
    def conditioning(self) -> int:
        return self.z + self.modulation


@cache
def weights_of(name: str) -> Weights:
    """Counted without memory. The times are embedded once a call, before the first token; of a table of classes or positions a
    row is read."""
    with torch.device("meta"):
        head = make_head(name)
        parts = [make_backbone(name)] if name in BACKBONES else []
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    backbone = sum(count(made.token_embedder, made.blocks, made.norm) for made in parts)
    return Weights(count(head.z_embedder), count(head.modulation), count(head.x_embedder, head.blocks, head.final), backbone)


def wide(flow_map: FlowMap) -> FlowMap:
    """A copy in float64."""
    return FlowMap(copy.deepcopy(flow_map.network).double(), **flow_map.settings).eval()


@torch.no_grad()
def jumps(flow_map: FlowMap, times: list[float], z: Tensor, x: Tensor) -> Tensor:
    """The steps for one token as published code has them: each anew from Python, coefficients, times and modulations."""
    for t, s in itertools.pairwise(times):
        x = flow_map(x, t, s, cond=z)
    return x


@torch.no_grad()
def at_once(steps: HeadSteps, z: Tensor, x: Tensor) -> Tensor:
    return steps(z, x)


@torch.no_grad()
def anew(steps: HeadSteps, z: Tensor, x: Tensor) -> Tensor:
    """The same, but with one matmul a step for the modulations."""
    network: Any = steps.network
    table = steps.table
    for i in range(len(table)):
        (rows,) = network.condition(z, steps.times[i : i + 1])
        g = network((x * table.c_in[i]).to(steps.dtype), cond=z, modulation=rows)
        x = x * table.c_skip[i] + g.to(x.dtype) * table.c_out[i]
    return x


def case(name: str, steps: int, rows: int, device: torch.device, dtype: torch.dtype = F32, compiled: bool = False) -> Case:
    """All steps of a head for one token of each row. Each set of inputs has weights of its own, since between two tokens those
    of the backbone pass through the caches."""
    head, weights, long = HEADS[name], weights_of(name), device.type == "cuda" and steps >= _MANY
    made, times = cache(lambda: random_head(name, device, dtype)), cache(lambda: time_grid(made(), steps).tolist())

    def inputs() -> tuple[Any, ...]:
        flow_map = FlowMap(copy.deepcopy(made().network), **made().settings).eval()
        z, x = (torch.randn(rows, numbers, device=device) for numbers in (head.cond, head.dim))
        return flow_map, z.to(dtype), flow_map.sigma_data * x

    def prepared(function: Callable[..., Tensor]) -> Peer:
        """With the times embedded before, as in a sampler; a long call, which is launched alone, as a graph of its own."""

        def prepare(flow_map: FlowMap, z: Tensor, x: Tensor) -> Step:
            step = call(function)(HeadSteps(flow_map, steps, "uniform", (), "pushforward", None).eval(), z, x)
            return captured(step) if long else step

        return prepare

    def bytes_of(matmuls: int) -> int:
        """With so many matmuls for the modulations, whose weights each of them reads; those that the token passes through, at
        each step; z and noise read, the token written."""
        numbers = matmuls * weights.conditioning + steps * weights.token + rows * head.cond
        return dtype.itemsize * numbers + 4 * 2 * rows * head.dim

    peers: dict[str, Peer] = {
        OURS: prepared(at_once),
        ANEW: prepared(anew),
        PLAIN: lambda flow_map, z, x: call(jumps)(flow_map, times(), z, x),
    }
    if compiled:
        peers[COMPILED] = lambda flow_map, z, x: call(torch.compile(jumps))(flow_map, times(), z, x)
    if compiled and device.type == "cuda":
        peers[OURS_COMPILED] = lambda *given: prepared(torch.compile(at_once))(*given)
    declared = Case(
        op="tokens",
        mode=head_mode(name, steps),
        shape={**head._asdict(), "rows": rows},
        dtype=dtype,
        bytes=bytes_of(1),
        flops=2 * rows * (weights.z + steps * (weights.modulation + weights.token)),
        inputs=inputs,
        truth=lambda flow_map, z, x: (jumps(wide(flow_map), times(), z.double(), x.double()),),
        tolerances=(1e-4 if dtype == F32 else 0.02,),
        peers=peers,
        late=(COMPILED, OURS_COMPILED),
        products=True,
        caches=("warm",) if long else ("cold",),
        rounds=9 if long else 0,
    )
    if steps > 1:
        often = replace(declared, bytes=bytes_of(steps))
        declared = replace(declared, ceilings={EACH_STEP: copy_peer(often, device)})
    return declared


@torch.no_grad()
def plain_sequence(
    backbone: Any, flow_map: FlowMap, times: list[float], tokens: int, seeds: Tensor, labels: Tensor, dtype: torch.dtype = F32
) -> Tensor:
    """The loop over the tokens as published code has it, with the noise of each seed; ``dtype``: of the tokens."""
    drawn = noise(seeds, (tokens, backbone.token_dim), scale=flow_map.sigma_data).to(dtype)
    memory = backbone.make_cache(len(seeds), backbone.max_tokens)
    z, taken = backbone.prefill(labels, memory)
    made = [jumps(flow_map, times, z, drawn[:, 0])]
    for n in range(1, tokens):
        position = torch.tensor([taken + n - 1], device=seeds.device)
        z = backbone.decode(made[-1], position, memory)
        made.append(jumps(flow_map, times, z, drawn[:, n]))
    return torch.stack(made, 1)


@lru_cache(maxsize=4)  # kept from visit to visit: it takes a minute
def packaged(name: str, steps: int, rows: int, device: torch.device, dtype: torch.dtype) -> TokenPackage:
    sampler = TokenSampler(*random_networks(name, device, dtype), steps=steps, max_tokens=BACKBONES[name].slots)
    with tempfile.TemporaryDirectory() as folder:
        export_tokens(sampler, path := Path(folder) / "tokens.pt2", rows=rows)
        return TokenPackage(path)


def in_python(sampler: TokenSampler, seeds: Tensor, labels: Tensor) -> TokenSampler:
    """Its loop for so many rows is made as without the native library, and kept."""
    with mock.patch.object(native, "module", return_value=None):
        sampler.sample(seeds, labels, 1)
    return sampler


def sequence(
    name: str, steps: int, rows: int, tokens: int, device: torch.device, dtype: torch.dtype = F32, packed: bool = False
) -> Case:
    """Whole sequences from their seeds; the time of a token is that of a call over ``tokens``."""
    head, body, weights, cuda = HEADS[name], BACKBONES[name], weights_of(name), device.type == "cuda"
    networks = cache(lambda: random_networks(name, device, dtype))
    times = cache(lambda: time_grid(networks()[1], steps).tolist())
    sampler = lambda **more: TokenSampler(*networks(), steps=steps, max_tokens=body.slots, **more)

    def inputs() -> tuple[Any, ...]:
        for peer in make:
            with contextlib.suppress(Exception):  # for which the peer has its own row
                made(peer)  # before what the peers allocate is counted
        seeds = torch.arange(rows, device=device)
        return seeds, seeds % max(1, body.classes)

    def truth(seeds: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        backbone, flow_map = networks()
        exact = copy.deepcopy(backbone).double(), wide(flow_map)
        return (plain_sequence(*exact, times(), tokens, seeds, labels, torch.float64),)

    of_sampler: Callable[[TokenSampler | TokenPackage], Peer] = lambda made: call(lambda a, b: made.sample(a, b, tokens))
    make: dict[str, Callable[[], Peer]] = {
        SAMPLER: lambda: of_sampler(sampler()),
        IN_PYTHON: lambda: lambda *given: of_sampler(in_python(sampler(graph=False), *given))(*given),
        PLAIN: lambda: call(lambda *given: plain_sequence(*networks(), times(), tokens, *given)),
    }
    if cuda:
        make[STEPWISE] = lambda: of_sampler(sampler(graph=False))
    if packed:
        make[PACKAGE] = lambda: of_sampler(packaged(name, steps, rows, device, dtype))
    made = cache(lambda peer: make[peer]())
    of_token = weights.backbone + weights.conditioning + steps * weights.token
    once = weights.backbone + weights.conditioning + weights.token
    numbers = once if once * dtype.itemsize <= _CACHED else tokens * of_token
    attended = tokens * (tokens + 1) // 2  # slots, of all tokens together
    return Case(
        op="tokens",
        mode=sequence_mode(name, steps),
        shape={"features": head.cond, "depth": body.depth, "sequences": rows, "tokens": tokens},
        dtype=dtype,
        # Weights for each token, or once where a cache holds them; keys and values of the slots so far; the tokens written.
        bytes=dtype.itemsize * (numbers + 2 * rows * attended * body.depth * head.cond) + 4 * rows * tokens * head.dim,
        # A multiply-add a weight, and one a number of the keys and of the values.
        flops=2 * rows * (tokens * (of_token + (steps - 1) * weights.modulation) + 2 * attended * body.depth * head.cond),
        inputs=inputs,
        truth=truth,
        tolerances=(1e-4 if dtype == F32 else 0.05,),
        peers={peer: lambda *given, peer=peer: made(peer)(*given) for peer in make},
        late=(PACKAGE,),
        products=True,
        caches=("warm",),
        rounds=9 if cuda else 0,  # a latency: each call as it is launched
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else F32
    heads, sequences = (CUDA_HEADS, CUDA_SEQUENCES) if cuda else (CPU_HEADS, CPU_SEQUENCES)
    for name, steps, rows, tokens, packed in sequences[:1] if quick else sequences:
        yield sequence(name, steps, rows, tokens, device, dtype, packed and not quick)
    for name, steps, rows, compiled in heads[:1] if quick else heads:
        yield case(name, steps, rows, device, dtype, compiled and not quick)
