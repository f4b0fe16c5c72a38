"""Standard normal numbers by image seed, n of imm::noise, alone or inside another kernel.

Element e of a row takes lane e % 4 of the Philox4x32-10 block with key = seed (64 bits) and counter
(q low, q high, step low, step high), q = e // 4; lanes (0, 1) and (2, 3) become normals by Box-Muller in float64:
    radius = sqrt(-2 log((r_a + 1/2) / 2^32)),  angle = 2 pi (r_b + 1/2) / 2^32,  (radius cos(angle), radius sin(angle))
rounded to float32, times scale. Writes B D numbers once; a program takes BLOCK elements of one row.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _box_muller(word_a, word_b):
    """Two words of a Philox block -> two standard normals, float64."""
    radius = tl.sqrt(-2.0 * tl.log((word_a.to(tl.float64) + 0.5) * 2.3283064365386963e-10))  # 2^-32
    angle = 6.283185307179586 * ((word_b.to(tl.float64) + 0.5) * 2.3283064365386963e-10)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, step, first, BLOCK: tl.constexpr):
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


@triton.jit
def _cos_sin(angle, FAST: tl.constexpr):
    """Of angles in [-pi, pi]; FAST: by the special function unit, to 2^-20.9. The interpreter has no such thing."""
    if FAST:
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
        return cos, sin
    else:
        return tl.cos(angle), tl.sin(angle)


@triton.jit
def _quick_box_muller(word_a, word_b, FAST: tl.constexpr):
    """_box_muller in float32: within 4e-6 of it where the radius is below 5, within 6e-6 everywhere."""
    uniform = (word_a.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    # Near 1 its digits are those of 1 - uniform.
    rest = ((word_a ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    radius = tl.sqrt(tl.where(rest < 0.0009765625, rest * (rest + 2.0), -2.0 * tl.log(uniform)))
    cos, sin = _cos_sin(word_b.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09, FAST)  # 2 pi / 2^32
    return radius * cos, radius * sin


@triton.jit
def quick_normals(seeds, q, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr):
    """n of elements 4 q ... 4 q + BLOCK - 1 at step 0 of the rows of these seeds, [ROWS, BLOCK], in float32."""
    q = (q + tl.arange(0, BLOCK // 4)).to(tl.uint32)[None, :] + tl.zeros((ROWS, 1), tl.uint32)
    zero = tl.zeros_like(q)
    r0, r1, r2, r3 = tl.philox(seeds[:, None], q, zero, zero, zero)
    n0, n1 = _quick_box_muller(r0, r1, FAST)
    n2, n3 = _quick_box_muller(r2, r3, FAST)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ROWS, BLOCK))


@triton.jit(do_not_specialize=["seeds_stride", "step"], do_not_specialize_on_alignment=["seeds_ptr"])
def _noise_kernel(seeds_ptr, normal_ptr, seeds_stride, step, scale, D, BLOCK: tl.constexpr):
    blocks_per_row = (D - 1) // BLOCK + 1
    pid_b = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    first = (tl.program_id(0) % blocks_per_row).to(tl.int64) * BLOCK
    offs_d = first + tl.arange(0, BLOCK)
    normal = normals(tl.load(seeds_ptr + pid_b * seeds_stride), step, first, BLOCK)
    tl.store(normal_ptr + pid_b * D + offs_d, normal * scale, mask=offs_d < D)


def stride(value: Tensor | None) -> int:
    """Elements from one image's number to the next; 0 where one number serves all."""
    return 0 if value is None or value.shape[0] == 1 else value.stride(0)


def noise(seeds: Tensor, numel: int, step: int, scale: float = 1.0) -> Tensor:
    """seeds [B] int64 -> [B, numel] float32, N(0, scale^2)."""
    normal = torch.empty((seeds.shape[0], numel), dtype=torch.float32, device=seeds.device)
    if normal.numel():
        with torch.cuda.device_of(seeds):
            grid = (seeds.shape[0] * -(-numel // BLOCK),)
            _noise_kernel[grid](seeds, normal, stride(seeds), step, scale, numel, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return normal
