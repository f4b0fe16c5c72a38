"""Networks to measure, with weights of the sizes that training gives: no layer is zero.

An op file calls these from a case's ``inputs``, through ``functools.cache``: a case that is only declared makes no network.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

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


@cache
def parameters(name: str) -> int:
    """How many numbers DiT-``name``/2, or the demo's network ("unet"), has; nothing is allocated."""
    with torch.device("meta"):
        made = UNet() if name == "unet" else DiT(name)
    return sum(parameter.numel() for parameter in made.parameters())
