"""The sinusoids of the two times of a flow map, cos(u f_i) and sin(u f_i) with f_i = max_period^(-i / HALF), phase in float64.

Their tangents along du are -sin(u f_i) f_i du and cos(u f_i) f_i du. A program takes one time of one image.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.device import next_power_of_2

NUM_WARPS = 4


@triton.jit
def _row(t_ptr, s_ptr, t_stride, s_stride, pid, batch):
    """The time of a row: those of t, then those of s."""
    image = pid % batch
    if pid < batch:
        time = tl.load(t_ptr + image * t_stride).to(tl.float64)
    else:
        time = tl.load(s_ptr + image * s_stride).to(tl.float64)
    return time


@triton.jit
def _store_row(out_ptr, pid, cosines, sines, HALF: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    out = out_ptr + pid * 2 * HALF + index
    # As in torch, 16 bits are rounded from float32.
    wide: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    tl.store(out, cosines.to(wide).to(out_ptr.dtype.element_ty), mask=index < HALF)
    tl.store(out + HALF, sines.to(wide).to(out_ptr.dtype.element_ty), mask=index < HALF)


_STRIDES = ["t_stride", "s_stride", "dt_stride", "ds_stride"]


@triton.jit(do_not_specialize=_STRIDES, do_not_specialize_on_alignment=["t_ptr", "s_ptr", "dt_ptr", "ds_ptr"])
def _timestep_embedding_kernel(
    t_ptr,  # [B]
    s_ptr,  # [B]
    dt_ptr,  # as t; None: no tangent
    ds_ptr,
    out_ptr,  # [2, B, 2 HALF]
    tangent_ptr,  # as out
    t_stride,
    s_stride,
    dt_stride,
    ds_stride,
    batch,
    LOG_PERIOD: tl.constexpr,  # a run-time argument would be rounded to float32
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    frequency = tl.exp(tl.arange(0, BLOCK).to(tl.float64) * (-LOG_PERIOD / HALF))
    phase = _row(t_ptr, s_ptr, t_stride, s_stride, pid, batch) * frequency
    cosines, sines = tl.cos(phase), tl.sin(phase)
    _store_row(out_ptr, pid, cosines, sines, HALF, BLOCK)
    if tangent_ptr is not None:
        rate = _row(dt_ptr, ds_ptr, dt_stride, ds_stride, pid, batch) * frequency
        _store_row(tangent_ptr, pid, -sines * rate, cosines * rate, HALF, BLOCK)


def _launch(times: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor] | None, dim: int, max_period: float, *out: Tensor):
    batch = times[0].shape[0]
    if batch:
        with torch.cuda.device_of(times[0]):
            _timestep_embedding_kernel[(2 * batch,)](
                *times,
                *(tangents or (None, None)),
                *(out if tangents else (*out, None)),
                *(u.stride(0) for u in times),
                *((du.stride(0) for du in tangents) if tangents else (0, 0)),
                batch,
                LOG_PERIOD=math.log(max_period),
                HALF=dim // 2,
                BLOCK=next_power_of_2(dim // 2),
                num_warps=NUM_WARPS,
            )


def timestep_embedding(t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype) -> Tensor:
    """Times [B] -> [2, B, dim] of a dtype, t's embedding first."""
    embedding = t.new_empty((2, t.shape[0], dim), dtype=dtype)
    _launch((t, s), None, dim, max_period, embedding)
    return embedding


def timestep_embedding_jvp(
    t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype, dt: Tensor, ds: Tensor
) -> tuple[Tensor, Tensor]:
    """timestep_embedding and its tangent."""
    embedding, tangent = (t.new_empty((2, t.shape[0], dim), dtype=dtype) for _ in range(2))
    _launch((t, s), (dt, ds), dim, max_period, embedding, tangent)
    return embedding, tangent
