"""The energy score and its finished gradient in one launch, for sets whose rows fit the registers.

    loss_g     = f_g [c sum_jm d(x_j, y_m) - a sum_{j != k} d(x_j, x_k)],  c = 2 / (N M)
    dloss/dx_j = f_g [c sum_m s_jm (x_j - y_m) - 2 a sum_k s_jk (x_j - x_k)],  s = d'(r) / r, 0 at distance 0

small: a program holds the N rows of BLOCK_G groups and their gradient and loops over the other rows, first the M targets, read
or drawn, then the N rows themselves. All features of a row are in the program, so a pair's distance, slope and gradient are
finished at once: one pass, nothing in memory but inputs and results, no limit on M. A warp lays WIDTH features over its lanes
and the rest of a row in chunks, so that a distance is a sum over few lanes.

line: D = 1 and one target. A thread holds all members of its groups and takes every pair once; nothing crosses threads.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.device import next_power_of_2
from imm_kernels.mmd_math import Number, expm1, number_of
from imm_kernels.noise import quick_normals

#: Most members of a line, features of a row, and numbers of the rows of a group, rounded up to powers of two.
LINE_MEMBERS, FEATURES, NUMBERS = 16, 512, 4096
_HUGE = tl.constexpr(2.0**126)  # takes every number but denormal ones beyond 1
_TINY = tl.constexpr(1.17549435e-38)  # squares below are 0


class Points(NamedTuple):
    """[G, rows, D] by its strides, in elements."""

    ptr: Any
    group: Any
    row: Any
    feature: Any


def points_of(value: Tensor) -> Points:
    """The :class:`Points` of [G, rows, D] or [G, D]."""
    group, *row, feature = value.stride()
    return Points(value, group, row[0] if row else 0, feature)


@triton.jit
def _numbers(number, g, mask):
    """The groups' numbers in float32; 1 where there are none."""
    if number is None:
        return tl.full(g.shape, 1.0, tl.float32)
    else:
        return tl.load(number.ptr + g * number.stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _signed(c, x, huge):
    """c sign(x huge), c >= 0; NaN of NaN."""
    return tl.clamp(x * huge, -c, c, propagate_nan=tl.PropagateNan.ALL)


_LINE: dict[str, Any] = {"do_not_specialize": ["across", "pair", "factor"]}


@triton.jit(**_LINE)
def _line_kernel(
    x, y, scale, weight, loss_ptr, grad, G, across, pair, factor, N: tl.constexpr, BLOCK: tl.constexpr
):  # pair: 2 a
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < G
    g = offs.to(tl.int64)
    target = tl.load(y.ptr + g * y.group, mask=mask, other=0.0).to(tl.float32)
    f = factor * _numbers(scale, g, mask) * _numbers(weight, g, mask)
    members = ()
    slopes = ()
    far = tl.zeros((BLOCK,), tl.float32)
    apart = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(N):
        # Members as differences to the target: numbers of hundreds lose no digits twice.
        member = tl.load(x.ptr + g * x.group + j * tl.cast(x.row, tl.int64), mask=mask, other=0.0).to(tl.float32) - target
        far += tl.abs(member)
        members = members + (member,)
        slopes = slopes + (_signed(across, member, _HUGE),)
    within = tl.abs(pair)
    down = tl.where(pair < 0, _HUGE, -_HUGE)
    for j in tl.static_range(N):
        own = slopes[j]
        others = ()
        for k in tl.static_range(N):
            if k > j:
                difference = members[j] - members[k]
                apart += tl.abs(difference)
                slope = _signed(within, difference, down)
                own += slope
                others = others + (slopes[k] - slope,)
            else:
                others = others + (slopes[k],)
        slopes = others
        value = tl.where(f == 0, 0.0, f * own).to(grad.ptr.dtype.element_ty)
        tl.store(grad.ptr + g * grad.group + j * tl.cast(grad.row, tl.int64), value, mask=mask)
    tl.store(loss_ptr + g, tl.where(f == 0, 0.0, f * (across * far - pair * apart)), mask=mask)


@triton.jit
def _rsqrt(x, FAST: tl.constexpr):
    if FAST:  # tl.rsqrt scales denormal numbers, which are not here
        return tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.rsqrt(x)


@triton.jit
def _distance_and_slope(square, kappa, KERNEL: tl.constexpr, BANDWIDTHS: tl.constexpr, FAST: tl.constexpr):
    """d and d'(r) / r of squared norms; energy: of scale 1."""
    zero = square < _TINY  # a NaN is not
    inverse = tl.where(zero, 0.0, _rsqrt(square, FAST))
    norm = square * inverse
    if KERNEL == "energy":
        return norm, inverse
    else:
        value = tl.zeros_like(square)
        slope = tl.zeros_like(square)
        for i in tl.static_range(len(BANDWIDTHS)):
            rate = kappa * BANDWIDTHS[i]
            if KERNEL == "laplace":
                minus_one = expm1(-rate * norm)
                slope += rate * (minus_one + 1.0) * inverse
            elif KERNEL == "rbf":
                minus_one = expm1(-0.5 * rate * square)
                slope += rate * (minus_one + 1.0)
            else:
                reciprocal = 1.0 / (1.0 + rate * square)
                minus_one = -rate * square * reciprocal
                slope += 2.0 * rate * reciprocal * reciprocal
            value -= minus_one
        share: tl.constexpr = 1.0 / len(BANDWIDTHS)
        return value * share, slope * share


@triton.jit
def _against(x, row, grad, c, kappa, D: tl.constexpr, KERNEL: tl.constexpr, BANDWIDTHS: tl.constexpr, FAST: tl.constexpr):
    """Rows x, [ROWS, G, WIDTH] by chunks, against one row of each group: distances [ROWS, G], and grad + c slope (x - row)."""
    moved = ()
    if D == 1 and KERNEL == "energy":
        difference = x[0] - row[0][None, :, :]
        size = tl.abs(c)
        moved = moved + (grad[0] + _signed(size, difference, tl.where(c < 0, -_HUGE, _HUGE)),)
        return tl.sum(tl.abs(difference), 2), moved
    else:
        difference = x[0] - row[0][None, :, :]
        square = difference * difference
        for i in tl.static_range(1, len(x)):
            difference = x[i] - row[i][None, :, :]
            square += difference * difference
        value, slope = _distance_and_slope(tl.sum(square, 2), kappa[None, :], KERNEL, BANDWIDTHS, FAST)
        slope *= c
        for i in tl.static_range(len(x)):
            moved = moved + (grad[i] + slope[:, :, None] * (x[i] - row[i][None, :, :]),)
        return value, moved


@triton.jit
def _split(tile, CHUNKS: tl.constexpr):
    """[G, D] -> CHUNKS tiles [G, D / CHUNKS] of neighbouring features."""
    if CHUNKS == 1:
        return (tile,)
    else:
        GROUPS: tl.constexpr = tile.shape[0]
        HALF: tl.constexpr = tile.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(tile, (GROUPS, 2, HALF)), (0, 2, 1)))
        return _split(low, CHUNKS // 2) + _split(high, CHUNKS // 2)


@triton.jit
def _load_row(of, start, here, d, D: tl.constexpr, CHUNKS: tl.constexpr):
    """A row of each group by chunks of features, float32 [G, WIDTH]; start: of the groups' rows, [G]."""
    row = ()
    for i in tl.static_range(CHUNKS):
        f = i * d.shape[0] + d
        mask = here[:, None] & (f < D)[None, :]
        row = row + (tl.load(of.ptr + start[:, None] + f[None, :] * of.feature, mask=mask, other=0.0).to(tl.float32),)
    return row


_SMALL: dict[str, Any] = {
    "do_not_specialize": ["M", "across", "pair", "factor"],
    "do_not_specialize_on_alignment": ["loss_ptr", "seed_ptr"],
}


@triton.jit(**_SMALL)
def _small_kernel(
    x,
    y,  # the mean, where targets are drawn
    log_std,
    seed_ptr,
    scale,
    weight,
    loss_ptr,
    grad,
    G,
    M,
    across,
    pair,  # 2 a
    factor,
    N: tl.constexpr,
    D: tl.constexpr,
    KERNEL: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_D // CHUNKS
    offs = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    here = offs < G
    g = offs.to(tl.int64)
    n = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    rows = (n < N)[:, None, None] & here[None, :, None]
    places = n[:, None, None].to(tl.int64) * x.row + (g * x.group)[None, :, None]
    members = ()
    slopes = ()
    for i in tl.static_range(CHUNKS):
        f = i * WIDTH + d
        place = places + f[None, None, :] * x.feature
        members = members + (tl.load(x.ptr + place, mask=rows & (f < D)[None, None, :], other=0.0).to(tl.float32),)
        slopes = slopes + (tl.zeros((ROWS, BLOCK_G, WIDTH), tl.float32),)
    scales = _numbers(scale, g, here)
    kappa = scales / D
    loss = tl.zeros((ROWS, BLOCK_G), tl.float32)
    if log_std is not None:
        all_d = tl.arange(0, BLOCK_D)
        all_here = here[:, None] & (all_d < D)[None, :]
        mean_place = (g * y.group)[:, None] + all_d[None, :] * y.feature
        std_place = (g * log_std.group)[:, None] + all_d[None, :] * log_std.feature
        mean = tl.load(y.ptr + mean_place, mask=all_here, other=0.0).to(tl.float32)
        std = tl.exp(tl.load(log_std.ptr + std_place, mask=all_here, other=-float("inf")).to(tl.float32))
        seed = tl.load(seed_ptr) + g
    for m in range(M):
        if log_std is not None:
            row = _split(mean + std * quick_normals(seed, m * (D // 4), BLOCK_G, BLOCK_D, FAST), CHUNKS)
        else:
            row = _load_row(y, g * y.group + tl.cast(m, tl.int64) * y.row, here, d, D, CHUNKS)
        value, slopes = _against(members, row, slopes, across, kappa, D, KERNEL, BANDWIDTHS, FAST)
        loss += value
    loss *= across
    for k in range(N):
        row = _load_row(x, g * x.group + tl.cast(k, tl.int64) * x.row, here, d, D, CHUNKS)  # from cache
        value, slopes = _against(members, row, slopes, -pair, kappa, D, KERNEL, BANDWIDTHS, FAST)
        loss -= 0.5 * pair * value
    weights = factor * _numbers(weight, g, here)
    if KERNEL == "energy":
        weights *= scales
    total = tl.sum(tl.where((n < N)[:, None], loss, 0.0), 0)
    tl.store(loss_ptr + g, tl.where(weights == 0, 0.0, weights * total), mask=here)
    places = n[:, None, None].to(tl.int64) * grad.row + (g * grad.group)[None, :, None]
    weights = weights[None, :, None]
    for i in tl.static_range(CHUNKS):
        f = i * WIDTH + d
        place = places + f[None, None, :] * grad.feature
        value = tl.where(weights == 0, 0.0, weights * slopes[i]).to(grad.ptr.dtype.element_ty)
        tl.store(grad.ptr + place, value, mask=rows & (f < D)[None, None, :])


#: The special functions of the hardware are not there in Triton's interpreter.
_FAST = isinstance(_small_kernel, triton.runtime.JITFunction)


def line_sizes(N: int, bits: int) -> tuple[int, int]:
    """(groups of a program, warps): 16 bytes of a row a thread while that of N rows fits."""
    return 128 * (128 // bits if N <= 8 else 4), 4


def small_sizes(N: int, D: int, bits: int, *, drawn: bool = False) -> tuple[int, int, int, int, int]:
    """(ROWS, BLOCK_G, BLOCK_D, CHUNKS, warps): 32 numbers of x and as many of the gradient a thread, of a chunk 16 bytes of x.
    Nothing crosses warps but of more rows than one holds; of few features, there are four for long loads."""
    rows, block_d = next_power_of_2(N), next_power_of_2(D)
    warps = 4 if block_d <= 4 else max(1, rows * block_d // 1024)
    most = 1024 * warps // (max(rows, 4) if drawn else rows)  # of a target's numbers, which are drawn at once
    groups = max(1, min(8 * warps * max(1, 16 // block_d), most // block_d))
    chunks = min(block_d // 16, rows * groups * block_d * bits // (32 * 128 * warps))
    return rows, groups, block_d, max(1, chunks), warps


def too_large(shape: tuple[int, ...]) -> str | None:
    """Why x of this shape does not fit the registers, or None."""
    if len(shape) != 3:
        return None
    _, N, D = shape
    if D > FEATURES or next_power_of_2(N) * next_power_of_2(D) > NUMBERS:
        return f"supports D <= {FEATURES} and N D <= {NUMBERS} (powers of two), got N = {N}, D = {D}"
    return None


def energy_score(
    x: Tensor,
    y: Tensor,
    log_std: Tensor | None,
    seed: Tensor | None,
    draws: int,
    scale: Tensor | None,
    weight: Tensor | None,
    factor: float,
    alpha: float,
    pair_weight: float | None,
    kernel: str,
    bandwidths: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """x [G, N, D], y [G, M, D] or a mean [G, D] -> loss [G] float32, gradient like x. Arguments are the caller's to check.

    x is float32, bfloat16 or float16, of any strides; scale and weight [G] or [1] are of any floating dtype.
    """
    G, N, D = x.shape
    M = draws if log_std is not None else y.shape[1]
    loss, grad = torch.empty((G,), dtype=torch.float32, device=x.device), torch.empty_like(x)
    if G == 0:
        return loss, grad
    if pair_weight is None:
        pair_weight = (N - 1 + alpha) / (N**2 * (N - 1)) if N > 1 else 0.0
    sets = points_of(x), points_of(y)
    numbers: tuple[Number | None, ...] = number_of(scale), number_of(weight)
    shares = 2.0 / (N * M), 2.0 * pair_weight, factor
    bits = 8 * x.element_size()
    with torch.cuda.device_of(x):
        if D == 1 and M == 1 and kernel == "energy" and N <= LINE_MEMBERS:
            block, warps = line_sizes(N, bits)
            launch = _line_kernel[(-(-G // block),)]
            launch(*sets, *numbers, loss, points_of(grad), G, *shares, N=N, BLOCK=block, num_warps=warps)
            return loss, grad
        rows, groups, block_d, chunks, warps = small_sizes(N, D, bits, drawn=log_std is not None)
        _small_kernel[(-(-G // groups),)](
            *sets,
            None if log_std is None else points_of(log_std),
            seed,
            *numbers,
            loss,
            points_of(grad),
            G,
            M,
            *shares,
            N=N,
            D=D,
            KERNEL=kernel,
            BANDWIDTHS=tuple(bandwidths),
            FAST=_FAST,
            ROWS=rows,
            BLOCK_G=groups,
            BLOCK_D=block_d,
            CHUNKS=chunks,
            num_warps=warps,
        )
    return loss, grad
