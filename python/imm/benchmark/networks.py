"""Networks to measure, with weights of the sizes that training gives: no layer is zero."""

from __future__ import annotations

import torch
from torch import nn

from imm.networks import DiT


def random_dit(size: str, dtype: torch.dtype, device: torch.device) -> DiT:
    """DiT-``size``/2 on 32x32 latents, in evaluation mode, without gradients; the same weights every time."""
    torch.manual_seed(0)
    made = DiT(size)
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, std=0.02 if parameter.dim() < 2 or "adaLN" in name else parameter[0].numel() ** -0.5)
    return made.to(device=device, dtype=dtype).eval().requires_grad_(False)
