"""One step of a flow map, x_s = c_skip x + c_out (g_u + w (g - g_u)) + c_noise n (paper eq. 14, section C.5).

Rows are images: x, x_s [B, D] of the state's dtype, g, g_u [B, D] of the network's dtype; coefficients float64, one per image
or one for all, read from device memory. Arithmetic is float32, float64 for a float64 state. Moves 3 B D elements, 4 with
guidance, once; a program takes BLOCK elements of one row. n is the noise of noise.py.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.noise import BLOCK, NUM_WARPS, normals, stride

# Compiling once more for each stride, step or alignment of these would gain nothing.
_COEFFICIENTS = ("c_skip", "c_out", "guidance", "c_noise", "seeds")
_JIT = {
    "do_not_specialize": [*(f"{name}_stride" for name in _COEFFICIENTS), "step"],
    "do_not_specialize_on_alignment": [f"{name}_ptr" for name in _COEFFICIENTS],
}


@triton.jit(**_JIT)
def _flow_step_fwd_kernel(
    x_ptr,  # [B, D]
    g_ptr,  # [B, D]
    g_uncond_ptr,  # [B, D]
    x_s_ptr,  # [B, D]
    c_skip_ptr,  # [B] or [1], as the four below
    c_out_ptr,
    guidance_ptr,
    c_noise_ptr,
    seeds_ptr,
    c_skip_stride,
    c_out_stride,
    guidance_stride,
    c_noise_stride,
    seeds_stride,
    step,
    D,
    HAS_GUIDANCE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc_dtype: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks_per_row = (D - 1) // BLOCK + 1
    pid_b = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    first = (tl.program_id(0) % blocks_per_row).to(tl.int64) * BLOCK
    offs_d = first + tl.arange(0, BLOCK)
    mask_d = offs_d < D
    offs = pid_b * D + offs_d

    c_skip = tl.load(c_skip_ptr + pid_b * c_skip_stride).to(acc_dtype)
    c_out = tl.load(c_out_ptr + pid_b * c_out_stride).to(acc_dtype)
    x_tile = tl.load(x_ptr + offs, mask=mask_d).to(acc_dtype)  # [BLOCK]
    output = tl.load(g_ptr + offs, mask=mask_d).to(acc_dtype)
    if HAS_GUIDANCE:
        base = tl.load(g_uncond_ptr + offs, mask=mask_d).to(acc_dtype)
        output = base + tl.load(guidance_ptr + pid_b * guidance_stride).to(acc_dtype) * (output - base)
    result = c_skip * x_tile + c_out * output
    if HAS_NOISE:
        c_noise = tl.load(c_noise_ptr + pid_b * c_noise_stride).to(acc_dtype)
        seed = tl.load(seeds_ptr + pid_b * seeds_stride)
        result += c_noise * normals(seed, step, first, BLOCK).to(acc_dtype)
    tl.store(x_s_ptr + offs, result.to(x_s_ptr.dtype.element_ty), mask=mask_d)


def flow_step(
    x: Tensor,
    g: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    g_uncond: Tensor | None = None,
    guidance: Tensor | None = None,
    c_noise: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
) -> Tensor:
    """One flow map step: state x and output(s) g [B, ...] of any strides -> [B, ...] of x's dtype, contiguous.

    c_skip, c_out, guidance, c_noise: float64 [1] or [B]; seeds: int64 [B]. g_uncond goes with guidance and c_noise with seeds.
    All tensors are on one device; the arguments are the caller's to check.
    """
    x_s = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x_s.numel() == 0:
        return x_s
    D = x.numel() // x.shape[0]
    with torch.cuda.device_of(x):
        _flow_step_fwd_kernel[(x.shape[0] * triton.cdiv(D, BLOCK),)](
            x.contiguous(),
            g.contiguous(),
            None if g_uncond is None else g_uncond.contiguous(),
            x_s,
            c_skip,
            c_out,
            guidance,
            c_noise,
            seeds,
            stride(c_skip),
            stride(c_out),
            stride(guidance),
            stride(c_noise),
            stride(seeds),
            step,
            D,
            HAS_GUIDANCE=guidance is not None,
            HAS_NOISE=seeds is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return x_s
