"""imm::noise: standard normal numbers from Philox4x32-10, keyed by image seed.

The definition that every implementation follows. Element e of an image at a sampling step takes lane e mod 4 of the block with
    key     = (seed low 32 bits, seed high 32 bits)
    counter = (q low, q high, step low, step high),  q = e div 4
and lanes (a, b) of a block, (0, 1) and (2, 3), become two normals by Box-Muller in float64:
    radius = sqrt(-2 log((r_a + 1/2) / 2^32)),  angle = 2 pi (r_b + 1/2) / 2^32,
    n_a = radius cos(angle),  n_b = radius sin(angle)
then rounded to float32 and multiplied by ``scale`` in it. An image's noise depends on its seed, the step and the element alone.
(Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imm.ops import triton_kernels
from imm.ops.registry import check_out, no_result, register

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10) -> list[Tensor]:
    """The Philox4x32 block function on 32-bit words held in int64 tensors; four words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def check(seeds: Tensor, numel: int, step: int, scale: float = 1.0) -> None:
    """Raises ValueError unless seeds is int64 [B] and the counts are not negative."""
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds: expected a [B] int64 tensor, got {list(seeds.shape)} of {seeds.dtype}")
    if numel < 0 or step < 0:
        raise ValueError(f"numel and step: expected counts >= 0, got {numel} and {step}")


def noise(seeds: Tensor, numel: int, step: int, scale: float = 1.0) -> Tensor:
    """Reference of imm::noise: seeds [B] int64 -> [B, numel] float32, N(0, scale^2)."""
    blocks = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seeds.device)[None]  # [1, Q]
    seeds = seeds[:, None]  # [B, 1]
    step_words = torch.full_like(blocks, step & _MASK), torch.full_like(blocks, step >> 32)
    words = philox_4x32((blocks & _MASK, blocks >> 32, *step_words), (seeds & _MASK, (seeds >> 32) & _MASK))
    u0, u1, u2, u3 = ((word.double() + 0.5) * 2.0**-32 for word in words)  # [B, Q] in (0, 1)
    normals = []
    for u, v in ((u0, u1), (u2, u3)):
        radius, angle = (-2.0 * u.log()).sqrt(), 2.0 * math.pi * v
        normals += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(normals, -1).flatten(1)[:, :numel].float().contiguous() * scale


def noise_out(seeds: Tensor, numel: int, step: int, scale: float = 1.0, *, out: Tensor) -> None:
    """Reference of imm::noise.out: :func:`noise` into ``out``, [B, numel] float32."""
    out.copy_(torch.ops.imm.noise(seeds, numel, step, scale))


def _check_out(seeds: Tensor, numel: int, step: int, scale: float = 1.0, *, out: Tensor) -> None:
    check(seeds, numel, step, scale)
    check_out("out", out, torch.Size((seeds.shape[0], numel)), torch.float32, seeds.device)


def _fake(seeds: Tensor, numel: int, step: int, scale: float = 1.0) -> Tensor:
    return seeds.new_empty((seeds.shape[0], numel), dtype=torch.float32)


register(
    "noise",
    check=check,
    reference=noise,
    fake=_fake,
    native=("cpu", "cuda"),
    triton=triton_kernels.implementation("noise.noise"),
)
register("noise.out", check=_check_out, reference=noise_out, fake=no_result, native=("cpu", "cuda"))
