"""A whole IMM training step: draws, the network with and without gradient, loss, backward, optimizer, average of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from imm.benchmark import steps
from imm.benchmark.case import Case, Peer, Step
from imm.benchmark.memory import allocator_limit, bytes_of_two_steps, largest, peak_bytes
from imm.benchmark.networks import Work, random_convolutions, random_dit, work_of
from imm.benchmark.rows import OK, Row
from imm.flow_map import FlowMap
from imm.networks import DDPMpp, DiT, UNet
from imm.presets import PRESETS, Preset

TESTS = {"test_objective.py": "", "test_training.py": "bit_for_bit"}
CUDA_TESTS = {
    "test_bench_objective.py": "replayed",
    "test_triton_mmd.py": "flow_map",
    "test_triton_adaln.py": "",
    "test_triton_attention.py": "float64",
}

#: Network, images, M, whether torch.compile is a peer (on two cores it takes one minute for the U-Net, two for DDPM++), and how
#: many calls are timed (0: as many as the effort says).
CPU_CASES = (("UNet", 64, 4, False, 0), ("DiT-S/2", 4, 4, True, 6), ("DDPM++", 4, 4, False, 4))
CUDA_CASES = (
    ("DiT-S/2", 128, 4, True, 9),
    ("DiT-B/2", 64, 4, True, 9),
    ("DDPM++", 128, 4, True, 9),
    ("DiT-S/2", 512, 4, False, 9),
    ("DiT-B/2", 256, 4, False, 9),
    ("DDPM++", 512, 4, False, 9),
)
#: Networks and images whose memory is measured by M.
CPU_MEMORY = (("UNet", 16), ("DiT-S/2", 16))
#: Networks whose largest batch is looked for, within so many bytes of torch's allocator and seconds: memory grows with the
#: batch, and small ones are quick to try.
CUDA_MEMORY, LIMIT, SECONDS = ("DiT-S/2", "DiT-B/2", "DDPM++"), 24 << 30, 8.0

OURS, CAPTURED = "imm.training.Trainer", "imm, the step as one CUDA graph"
PLAIN, COMPILED = "plain eager step", "plain step, torch.compile of network and loss"


class Network(NamedTuple):
    """``made(device)`` has weights as after training, ``bare()`` is what its cost is counted on, without memory."""

    preset: Preset
    optimizer: str
    watched: tuple[str, str]
    bare: Callable[[], nn.Module]
    made: Callable[[torch.device], nn.Module]


def _dit(size: str) -> Network:
    made = functools.partial(random_dit, size, torch.float32)
    watched = "blocks.0.attn.qkv.weight", "final_layer.linear.weight"
    return Network(PRESETS[f"dit-{size.lower()}-2"], "adamw", watched, functools.partial(DiT, size, fused=False), made)


def _convolutional(preset: Preset, optimizer: str, watched: tuple[str, str], bare: Callable[[], nn.Module]) -> Network:
    return Network(preset, optimizer, watched, bare, lambda device: random_convolutions(bare()).to(device))


_CIFAR10 = PRESETS["cifar10"]
#: "UNet" is the demo's network and objective; DDPM++ has the published CIFAR-10 settings, but no dropout (``steps.Training``).
NETWORKS = {
    "UNet": _convolutional(Preset("UNet", {}, objective={"a": 1}), "adamw", ("conv_in.weight", "conv_out.weight"), UNet),
    "DiT-S/2": _dit("S"),
    "DiT-B/2": _dit("B"),
    "DDPM++": _convolutional(
        _CIFAR10,
        "radam",
        ("enc.32x32_conv.weight", "dec.32x32_aux_conv.weight"),
        functools.partial(DDPMpp, **{**_CIFAR10.arguments, "dropout": 0.0}),
    ),
}


@functools.cache
def cost_of(name: str) -> Work:
    with torch.device("meta"):
        return work_of(NETWORKS[name].bare())


def case(
    name: str,
    batch: int,
    particles: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    compiled: bool = True,
    rounds: int = 0,
) -> Case:
    """Nothing is allocated before the inputs, a peer or the truth are asked for."""
    chosen, cost = NETWORKS[name], cost_of(name)
    made = functools.cache(lambda: chosen.made(device))
    training = steps.Training(made, chosen.preset, particles, chosen.optimizer, dtype, chosen.watched)

    def inputs() -> tuple[Any, ...]:
        flow_map = FlowMap(made())
        x = torch.randn(batch, *flow_map.image_shape, device=device) * flow_map.sigma_data
        return x, torch.arange(batch, device=device) % flow_map.num_classes if flow_map.num_classes else None

    def peer(step: Callable[..., Any], **options: Any) -> Peer:
        """Kept when it is made: the harness asks for it twice with the same inputs, and compiling takes long. What was made for
        others goes."""
        return functools.lru_cache(maxsize=1)(functools.partial(step, training, **options))

    peers = {OURS: peer(steps.trainer_step), PLAIN: peer(steps.plain_step)}
    if compiled:
        peers[COMPILED] = peer(steps.plain_step, compiled=True)
    if device.type == "cuda":
        peers[CAPTURED] = peer(steps.captured_step)
    return Case(
        op="objective",
        mode=f"{name}, one step",
        shape={"batch": batch, "M": particles},
        dtype=dtype,
        # I/O in float32, each number once: weights, two moments and average, read and written; gradient, written and read; the
        # images; what the network reads and gives at t and at r. What lies between may stay in a cache.
        bytes=4 * (10 * cost.parameters + 5 * batch * cost.image),
        # With gradient three times the forward, without once.
        flops=4 * batch * cost.flops,
        inputs=inputs,
        truth=lambda x, labels: steps.exact_outputs(training, x, labels),
        tolerances=(1e-4, 1e-3, 1e-3) if dtype == torch.float32 else (1e-2, 5e-2, 5e-2),
        peers=peers,
        late=(COMPILED,),
        products=True,
        ceilings=steps.parts(training),
        caches=("warm",),
        rounds=rounds,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    shapes = CUDA_CASES if cuda else CPU_CASES
    for name, batch, particles, compiled, rounds in shapes[:1] if quick else shapes:
        yield case(name, batch, particles, device, dtype, compiled=compiled, rounds=rounds)


def limits(device: torch.device) -> Iterator[list[Row]]:
    """What a step needs: on the CPU bytes per image by M, on CUDA the largest batch and the largest M that fit."""
    return largest_that_fit(device) if device.type == "cuda" else bytes_per_image(device)


def bytes_per_image(device: torch.device) -> Iterator[list[Row]]:
    for name, batch in CPU_MEMORY:
        found = []
        for peer in (OURS, PLAIN):
            for particles in (4, 16):
                declared = case(name, batch, particles, device)
                peak = peak_bytes(declared.peers[peer], declared.inputs(), device)
                status = f"{OK}: {peak / batch / 1e6:.1f} MB an image"
                row = Row.of(declared, device, cache="warm", peer=f"{peer}, M={particles}", status=status, peak_bytes=peak)
                found.append(replace(row, mode=f"{name}, memory of a step", shape=f"batch={batch}", bytes=0, flops=0))
        yield found


def largest_that_fit(device: torch.device) -> Iterator[list[Row]]:
    for name in CUDA_MEMORY:
        peak = functools.partial(_peak, name, device)
        searched = replace(case(name, 4, 4, device, torch.bfloat16), mode=f"{name}, largest in {LIMIT >> 30} GiB")

        def row(peer: str, text: str, taken: int, shape: str, searched: Case = searched) -> Row:
            found = Row.of(searched, device, cache="warm", peer=peer, status=f"{OK}: {text}", peak_bytes=taken)
            return replace(found, shape=shape, bytes=0, flops=0)

        rows, common = [], 4
        for peer in (OURS, PLAIN):
            with allocator_limit(LIMIT, device):
                batch, taken, above = largest(functools.partial(peak, peer, 4), 4, SECONDS)
            text = f"{batch} images" + ("" if above is None else f", {above} are too many")
            rows.append(row(peer, text, taken, shape="M=4"))
            common = max(common, batch)
        yield rows
        common = 1 << ((common // 2).bit_length() - 1)  # a power of two of at most half as many: groups of any size divide it
        rows = []
        for peer in (OURS, PLAIN):
            with allocator_limit(LIMIT, device):
                tried = ((m, peak(peer, m, common)) for m in (common >> i for i in range(common.bit_length() - 1)))
                particles, taken = next((found for found in tried if found[1] is not None), (0, 0))
            rows.append(row(peer, f"M up to {particles}", taken, shape=f"batch={common}"))
        yield rows


def _peak(name: str, device: torch.device, peer: str, particles: int, batch: int) -> int | None:
    def make() -> Step:
        declared = case(name, batch, particles, device, torch.bfloat16)
        return declared.peers[peer](*declared.inputs())

    return bytes_of_two_steps(make)
