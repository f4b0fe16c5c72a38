"""Arguments for every op in several memory layouts. An op without an entry fails ``test_ops.py``.

An out= overload's last argument is the dictionary of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VARIANTS = ("contiguous", "permuted", "sliced", "empty")


def tensor(shape: tuple[int, ...], variant: str, dtype: torch.dtype, device: str, grad: bool = True) -> Tensor:
    """Random numbers of a shape in a layout; "empty" has no first dimension."""
    if variant == "empty":
        shape = (0, *shape[1:])
    if variant == "permuted":
        value = torch.randn(*reversed(shape), dtype=torch.float64, device=device).permute(*reversed(range(len(shape))))
    elif variant == "sliced":
        value = torch.randn(*(2 * n for n in shape), dtype=torch.float64, device=device)
        value = value[tuple(slice(n // 2, n // 2 + n) for n in shape)]
    else:
        value = torch.randn(shape, dtype=torch.float64, device=device)
    # A dtype conversion keeps the strides.
    return value.to(dtype).detach().requires_grad_(grad)


def coefficients(count: int, variant: str, device: str) -> Tensor:
    return torch.rand(0 if variant == "empty" else count, dtype=torch.float64, device=device) + 0.5


KERNEL: tuple[Any, ...] = ("laplace", [0.5, 2.0], 1e-8)


def mmd_loss(variant: str, dtype: torch.dtype, device: str, kernel: tuple[Any, ...] = KERNEL) -> tuple[Any, ...]:
    y_t = tensor((3, 4, 17), variant, dtype, device)
    y_r = tensor((3, 4, 17), variant, dtype, device, grad=False)
    return y_t, y_r, coefficients(3, variant, device), coefficients(3, variant, device), *kernel, False


def mmd_loss_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    y_t, y_r, _, weight, *_ = mmd_loss(variant, dtype, device)
    accumulate = torch.promote_types(dtype, torch.float32)
    slopes = tensor((3, 4, 8), variant, accumulate, device, grad=False)
    return coefficients(3, variant, device).to(accumulate), slopes, y_t.detach(), y_r, weight, True


def flow_map_mmd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x_t, x_r, g_r = (tensor((3, 4, 17), variant, dtype, device, grad=False) for _ in range(3))
    g_t = tensor((3, 4, 17), variant, dtype, device)
    numbers = (coefficients(3, variant, device) for _ in range(6))
    return x_t, x_r, g_t, g_r, *numbers, coefficients(1, "contiguous", device), *KERNEL, True


def flow_map_mmd_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    finished = tensor((3, 4, 17), variant, dtype, device, grad=False)
    return coefficients(3, variant, device), finished, finished.clone(), coefficients(3, variant, device)


def energy_score(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Targets are drawn where x is permuted, given elsewhere."""
    x = tensor((3, 4, 16), variant, dtype, device)
    numbers = coefficients(3, variant, device), coefficients(3, variant, device), 1.5, 0.5, None, "energy", [1.0]
    if variant != "permuted":
        return x, tensor((3, 5, 16), variant, dtype, device, grad=False), None, None, 0, *numbers
    mean, log_std = (tensor((3, 16), variant, dtype, device, grad=False) for _ in range(2))
    return x, mean, log_std, torch.tensor([2**40], device=device), 5, *numbers


def energy_score_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    finished = tensor((3, 4, 16), variant, dtype, device, grad=False)
    return coefficients(3, variant, device), finished, finished.clone()


def mmd_gram(variant: str, dtype: torch.dtype, device: str, kernel: tuple[Any, ...] = KERNEL) -> tuple[Any, ...]:
    x, y = tensor((3, 4, 17), variant, dtype, device), tensor((3, 5, 17), variant, dtype, device)
    return x, y, coefficients(3, variant, device), *kernel


def mmd_gram_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, y, *rest = mmd_gram(variant, dtype, device)
    grad = torch.randn(x.shape[0], 4, 5, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return grad, x.detach(), y.detach(), *rest


def flow_step(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, g, g_uncond = (tensor((3, 2, 5), variant, dtype, device) for _ in range(3))
    skip, out, guidance, c_noise = (coefficients(3, variant, device) for _ in range(4))
    seeds = torch.arange(len(x), device=device) + 2**40
    return x, g, skip, out, g_uncond, guidance, c_noise, seeds, 3


def flow_step_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, g, skip, out, g_uncond, guidance, *_ = flow_step(variant, dtype, device)
    return x.detach(), g.detach(), skip, out, g_uncond.detach(), guidance


def sampling_step(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    arguments = (a.detach() if isinstance(a, Tensor) else a for a in flow_step(variant, dtype, device))
    return *arguments, coefficients(3, variant, device), 2


def adaln_modulate(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x = tensor((3, 4, 17), variant, dtype, device)
    return x, *(tensor((3, 17), variant, dtype, device) for _ in range(2)), 1e-6


def adaln_modulate_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, _, scale, eps = adaln_modulate(variant, dtype, device)
    return tensor((3, 4, 17), variant, dtype, device, grad=False), x.detach(), scale.detach(), eps


def gated_residual_adaln(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    x, y = (tensor((3, 4, 17), variant, dtype, device) for _ in range(2))
    return x, y, *(tensor((3, 17), variant, dtype, device) for _ in range(3)), 1e-6


def gated_residual_adaln_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    tokens = (tensor((3, 4, 17), variant, dtype, device, grad=False) for _ in range(4))
    return *tokens, *(tensor((3, 17), variant, dtype, device, grad=False) for _ in range(2)), 1e-6


def timestep_attention(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return tensor((3, 5, 3 * 2 * 8), variant, dtype, device), 2


def timestep_attention_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    qkv, heads = timestep_attention(variant, dtype, device)
    with torch.no_grad():
        out, lse = torch.ops.imm.timestep_attention(qkv, heads)
    return tensor((3, 5, 2 * 8), variant, dtype, device, grad=False), qkv.detach(), out, lse, heads


def timestep_embedding(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return *(tensor((3,), variant, dtype, device) for _ in range(2)), 8, 100.0, dtype


def timestep_embedding_bwd(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    t, s, *_ = timestep_embedding(variant, dtype, device)
    return torch.randn(2, len(t), 8, device=device).to(dtype), t.detach(), s.detach(), 100.0


def with_tangents(sample: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """A sample of a ``_jvp`` op: the op's own arguments, and a tangent for each tensor."""

    def make(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in sample(variant, dtype, device)]
        return *arguments, *(torch.randn_like(a) for a in arguments if isinstance(a, Tensor))

    return make


def noise(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    seeds = torch.tensor([] if variant == "empty" else [0, 7, 2**62], dtype=torch.int64, device=device)
    if variant == "sliced":
        seeds = torch.arange(6, device=device)[::2]
    return seeds, 7, 2, 0.5


def out_form(sample: Callable[..., tuple[Any, ...]], op: str, *names: str) -> Callable[..., tuple[Any, ...]]:
    """A sample of an out= overload: the functional op's arguments without gradients, and tensors like its results."""

    def make(variant: str, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        arguments = [a.detach() if isinstance(a, Tensor) else a for a in sample(variant, dtype, device)]
        results = getattr(torch.ops.imm, op).default(*arguments)
        results = results if isinstance(results, tuple) else (results,)
        return (*arguments, {name: torch.empty_like(r) for name, r in zip(names, results, strict=True)})

    return make


SAMPLES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "mmd_loss": mmd_loss,
    "mmd_loss_bwd": mmd_loss_bwd,
    "flow_map_mmd": flow_map_mmd,
    "flow_map_mmd_bwd": flow_map_mmd_bwd,
    "energy_score": energy_score,
    "energy_score_bwd": energy_score_bwd,
    "mmd_gram": mmd_gram,
    "mmd_gram_bwd": mmd_gram_bwd,
    "flow_step": flow_step,
    "flow_step.out": out_form(flow_step, "flow_step", "out"),
    "flow_step_bwd": flow_step_bwd,
    "sampling_step": sampling_step,
    "sampling_step.out": out_form(sampling_step, "sampling_step", "out", "input"),
    "adaln_modulate": adaln_modulate,
    "adaln_modulate_bwd": adaln_modulate_bwd,
    "adaln_modulate_jvp": with_tangents(adaln_modulate),
    "gated_residual_adaln": gated_residual_adaln,
    "gated_residual_adaln_bwd": gated_residual_adaln_bwd,
    "gated_residual_adaln_jvp": with_tangents(gated_residual_adaln),
    "timestep_attention": timestep_attention,
    "timestep_attention_bwd": timestep_attention_bwd,
    "timestep_attention_jvp": with_tangents(timestep_attention),
    "timestep_embedding": timestep_embedding,
    "timestep_embedding_bwd": timestep_embedding_bwd,
    "timestep_embedding_jvp": with_tangents(timestep_embedding),
    "noise": noise,
    "noise.out": out_form(noise, "noise", "out"),
}
