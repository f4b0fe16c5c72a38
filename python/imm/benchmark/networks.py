"""Networks to measure, with weights of the sizes that training gives: no layer is zero. What their forward costs.

An op file calls these from a case's ``inputs``, through ``functools.cache``: a case that is only declared makes no network.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from imm.flow_map import FlowMap
from imm.networks import DiT, UNet


def random_dit(size: str, dtype: torch.dtype, device: torch.device) -> DiT:
    """DiT-``size``/2 on 32x32 latents, in evaluation mode, without gradients; the same weights every time."""
    with torch.random.fork_rng(devices=[]):  # the inputs' numbers do not depend on when a network is made
        torch.random.default_generator.manual_seed(0)
        made = DiT(size)
        for name, parameter in made.named_parameters():
            std = 0.02 if parameter.dim() < 2 or "adaLN" in name else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std)
    return made.to(device=device, dtype=dtype).eval().requires_grad_(False)


def random_unet(device: torch.device) -> UNet:
    """The demo's network in float32, in evaluation mode, without gradients; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        made = UNet()
        nn.init.normal_(made.conv_out.weight, std=0.1)
    return made.to(device).eval().requires_grad_(False)


def random_convolutions(made: nn.Module) -> nn.Module:
    """The network with random weights of its layers' fan-in, norms and biases as they are; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        for parameter in made.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return made


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


class _Products(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d):  # each output is a product with one row of the weights
            self.flops += 2 * out.numel() * args[1][0].numel()
        elif func is F.scaled_dot_product_attention:
            self.flops += 4 * out.numel() * args[1].shape[-2]
        return out


def work_of(made: nn.Module) -> Work:
    """What one image costs a network in its plain form. It may be on the meta device: nothing is computed."""
    flow_map = FlowMap(made)
    device = next(made.parameters()).device
    time = torch.ones(1, dtype=torch.float64, device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device) if flow_map.num_classes else None
    with torch.no_grad(), _Products() as counted:
        made(torch.zeros(1, *flow_map.image_shape, device=device), time, time, labels)
    conditioning = [p for name, p in made.named_parameters() if isinstance(made, DiT) and _CONDITIONING.search(name)]
    total, of_conditioning = (sum(p.numel() for p in given) for given in (made.parameters(), conditioning))
    return Work(total, of_conditioning, counted.flops, math.prod(flow_map.image_shape))


@cache
def cost_of(name: str) -> Work:
    """What DiT-``name``/2, or the demo's network ("unet"), costs; nothing is allocated."""
    with torch.device("meta"):
        return work_of(UNet() if name == "unet" else DiT(name, fused=False))
