"""imm::timestep_embedding: the sinusoids of the two times that a flow map sees, in one launch.

For each time u of t, s: cos(u f_i) and then sin(u f_i) of the dim / 2 frequencies f_i = max_period^(-i / (dim / 2)). The phase
is float64: at u = 994 neighbouring training times differ by 1e-3, below bfloat16's and float16's resolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from imm.ops import triton_kernels
from imm.ops.dtypes import DTYPES
from imm.ops.registry import no_second_derivative, register, register_autograd, register_tangents


def _check(t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype) -> None:
    if t.dim() != 1 or s.shape != t.shape:
        raise ValueError(f"t and s: expected the same shape [B], got {list(t.shape)} and {list(s.shape)}")
    for name, value in (("t", t), ("s", s)):
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
    if s.device != t.device:
        raise ValueError(f"s: expected the device {t.device}, got {s.device}")
    if dim < 2 or dim % 2:
        raise ValueError(f"dim: expected a positive even number, got {dim}")
    if not 1.0 < max_period < math.inf:
        raise ValueError(f"max_period: expected a finite number > 1, got {max_period}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected a floating dtype of 16, 32 or 64 bits, got {dtype}")


#: Of DiT's and the U-Net's embeddings.
MAX_PERIOD = 10000.0


def _frequencies(half: int, max_period: float, device: torch.device) -> Tensor:
    index = torch.arange(half, dtype=torch.float64, device=device)
    return torch.exp(-math.log(max_period) / half * index)


def sinusoids(times: Tensor, dim: int, max_period: float = MAX_PERIOD) -> Tensor:
    """cos then sin of the times' dim / 2 phases: ``[...]`` floating -> ``[..., dim]`` float64."""
    phase = times.double()[..., None] * _frequencies(dim // 2, max_period, times.device)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def timestep_embedding(t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype) -> Tensor:
    """Reference of imm::timestep_embedding: times [B] -> [2, B, dim] of ``dtype``, t's embedding first."""
    return sinusoids(torch.stack([t.double(), s.double()]), dim, max_period).to(dtype)


def timestep_embedding_jvp(
    t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype, dt: Tensor, ds: Tensor
) -> tuple[Tensor, ...]:
    """The embeddings and their tangents along dt and ds [B]: -sin(u f) f du and cos(u f) f du."""
    frequencies = _frequencies(dim // 2, max_period, t.device)
    phase, rate = (torch.stack([a.double(), b.double()])[..., None] * frequencies for a, b in ((t, s), (dt, ds)))
    cos, sin = phase.cos(), phase.sin()
    return tuple(torch.cat(halves, dim=-1).to(dtype) for halves in ((cos, sin), (-sin * rate, cos * rate)))


def timestep_embedding_bwd(grad: Tensor, t: Tensor, s: Tensor, max_period: float) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`timestep_embedding` to t and s."""
    half = grad.shape[2] // 2
    frequencies = _frequencies(half, max_period, t.device)
    phase = torch.stack([t.double(), s.double()])[..., None] * frequencies
    up = grad.double()
    grad_t, grad_s = ((phase.cos() * up[..., half:] - phase.sin() * up[..., :half]) * frequencies).sum(2)
    return grad_t.to(t.dtype, copy=True), grad_s.to(s.dtype, copy=True)


def _check_bwd(grad: Tensor, t: Tensor, s: Tensor, max_period: float) -> None:
    if grad.dim() != 3 or grad.shape[0] != 2 or grad.shape[1:2] != t.shape:
        raise ValueError(f"grad: expected [2, {t.shape[0] if t.dim() else ''}, dim], got {list(grad.shape)}")
    _check(t, s, grad.shape[2], max_period, grad.dtype)
    if grad.device != t.device:
        raise ValueError(f"grad: expected the device {t.device}, got {grad.device}")


def _fake(t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype) -> Tensor:
    return t.new_empty((2, t.shape[0], dim), dtype=dtype)


def _fake_bwd(grad: Tensor, t: Tensor, s: Tensor, max_period: float) -> tuple[Tensor, Tensor]:
    return t.new_empty(t.shape), s.new_empty(s.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, s, _, max_period, _ = inputs
    ctx.save_for_backward(t, s)
    ctx.max_period = max_period


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.imm.timestep_embedding_bwd(grad, *ctx.saved_tensors, ctx.max_period), None, None, None


register(
    "timestep_embedding",
    check=_check,
    reference=timestep_embedding,
    fake=_fake,
    native=("cpu",),
    triton=triton_kernels.implementation("timestep_embedding.timestep_embedding", *DTYPES),
)
# Times have no gradient in training: no kernel on CUDA.
register("timestep_embedding_bwd", check=_check_bwd, reference=timestep_embedding_bwd, fake=_fake_bwd, native=("cpu",))
register_autograd("timestep_embedding", _backward, _setup, tangents=True)
register_tangents(
    "timestep_embedding",
    timestep_embedding_jvp,
    check=_check,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    native=("cpu",),
    triton=triton_kernels.implementation("timestep_embedding.timestep_embedding_jvp", *DTYPES),
)
no_second_derivative("timestep_embedding_bwd")
