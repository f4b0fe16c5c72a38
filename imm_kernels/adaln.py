"""LayerNorm with adaLN modulation, alone and after a gated residual: h = norm(z) (1 + scale) + shift, z = x or x + gate y.

Tokens [B, T, C] are contiguous rows of C features; gate, shift and scale are rows of any stride, one per image or (stride 0)
one for all. Arithmetic is float32, float64 for float64 tokens.

Forward: a program takes one token; with one warp (C <= 2048) no program waits at a barrier, and the modulations of an image,
which all its tokens read, stay in the caches. Moves 2 B T C elements, 4 with the residual.
Backward: a program takes ROWS tokens of an image and leaves its part of the modulations' gradients, which are added in order
afterwards. Nothing is saved but z: its mean and deviation cost no memory to find again.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.device import next_power_of_2

#: Features that a program holds in its registers.
LARGEST = 8192
#: Tokens of a program of the backward.
ROWS = 16


class Modulation(NamedTuple):
    """[B or 1, C] numbers with contiguous features, and elements from one image's to the next: 0 where one serves all."""

    ptr: Tensor
    stride: int


@triton.jit
def _adaln_fwd_kernel(
    x_ptr,  # [B T, C]
    y_ptr,  # [B T, C], absent without a residual
    gate_ptr,  # [B or 1, C], as the two below
    shift_ptr,
    scale_ptr,
    z_ptr,  # [B T, C], absent without a residual
    h_ptr,  # [B T, C]
    gate_stride,
    shift_stride,
    scale_stride,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    offs = row * C + offs_c
    z = tl.load(x_ptr + offs, mask=mask_c, other=0.0).to(acc_dtype)  # [BLOCK_C]
    if y_ptr is not None:
        gate = tl.load(gate_ptr + image * gate_stride + offs_c, mask=mask_c, other=0.0).to(acc_dtype)
        z += gate * tl.load(y_ptr + offs, mask=mask_c, other=0.0).to(acc_dtype)
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask_c)
    centred = tl.where(mask_c, z - tl.sum(z, 0) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    scale = tl.load(scale_ptr + image * scale_stride + offs_c, mask=mask_c, other=0.0).to(acc_dtype)
    shift = tl.load(shift_ptr + image * shift_stride + offs_c, mask=mask_c, other=0.0).to(acc_dtype)
    h = centred * rstd * (1.0 + scale) + shift
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _modulation(of, image, offs_c, mask, dtype: tl.constexpr):
    return tl.load(of.ptr + image * of.stride + offs_c, mask=mask, other=0.0).to(dtype)


@triton.jit
def _adaln_jvp_kernel(
    x_ptr,  # [B T, C], as all tokens
    dx_ptr,
    y_ptr,  # absent without a residual, as dy, gate, dgate, z and dz
    dy_ptr,
    gate,  # a Modulation, as the ones below
    dgate,
    shift,
    dshift,
    scale,
    dscale,
    z_ptr,
    dz_ptr,
    h_ptr,
    dh_ptr,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The forward and its tangent along all arguments; a program takes one token."""
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    image = row // tokens
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    offs = row * C + offs_c
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
    dz = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
    if y_ptr is not None:
        factor = _modulation(gate, image, offs_c, mask, acc_dtype)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
        z += factor * y
        dz += _modulation(dgate, image, offs_c, mask, acc_dtype) * y
        dz += factor * tl.load(dy_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    centred = tl.where(mask, z - tl.sum(z, 0) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    normalised = centred * rstd
    change = tl.where(mask, dz - tl.sum(dz, 0) / C, 0.0)
    slope = rstd * (change - normalised * (tl.sum(normalised * change, 0) / C))
    factor = 1.0 + _modulation(scale, image, offs_c, mask, acc_dtype)
    h = normalised * factor + _modulation(shift, image, offs_c, mask, acc_dtype)
    dh = slope * factor + normalised * _modulation(dscale, image, offs_c, mask, acc_dtype)
    dh += _modulation(dshift, image, offs_c, mask, acc_dtype)
    tl.store(h_ptr + offs, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(dh_ptr + offs, dh.to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adaln_bwd_kernel(
    grad_z_ptr,  # [B T, C], absent without a residual, as the three below
    y_ptr,
    gate_ptr,  # [B or 1, C]
    grad_y_ptr,  # [B T, C]
    grad_h_ptr,  # [B T, C]
    z_ptr,  # [B T, C]
    scale_ptr,  # [B or 1, C]
    grad_x_ptr,  # [B T, C]
    partial_ptr,  # [B, chunks, 2 or 3, C]: of shift, scale and, with a residual, gate
    gate_stride,
    scale_stride,
    tokens,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    chunks = (tokens - 1) // ROWS + 1
    pid = tl.program_id(0).to(tl.int64)
    image = pid // chunks
    first = pid % chunks * ROWS
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    factor = 1.0 + tl.load(scale_ptr + image * scale_stride + offs_c, mask=mask_c, other=0.0).to(acc_dtype)
    grad_shift = tl.zeros((BLOCK_C,), acc_dtype)
    grad_scale = tl.zeros((BLOCK_C,), acc_dtype)
    grad_gate = tl.zeros((BLOCK_C,), acc_dtype)
    for row in range(ROWS):
        mask = mask_c & (first + row < tokens)  # rows past the end are zeros and add nothing
        offs = (image * tokens + first + row) * C + offs_c
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(acc_dtype)  # [BLOCK_C]
        grad_h = tl.load(grad_h_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
        centred = tl.where(mask, z - tl.sum(z, 0) / C, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
        normalised = centred * rstd
        up = grad_h * factor
        total = rstd * (up - tl.sum(up, 0) / C - normalised * (tl.sum(up * normalised, 0) / C))
        grad_shift += grad_h
        grad_scale += grad_h * normalised
        if y_ptr is not None:
            gate = tl.load(gate_ptr + image * gate_stride + offs_c, mask=mask_c, other=0.0).to(acc_dtype)
            total += tl.load(grad_z_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
            grad_gate += tl.where(mask, total, 0.0) * tl.load(y_ptr + offs, mask=mask, other=0.0).to(acc_dtype)
            tl.store(grad_y_ptr + offs, (gate * total).to(grad_y_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_x_ptr + offs, total.to(grad_x_ptr.dtype.element_ty), mask=mask)
    parts: tl.constexpr = 2 if y_ptr is None else 3
    partial = partial_ptr + pid * parts * C + offs_c
    tl.store(partial, grad_shift, mask=mask_c)
    tl.store(partial + C, grad_scale, mask=mask_c)
    if y_ptr is not None:
        tl.store(partial + 2 * C, grad_gate, mask=mask_c)


def block_and_warps(features: int, rows: int) -> tuple[int, int]:
    """BLOCK_C and warps: 64 features a thread for one token at a time, 16 where sums are kept beside them (``rows`` > 1)."""
    block = max(next_power_of_2(features), 32)
    return block, min(max(block // (2048 if rows == 1 else 512), 1), 16)


def _rows(modulation: Tensor) -> tuple[Tensor, int]:
    """A modulation with contiguous features, and elements from one image's to the next: 0 where one serves all."""
    if modulation.stride(1) != 1:
        modulation = modulation.contiguous()
    return modulation, 0 if modulation.shape[0] == 1 else modulation.stride(0)


def _result_like(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor | None, Tensor]:
    B, T, C = x.shape
    h = _result_like(x if y is None else y)
    z = None if y is None else _result_like(x)
    if x.numel() == 0:
        return z, h
    gate, gate_stride = (None, 0) if gate is None else _rows(gate)
    (shift, shift_stride), (scale, scale_stride) = _rows(shift), _rows(scale)
    block, warps = block_and_warps(C, 1)
    with torch.cuda.device_of(x):
        _adaln_fwd_kernel[(B * T,)](
            x.contiguous(),
            None if y is None else y.contiguous(),
            gate,
            shift,
            scale,
            z,
            h,
            gate_stride,
            shift_stride,
            scale_stride,
            T,
            eps,
            C=C,
            BLOCK_C=block,
            num_warps=warps,
        )
    return z, h


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Tokens [B, T, C] and modulations [B or 1, C] -> [B, T, C] of x's dtype."""
    return _forward(x, None, None, shift, scale, eps)[1]


def gated_residual_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens x, y [B, T, C] and modulations [B or 1, C] -> z of x's dtype and h of y's, [B, T, C]."""
    z, h = _forward(x, y, gate, shift, scale, eps)
    assert z is not None
    return z, h


def _forward_jvp(
    x: Tensor, dx: Tensor, y: Tensor | None, dy: Tensor | None, modulations: Sequence[Tensor | None], eps: float
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor]:
    """modulations: gate, shift, scale and then their tangents."""
    B, T, C = x.shape
    h, dh = (_result_like(x if y is None else y) for _ in range(2))
    z, dz = (None if y is None else _result_like(x) for _ in range(2))
    if x.numel() == 0:
        return z, h, dz, dh
    gate, shift, scale, dgate, dshift, dscale = (None if m is None else Modulation(*_rows(m)) for m in modulations)
    contiguous = lambda value: None if value is None else value.contiguous()
    block, warps = block_and_warps(C, 1)
    with torch.cuda.device_of(x):
        _adaln_jvp_kernel[(B * T,)](
            *(contiguous(value) for value in (x, dx, y, dy)),
            *(gate, dgate, shift, dshift, scale, dscale),
            *(z, dz, h, dh, T, eps),
            C=C,
            BLOCK_C=block,
            num_warps=warps,
        )
    return z, h, dz, dh


def adaln_modulate_jvp(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dx: Tensor, dshift: Tensor, dscale: Tensor
) -> tuple[Tensor, Tensor]:
    """adaln_modulate and its tangent."""
    _, h, _, dh = _forward_jvp(x, dx, None, None, (None, shift, scale, None, dshift, dscale), eps)
    return h, dh


def gated_residual_adaln_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dx: Tensor,
    dy: Tensor,
    *tangents: Tensor,  # of gate, shift and scale
) -> tuple[Tensor | None, ...]:
    """gated_residual_adaln and its tangents: z, h, dz, dh."""
    return _forward_jvp(x, dx, y, dy, (gate, shift, scale, *tangents), eps)


def backward(
    grad_z: Tensor | None,
    grad_h: Tensor,
    z: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients to x, to y and, in a list, to shift, scale and, with a residual, gate."""
    B, T, C = z.shape
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    grad_x = _result_like(z)
    grad_y = None if y is None else _result_like(y)
    parts = 2 if y is None else 3
    partial = torch.empty((B, -(-T // ROWS), parts, C), dtype=dtype, device=z.device)
    if z.numel():
        gate, gate_stride = (None, 0) if gate is None else _rows(gate)
        rows, scale_stride = _rows(scale)
        block, warps = block_and_warps(C, ROWS)
        with torch.cuda.device_of(z):
            _adaln_bwd_kernel[(B * partial.shape[1],)](
                None if grad_z is None else grad_z.contiguous(),
                None if y is None else y.contiguous(),
                gate,
                grad_y,
                grad_h.contiguous(),
                z.contiguous(),
                rows,
                grad_x,
                partial,
                gate_stride,
                scale_stride,
                T,
                eps,
                C=C,
                ROWS=ROWS,
                BLOCK_C=block,
                num_warps=warps,
            )
    total = partial.sum(1)
    if scale.shape[0] == 1:
        total = total.sum(0, keepdim=True)
    return grad_x, grad_y, [total[:, i].to(scale.dtype, copy=True) for i in range(parts)]
