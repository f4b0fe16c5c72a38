"""Networks to measure, with weights of the sizes that training gives: no layer is zero. What their forward costs. The MMD as
training scripts have it, and a loss as a training loop calls it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.case import Peer, Step
from imm.flow_map import FlowMap
from imm.networks import DiT, UNet


def random_network(make: Callable[[], nn.Module], std: Callable[[str, nn.Parameter], float | None]) -> nn.Module:
    """A network, in evaluation mode and without gradients, whose parameters are random with these deviations (None: as they
    are); the same weights every time."""
    with torch.random.fork_rng(devices=[]):  # the inputs' numbers do not depend on when a network is made
        torch.random.default_generator.manual_seed(0)
        made = make()
        for name, parameter in made.named_parameters():
            if (deviation := std(name, parameter)) is not None:
                nn.init.normal_(parameter, std=deviation)
    return made.eval().requires_grad_(False)


def random_dit(size: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """DiT-``size``/2 on 32x32 latents."""
    small = lambda name, parameter: parameter.dim() < 2 or "adaLN" in name
    made = random_network(lambda: DiT(size), lambda name, p: 0.02 if small(name, p) else p[0].numel() ** -0.5)
    return made.to(device=device, dtype=dtype)


def random_unet(device: torch.device) -> nn.Module:
    """The demo's network in float32."""
    return random_network(UNet, lambda name, p: 0.1 if name == "conv_out.weight" else None).to(device)


def random_convolutions(make: Callable[[], nn.Module]) -> nn.Module:
    """A network with norms and biases as they are."""
    return random_network(make, lambda name, p: p[0].numel() ** -0.5 if p.dim() > 1 else None)


@dataclass(frozen=True)
class Work:
    """What one image's forward costs a network.

    parameters: its numbers. conditioning: those of them that only times and class pass through, of a DiT: a sampler needs them
    once, however many steps it takes. flops: of its products. image: the numbers of an image, which it reads and writes.
    """

    parameters: int
    conditioning: int
    flops: int
    image: int

    def bytes(self, rows: int, dtype: torch.dtype) -> int:
        """What a forward of so many rows must move in a dtype: weights and images; what lies between may stay in a cache."""
        return dtype.itemsize * (self.parameters + 2 * rows * self.image)


_CONDITIONING = re.compile(r"adaLN_modulation|[tsy]_embedder")


@cache
def work_of(make: Callable[[], nn.Module]) -> Work:
    """What one image costs a network in its plain form; nothing is allocated or computed."""
    with torch.device("meta"):
        made = make()
        flow_map = FlowMap(made)
        time = torch.ones(1, dtype=torch.float64)
        labels = torch.zeros(1, dtype=torch.int64) if flow_map.num_classes else None
        counted = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counted:
            made(torch.zeros(1, *flow_map.image_shape), time, time, labels)
    conditioning = [p for name, p in made.named_parameters() if isinstance(made, DiT) and _CONDITIONING.search(name)]
    total, of_conditioning = (sum(p.numel() for p in given) for given in (made.parameters(), conditioning))
    return Work(total, of_conditioning, counted.get_total_flops(), math.prod(flow_map.image_shape))


@cache
def cost_of(name: str) -> Work:
    """What DiT-``name``/2, or the demo's network ("unet"), costs."""
    return work_of(UNet if name == "unet" else lambda: DiT(name, fused=False))


EPS = 1e-8


def loss_of(mean_kernel: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Squared MMD of each group from the means ``[G]`` of a kernel over all pairs."""
    return lambda y_t, y_r: mean_kernel(y_t, y_t) + mean_kernel(y_r, y_r) - 2 * mean_kernel(y_t, y_r)


def plain_mmd(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Tensor:
    """Eq. 67 for the Laplace kernel with every difference in memory: y_t, y_r ``[G, M, D]``, scale ``[G]`` -> ``[G]``."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(EPS**2).sqrt()  # [G, M, M]
        return torch.exp(-scale[:, None, None] * distance / x.shape[2]).mean((1, 2))

    return loss_of(mean_kernel)(y_t, y_r)


def trained_with(loss: Callable[..., Tensor], learned: int = 0) -> Peer:
    """A peer as a training loop calls it: loss ``[G]``, backward to input ``learned``, a fresh gradient each step."""

    def prepare(*inputs: Any) -> Step:
        leaf = inputs[learned].detach().requires_grad_()
        given = (*inputs[:learned], leaf, *inputs[learned + 1 :])

        def step() -> tuple[Tensor, ...]:
            leaf.grad = None
            value = loss(*given)
            value.sum().backward()
            assert leaf.grad is not None
            return value.detach(), leaf.grad

        return step

    return prepare
