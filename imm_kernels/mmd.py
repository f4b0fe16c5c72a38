"""Launches of the MMD loss, its gradient and their fusion with a flow map, for up to LARGEST_SET particles.

Which kernels run is chosen here, by shape: up to 8 particles (6 of a flow map) are compared pair by pair, whole groups to a
program where their rounds fill the device (resident) and slices of groups where they do not (split); larger M
takes matmuls on tensor cores (mmd_dot.py). All are deterministic. Rooflines, resources and figures: docs/internals/mmd.md.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from imm_kernels import mmd_direct, mmd_dot
from imm_kernels.device import multiprocessors, next_power_of_2
from imm_kernels.mmd_math import number_of, set_of

#: Bytes that the resident programs of a multiprocessor work on at most, so that the second pass finds the group in L2 cache.
_CACHED_BYTES = 256 * 1024
#: Rows of the pairs kernel, and features at a time where it differences a close pair.
_ROWS, _FEATURES = 16, 128
#: Triton's interpreter multiplies bit patterns in bfloat16 matmuls.
_INTERPRETED = not isinstance(mmd_dot._products_kernel, triton.runtime.JITFunction)


@dataclass(frozen=True)
class Mix:
    """States [G, M, D] and float64 coefficients [G] of the particles y = c_skip x + c_out g."""

    x_t: Tensor
    x_r: Tensor
    c_skip_t: Tensor
    c_out_t: Tensor
    c_skip_r: Tensor
    c_out_r: Tensor


@dataclass(frozen=True)
class Kernel:
    """What is computed of the distances."""

    kernel: str
    bandwidths: tuple[float, ...]
    eps: float
    unbiased: bool


@dataclass(frozen=True)
class DirectSizes:
    """Of mmd_direct: features per block, neighbouring features per thread, warps, most registers."""

    BLOCK: int
    EACH: int
    num_warps: int
    maxnreg: int

    @property
    def programs(self) -> int:
        """How many fit a multiprocessor, of 65536 registers."""
        return 65536 // (32 * self.num_warps * self.maxnreg)


@dataclass(frozen=True)
class DotSizes:
    """Of mmd_dot: rows of a block, features of a block of the matmuls and of the gradient, their warps, stages of loads."""

    rows: int
    features: int
    warps: int
    gradient_features: int
    gradient_warps: int
    stages: int = 3


def largest_direct(*, mix: bool) -> int:
    """The largest M whose pairs are taken by direct difference: above, rows and addresses do not fit the registers."""
    return 6 if mix else 8


def direct_sizes(M: int, D: int, bits: int, *, mix: bool) -> DirectSizes:
    """For inputs whose narrowest has ``bits``: 16 bytes of it a thread (4 features from M = 5), warps as registers allow."""
    each = 128 // bits if M <= 4 else 4
    warps = 4 if M in (5, 6) or (M <= 4 and D <= 1024) else 8
    registers = 64 if M <= 2 else 128 if M <= 4 else 255
    return DirectSizes(32 * warps * each, each, warps, min(2 * registers, 255) if mix else registers)


def dot_sizes(M: int, *, exact_bf16: bool, mix: bool) -> DotSizes:
    """One block of rows up to M = 64. Products of float32 keep their operands in registers in two parts: fewer features."""
    if M <= 16:
        return DotSizes(16, 64 if exact_bf16 else 16 if mix else 32, 1, 64 if mix else 128, 4)
    if M <= 32:
        return DotSizes(32, 64 if exact_bf16 else 16, 2 if exact_bf16 else 4, 64, 4)
    return DotSizes(64, 64 if exact_bf16 else 16, 4 if exact_bf16 else 8, 64, 8)


def slices(groups: int, D: int, programs: int, block: int, most: int) -> tuple[int, int]:
    """(how many slices the features of a group are cut into, features of a slice) for ``programs`` or more programs in all."""
    wanted = max(1, min(-(-programs // max(groups, 1)), most, -(-D // block)))
    features = -(-D // (wanted * block)) * block
    return -(-D // features), features


class _Groups:
    """Both sets of particles, and what a launcher chooses by."""

    def __init__(self, y_t: Tensor, y_r: Tensor, mix: Mix | None) -> None:
        self.G, self.M, self.D = y_t.shape
        self.device = y_t.device
        self.t = set_of(y_t, mix.x_t, mix.c_skip_t, mix.c_out_t) if mix else set_of(y_t)
        self.r = set_of(y_r, mix.x_r, mix.c_skip_r, mix.c_out_r) if mix else set_of(y_r)
        self.mixed = mix is not None
        sizes = [x.element_size() for x in (y_t, y_r, *((mix.x_t, mix.x_r) if mix else ()))]
        self.bits, self.group_bytes = 8 * min(sizes), self.M * self.D * sum(sizes)
        self.exact_bf16 = mix is None and y_t.dtype == torch.bfloat16 and not _INTERPRETED
        self.direct = largest_direct(mix=self.mixed) >= self.M

    def empty(self, *shape: int) -> Tensor:
        return torch.empty((self.G, *shape), dtype=torch.float32, device=self.device)


def _compute(
    groups: _Groups, scale: Tensor, weight: Tensor | None, upstream: Tensor | None, what: Kernel, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss [G] and slopes [G, M, 2 M]; ``grad`` [G, M, D], where there is one, gets the gradient."""
    G, M, D = groups.G, groups.M, groups.D
    loss, slopes = groups.empty(), groups.empty(M, 2 * M)
    if G == 0:
        return loss, slopes
    numbers = number_of(scale), number_of(weight)
    kernel = {"KERNEL": what.kernel, "BANDWIDTHS": what.bandwidths, "UNBIASED": what.unbiased}
    count = multiprocessors(groups.device)
    if groups.direct:
        sizes = direct_sizes(M, D, groups.bits, mix=groups.mixed)
        direct: dict[str, Any] = {"M": M, **vars(sizes)}
        # A group that does not fit the cache alone is read twice whatever its neighbours do.
        places = count * min(_CACHED_BYTES // groups.group_bytes or sizes.programs, sizes.programs)
        if D <= 4 * sizes.BLOCK or places * -(-G // places) <= 1.3 * G:  # resident: the last round is nearly full
            resident = mmd_direct._resident_kernel[(min(G, places),)]
            resident(groups.t, groups.r, *numbers, number_of(upstream), loss, slopes, grad, G, D, what.eps, **kernel, **direct)
            return loss, slopes
        parts, features = slices(G, D, 4 * places, sizes.BLOCK, D)
        partial = groups.empty(parts, 2 * mmd_direct.leaves(M * (M - 1) // 2) + mmd_direct.leaves(M**2))
        mmd_direct._partial_kernel[(G * parts,)](groups.t, groups.r, partial, D, parts, features, **direct)
        mmd_direct._combine_kernel[(G,)](partial, *numbers, loss, slopes, D, parts, what.eps, M=M, **kernel, num_warps=1)
    else:
        dot = dot_sizes(M, exact_bf16=groups.exact_bf16, mix=groups.mixed)
        blocks, row_blocks = -(-M // dot.rows), -(-M // _ROWS)
        most = max(1, D * groups.bits // (320 * M))  # at most a tenth of what the inputs and the gradient take
        parts, features = slices(G, D, 2 * (8 // dot.warps) * count // blocks**2, 4 * dot.features, most)
        products, norms = groups.empty(parts, 3, M, M), groups.empty(parts, 3, M)
        mmd_dot._products_kernel[(G * parts, blocks**2)](
            groups.t,
            groups.r,
            products,
            norms,
            M,
            D,
            parts,
            features,
            EXACT_BF16=groups.exact_bf16,
            ONE_BLOCK=blocks == 1,
            BLOCK_M=dot.rows,
            BLOCK_D=dot.features,
            num_warps=dot.warps,
            num_stages=dot.stages,
        )
        by_rows = loss if row_blocks == 1 else groups.empty(row_blocks)
        columns = next_power_of_2(M)
        mmd_dot._pairs_kernel[(G * row_blocks,)](
            groups.t,
            groups.r,
            products,
            norms,
            *numbers,
            by_rows,
            slopes,
            M,
            D,
            parts,
            what.eps,
            **kernel,
            ROWS=_ROWS,
            COLUMNS=columns,
            BLOCK_D=_FEATURES,
            num_warps=8 if columns > 128 else 4,
            maxnreg=255,
        )
        if row_blocks > 1:
            torch.sum(by_rows, 1, out=loss)
    if grad is not None:
        _gradient(groups, weight, upstream, slopes, what.unbiased, grad)
    return loss, slopes


def _gradient(
    groups: _Groups, weight: Tensor | None, upstream: Tensor | None, slopes: Tensor, unbiased: bool, grad: Tensor
) -> None:
    M, D = groups.M, groups.D
    if groups.G == 0:
        return
    given = groups.t, groups.r, number_of(weight), number_of(upstream), slopes, grad
    if groups.direct:
        sizes = direct_sizes(M, D, groups.bits, mix=groups.mixed)
        parts, features = slices(groups.G, D, 16 * multiprocessors(groups.device), sizes.BLOCK, D)
        launch = {name: value for name, value in vars(sizes).items() if name != "EACH"}
        mmd_direct._gradient_kernel[(groups.G * parts,)](*given, D, parts, features, M=M, UNBIASED=unbiased, **launch)
        return
    dot = dot_sizes(M, exact_bf16=groups.exact_bf16, mix=groups.mixed)
    mmd_dot._gradient_kernel[(groups.G * -(-M // dot.rows) * -(-D // dot.gradient_features),)](
        *given,
        M,
        D,
        UNBIASED=unbiased,
        EXACT_BF16=groups.exact_bf16,
        BLOCK_M=dot.rows,
        BLOCK_K=16,
        BLOCK_D=dot.gradient_features,
        num_warps=dot.gradient_warps,
        num_stages=2,
        maxnreg=255 if groups.mixed and dot.rows == 32 else None,  # else the compiler keeps to 168 registers and spills
    )


def loss(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    kernel: str,
    bandwidths: Sequence[float],
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    """y_t, y_r [G, M, D] -> loss [G], slopes [G, M, 2 M], float32. Arguments are the caller's to check, here and below.

    Particles are float32, bfloat16 or float16 of any strides; scale and weight [G] are of any floating dtype.
    """
    with torch.cuda.device_of(y_t):
        return _compute(_Groups(y_t, y_r, None), scale, weight, None, Kernel(kernel, tuple(bandwidths), eps, unbiased), None)


def loss_and_gradient(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    what: Kernel,
    mix: Mix | None = None,
) -> tuple[Tensor, Tensor]:
    """-> loss [G], gradient [G, M, D] in y_t's dtype, finished for upstream ([G] or [1]).

    With ``mix``, y_t and y_r are network outputs (any two dtypes) and the gradient goes to that of t.
    """
    grad = torch.empty(y_t.shape, dtype=y_t.dtype, device=y_t.device)
    with torch.cuda.device_of(y_t):
        values, _ = _compute(_Groups(y_t, y_r, mix), scale, weight, upstream, what, grad)
    return values, grad


def flow_map_loss(
    x_t: Tensor,
    x_r: Tensor,
    g_t: Tensor,
    g_r: Tensor,
    c_skip_t: Tensor,
    c_out_t: Tensor,
    c_skip_r: Tensor,
    c_out_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    kernel: str,
    bandwidths: Sequence[float],
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`loss_and_gradient` of a flow map's branches."""
    mix = Mix(x_t, x_r, c_skip_t, c_out_t, c_skip_r, c_out_r)
    return loss_and_gradient(g_t, g_r, scale, weight, upstream, Kernel(kernel, tuple(bandwidths), eps, unbiased), mix)


def rescaled(grad: Tensor, finished: Tensor, g_t: Tensor, upstream: Tensor | None) -> Tensor:
    """finished [G, M, D], the gradient to g_t, times grad / upstream of its group: one pass over it."""
    groups, features = len(finished), finished[0].numel() if len(finished) else 0
    finished = finished.contiguous()
    out = torch.empty_like(finished)
    if out.numel():
        block = 4096
        with torch.cuda.device_of(finished):
            mmd_direct._rescale_kernel[(groups, -(-features // block))](
                finished, number_of(grad), number_of(upstream), out, features, BLOCK=block, num_warps=8
            )
    return out


def gradient(grad: Tensor, slopes: Tensor, y_t: Tensor, y_r: Tensor, weight: Tensor | None, unbiased: bool) -> Tensor:
    """The gradient [G, M, D] to y_t of sum(grad loss), from the slopes of :func:`loss`."""
    out = torch.empty(y_t.shape, dtype=y_t.dtype, device=y_t.device)
    with torch.cuda.device_of(y_t):
        _gradient(_Groups(y_t, y_r, None), weight, grad, slopes.contiguous(), unbiased, out)
    return out
