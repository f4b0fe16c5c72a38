"""A whole IMM training step: draws, the network with and without gradient, loss, backward, optimizer, average of weights. On
the CPU also forward, derivative and backward of MeanFlow, whose derivative is a tangent or a difference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from harness import steps
from harness.case import Case, Peer
from harness.networks import random_convolutions, random_dit, work_of
from imm.flow_map import FlowMap
from imm.networks import DDPMpp, DiT, UNet
from imm.presets import PRESETS, Preset

TESTS = {"test_objective.py": "", "test_training.py": "bit_for_bit", "test_objectives.py": "meanflow"}
CUDA_TESTS = {"test_triton_mmd.py": "flow_map", "test_triton_adaln.py": "", "test_triton_attention.py": "float64"}

#: Network, images, M, whether there are compiled peers (on two cores they take minutes; not in quick runs), and how many calls
#: are timed (0: as many as the effort says).
CPU_CASES = (("UNet", 64, 4, True, 0), ("DiT-S/2", 4, 4, True, 6), ("DDPM++", 4, 4, False, 4))
CUDA_CASES = (
    ("DiT-S/2", 128, 4, True, 9),
    ("DiT-B/2", 64, 4, True, 9),
    ("DDPM++", 128, 4, True, 9),
    ("DiT-S/2", 512, 4, False, 9),
    ("DiT-B/2", 256, 4, False, 9),
    ("DDPM++", 512, 4, False, 9),
)

#: Images of a MeanFlow step of DiT-S/2, and how many of them have s < t and so a derivative: a quarter, the default, and all.
MEANFLOW_CASES = ((4, 1), (4, 4))

F32 = torch.float32
OURS, PLAIN = "imm.training.Trainer", "plain eager step"
TANGENT, DIFFERENCE, PLAIN_TANGENT = "imm, tangent", "imm, difference", "plain network, tangent"
FLOW_MATCHING = "imm, flow matching: no derivative"
OURS_COMPILED, COMPILED = "imm.training.Trainer, compile=True", "plain step, torch.compile of network and loss"


class Network(NamedTuple):
    """``made(device)`` has weights as after training, ``bare()`` is what its cost is counted on, without memory."""

    preset: Preset
    optimizer: str
    watched: tuple[str, str]
    bare: Callable[[], nn.Module]
    made: Callable[[torch.device], nn.Module]


def _dit(size: str) -> Network:
    watched = "blocks.0.attn.qkv.weight", "final_layer.linear.weight"
    bare, made = functools.partial(DiT, size, fused=False), functools.partial(random_dit, size, torch.float32)
    return Network(PRESETS[f"dit-{size.lower()}-2"], "adamw", watched, bare, made)


def _ddpmpp() -> nn.Module:
    return DDPMpp(**{**PRESETS["cifar10"].arguments, "dropout": 0.0})  # (steps.Training)


_ENDS = "enc.32x32_conv.weight", "dec.32x32_aux_conv.weight"
_DEMO = Preset("UNet", {}, objective={"a": 1}), "adamw", ("conv_in.weight", "conv_out.weight")
#: "UNet" is the demo's network and objective; DDPM++ has the published CIFAR-10 settings, but no dropout.
NETWORKS = {
    "UNet": Network(*_DEMO, UNet, lambda device: random_convolutions(UNet).to(device)),
    "DiT-S/2": _dit("S"),
    "DiT-B/2": _dit("B"),
    "DDPM++": Network(PRESETS["cifar10"], "radam", _ENDS, _ddpmpp, lambda device: random_convolutions(_ddpmpp).to(device)),
}


def case(
    name: str, batch: int, M: int, device: torch.device, dtype: torch.dtype = F32, compiled: bool = True, rounds: int = 0
) -> Case:
    """Nothing is allocated before the inputs, a peer or the truth are asked for."""
    chosen, cost = NETWORKS[name], work_of(NETWORKS[name].bare)
    made = functools.cache(lambda: chosen.made(device))
    training = steps.Training(made, chosen.preset, M, chosen.optimizer, dtype, chosen.watched)

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
        peers[OURS_COMPILED] = peer(steps.trainer_step, compiled=True)
        peers[COMPILED] = peer(steps.plain_step, compiled=True)
    return Case(
        op="objective",
        mode=f"{name}, one step",
        shape={"batch": batch, "M": M},
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
        late=(OURS_COMPILED, COMPILED),
        products=True,
        caches=("warm",),
        rounds=rounds,
    )


def meanflow(batch: int, jumps: int, device: torch.device) -> Case:
    """The step of the default settings but for the share that jumps. Times are unscaled, as in the published settings."""
    chosen, cost = NETWORKS["DiT-S/2"], work_of(NETWORKS["DiT-S/2"].bare)
    made = functools.cache(lambda: chosen.made(device))
    training = steps.Training(made, PRESETS["imagenet256-meanflow-b-4"], 1, chosen.optimizer, F32, chosen.watched)
    share = 1.0 - jumps / batch

    def inputs() -> tuple[Any, ...]:
        flow_map = FlowMap(made())
        x = torch.randn(batch, *flow_map.image_shape, device=device) * flow_map.sigma_data
        return x, torch.arange(batch, device=device)

    def peer(**options: Any) -> Peer:
        return functools.partial(steps.bare_step, training, loss="meanflow", fm_share=share, **options)

    return Case(
        op="objective",
        mode="DiT-S/2, MeanFlow without the optimizer",
        shape={"batch": batch, "jumps": jumps},
        dtype=F32,
        # The weights read, their gradient written, and the images.
        bytes=4 * (2 * cost.parameters + 3 * batch * cost.image),
        # With gradient three times the forward, the derivative once more.
        flops=(3 * batch + jumps) * cost.flops,
        inputs=inputs,
        truth=lambda x, labels: steps.exact_bare_step(training, x, labels, loss="meanflow", fm_share=share),
        tolerances=(1e-4, 1e-3, 1e-3),
        peers={TANGENT: peer(), DIFFERENCE: peer(derivative="difference"), PLAIN_TANGENT: peer(fused=False)},
        ceilings={FLOW_MATCHING: functools.partial(steps.bare_step, training, loss="fm")},
        products=True,
        caches=("warm",),
        rounds=4,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    shapes = CUDA_CASES if cuda else CPU_CASES
    for name, batch, M, compiled, rounds in shapes[:1] if quick else shapes:
        yield case(name, batch, M, device, dtype, compiled and (cuda or not quick), rounds)
    for batch, jumps in () if cuda or quick else MEANFLOW_CASES:
        yield meanflow(batch, jumps, device)
