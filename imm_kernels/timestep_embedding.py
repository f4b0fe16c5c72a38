"""The sinusoids of the two times of a flow map, cos(u f_i) and sin(u f_i) with f_i = max_period^(-i / HALF), phase in float64.

A program takes one time of one image and writes its 2 HALF numbers once.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4


@triton.jit(do_not_specialize=["t_stride", "s_stride"], do_not_specialize_on_alignment=["t_ptr", "s_ptr"])
def _timestep_embedding_kernel(
    t_ptr,  # [B]
    s_ptr,  # [B]
    out_ptr,  # [2, B, 2 HALF]
    t_stride,
    s_stride,
    batch,
    LOG_PERIOD: tl.constexpr,  # a run-time argument would be rounded to float32
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    image = pid % batch
    index = tl.arange(0, BLOCK)
    if pid < batch:
        time = tl.load(t_ptr + image * t_stride).to(tl.float64)
    else:
        time = tl.load(s_ptr + image * s_stride).to(tl.float64)
    phase = time * tl.exp(index.to(tl.float64) * (-LOG_PERIOD / HALF))
    out = out_ptr + pid * 2 * HALF + index
    # As in torch, 16 bits are rounded from float32.
    wide: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    tl.store(out, tl.cos(phase).to(wide).to(out_ptr.dtype.element_ty), mask=index < HALF)
    tl.store(out + HALF, tl.sin(phase).to(wide).to(out_ptr.dtype.element_ty), mask=index < HALF)


def timestep_embedding(t: Tensor, s: Tensor, dim: int, max_period: float, dtype: torch.dtype) -> Tensor:
    """Times [B] -> [2, B, dim] of a dtype, t's embedding first."""
    embedding = torch.empty((2, t.shape[0], dim), dtype=dtype, device=t.device)
    if embedding.numel():
        with torch.cuda.device_of(t):
            _timestep_embedding_kernel[(2 * t.shape[0],)](
                t,
                s,
                embedding,
                t.stride(0),
                s.stride(0),
                t.shape[0],
                LOG_PERIOD=math.log(max_period),
                HALF=dim // 2,
                BLOCK=triton.next_power_of_2(dim // 2),
                num_warps=NUM_WARPS,
            )
    return embedding
