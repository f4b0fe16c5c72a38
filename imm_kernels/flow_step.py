"""One step of a flow map, x_s = c_skip x + c_out (g_u + w (g - g_u)) + c_noise n (paper eq. 14, section C.5), and its noise.

Rows are images: x, x_s [B, D] of the state's dtype, g, g_u [B, D] of the network's dtype; coefficients float64, one per image
or one for all, read from device memory. Arithmetic is float32, float64 for a float64 state. Moves 3 B D elements, 4 with
guidance, once; a program takes BLOCK elements of one row.

The noise: element e of a row takes lane e % 4 of the Philox4x32-10 block with key = seed (64 bits) and counter
(q low, q high, step low, step high), q = e // 4; lanes (0, 1) and (2, 3) become normals by Box-Muller in float64:
    radius = sqrt(-2 log((r_a + 1/2) / 2^32)),  angle = 2 pi (r_b + 1/2) / 2^32,  (radius cos(angle), radius sin(angle))
rounded to float32.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4
# Compiling once more for each stride, step or alignment of these would gain nothing.
_COEFFICIENTS = ("c_skip", "c_out", "guidance", "c_noise", "seeds")
_JIT = {
    "do_not_specialize": [*(f"{name}_stride" for name in _COEFFICIENTS), "step"],
    "do_not_specialize_on_alignment": [f"{name}_ptr" for name in _COEFFICIENTS],
}


@triton.jit
def _box_muller(word_a, word_b):
    """Two words of a Philox block -> two standard normals, float64."""
    radius = tl.sqrt(-2.0 * tl.log((word_a.to(tl.float64) + 0.5) * 2.3283064365386963e-10))  # 2^-32
    angle = 6.283185307179586 * ((word_b.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _normals(seed, step, first, BLOCK: tl.constexpr):
    """n of elements first ... first + BLOCK - 1 of a row, float32 [BLOCK]; first is a multiple of 4."""
    q = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint64)
    low = (q & 0xFFFFFFFF).to(tl.uint32)
    step_low = tl.zeros_like(low) + (step.to(tl.uint64) & 0xFFFFFFFF).to(tl.uint32)
    step_high = tl.zeros_like(low) + (step.to(tl.uint64) >> 32).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, low, (q >> 32).to(tl.uint32), step_low, step_high)
    n0, n1 = _box_muller(r0, r1)
    n2, n3 = _box_muller(r2, r3)
    # join puts its second operand in the odd places of a new last dimension: [Q, 2, 2] in element order.
    lanes = tl.join(tl.join(n0.to(tl.float32), n2.to(tl.float32)), tl.join(n1.to(tl.float32), n3.to(tl.float32)))
    return tl.reshape(lanes, (BLOCK,))


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
        result += c_noise * _normals(seed, step, first, BLOCK).to(acc_dtype)
    tl.store(x_s_ptr + offs, result.to(x_s_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["seeds_stride", "step"], do_not_specialize_on_alignment=["seeds_ptr"])
def _noise_kernel(seeds_ptr, normal_ptr, seeds_stride, step, D, BLOCK: tl.constexpr):
    blocks_per_row = (D - 1) // BLOCK + 1
    pid_b = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    first = (tl.program_id(0) % blocks_per_row).to(tl.int64) * BLOCK
    offs_d = first + tl.arange(0, BLOCK)
    normal = _normals(tl.load(seeds_ptr + pid_b * seeds_stride), step, first, BLOCK)
    tl.store(normal_ptr + pid_b * D + offs_d, normal, mask=offs_d < D)


def _stride(value: Tensor | None) -> int:
    """Elements from one image's number to the next; 0 where one number serves all."""
    return 0 if value is None or value.shape[0] == 1 else value.stride(0)


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
            _stride(c_skip),
            _stride(c_out),
            _stride(guidance),
            _stride(c_noise),
            _stride(seeds),
            step,
            D,
            HAS_GUIDANCE=guidance is not None,
            HAS_NOISE=seeds is not None,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return x_s


def noise(seeds: Tensor, numel: int, step: int) -> Tensor:
    """seeds [B] int64 -> [B, numel] float32, N(0, 1)."""
    normal = torch.empty((seeds.shape[0], numel), dtype=torch.float32, device=seeds.device)
    if normal.numel():
        with torch.cuda.device_of(seeds):
            grid = (seeds.shape[0] * triton.cdiv(numel, BLOCK),)
            _noise_kernel[grid](seeds, normal, _stride(seeds), step, numel, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return normal
