"""Launches of the MMD loss, its gradient and their fusion with a flow map, for up to LARGEST particles.

Which kernels run is chosen here, by shape: up to 8 particles (6 with a mix) are compared pair by pair, whole groups to a
program where there are groups enough to fill the device (resident) and slices of groups where there are not (split); larger M
takes tensor-core products (mmd_dot.py). All are deterministic. Floors, resources and figures: docs/mmd.md.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from imm_kernels import mmd_direct, mmd_dot

LARGEST = 256

#: Bytes that the resident programs of a multiprocessor may work on together, so that the second pass finds the group near.
_NEAR_BYTES = 200 * 1024
#: Rows of the pairs kernel, and features at a time where it differences a close pair.
_ROWS, _FEATURES = 16, 128
#: Triton's interpreter multiplies bfloat16 bit patterns in products.
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
    """Of mmd_direct: features per block, neighbouring features per thread, warps, most registers (None: ptxas's choice)."""

    BLOCK: int
    EACH: int
    num_warps: int
    maxnreg: int | None


@dataclass(frozen=True)
class DotSizes:
    """Of mmd_dot: rows of a block, features of a block of products and of the gradient, warps of these, stages of loads."""

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
    warps = 8 if M > 6 else 4 if M > 4 or D <= 1024 else 16 if bits == 32 and not mix and D > 2048 else 8
    # Left alone, ptxas spills a few registers of these to fit one more program.
    return DirectSizes(32 * warps * each, each, warps, 255 if mix or M in (5, 6) else None)


def dot_sizes(M: int, *, exact_bf16: bool, mix: bool) -> DotSizes:
    """One block of rows up to M = 64. Products of float32 keep their operands in registers in two parts: fewer features."""
    if M <= 16:
        return DotSizes(16, 64 if exact_bf16 else 16 if mix else 32, 1, 64 if mix else 128, 4)
    if M <= 32:
        return DotSizes(32, 64 if exact_bf16 else 16, 2 if exact_bf16 else 4, 64, 4)
    return DotSizes(64, 64 if exact_bf16 else 16, 4 if exact_bf16 else 8, 64, 8)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # Tensors elsewhere are the interpreter's: as on an H200.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def slices(groups: int, D: int, programs: int, block: int, most: int) -> tuple[int, int]:
    """(how many slices the features of a group are cut into, features of a slice) for ``programs`` or more programs in all."""
    wanted = max(1, min(-(-programs // max(groups, 1)), most, -(-D // block)))
    features = -(-D // (wanted * block)) * block
    return -(-D // features), features


class _Sets:
    """Both sets of particles as every kernel takes them."""

    def __init__(self, y_t: Tensor, y_r: Tensor, mix: Mix | None) -> None:
        self.G, self.M, self.D = y_t.shape
        self.device = y_t.device
        tensors = [y_t, y_r] if mix is None else [y_t, y_r, mix.x_t, mix.x_r]
        rows = [x if x.stride(2) == 1 or self.D == 1 else x.contiguous() for x in tensors]
        t, r, x_t, x_r = rows if mix is not None else (*rows, None, None)
        strides = [(x.stride(0), x.stride(1)) if x is not None else (0, 0) for x in (t, r, x_t, x_r)]
        numbers = (None,) * 4 if mix is None else (mix.c_skip_t, mix.c_out_t, mix.c_skip_r, mix.c_out_r)
        self.pointers = (t, r, x_t, x_r, *(None if c is None else c.contiguous() for c in numbers))
        self.strides = tuple(s for pair in strides for s in pair)
        self.has_mix = mix is not None
        self.bits = 8 * min(x.element_size() for x in rows)
        self.group_bytes = self.M * self.D * sum(x.element_size() for x in rows)
        self.exact_bf16 = mix is None and y_t.dtype == torch.bfloat16 and not _INTERPRETED


def _stride(value: Tensor | None) -> int:
    return 0 if value is None or value.shape[0] == 1 else value.stride(0)


def _loss(
    sets: _Sets,
    scale: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    what: Kernel,
    loss: Tensor,
    slopes: Tensor,
    grad: Tensor | None,
) -> None:
    if sets.G == 0:
        return
    kernel = {"KERNEL": what.kernel, "BANDWIDTHS": what.bandwidths, "UNBIASED": what.unbiased}
    numbers: dict[str, Any] = {"HAS_MIX": sets.has_mix, "HAS_WEIGHT": weight is not None}
    count = _multiprocessors(sets.device)
    if largest_direct(mix=sets.has_mix) < sets.M:
        return _loss_by_products(sets, scale, weight, upstream, what, loss, slopes, grad)
    sizes = direct_sizes(sets.M, sets.D, sets.bits, mix=sets.has_mix)
    launch = {"BLOCK": sizes.BLOCK, "EACH": sizes.EACH, "num_warps": sizes.num_warps, "maxnreg": sizes.maxnreg}
    if count <= sets.G or sets.D <= 4 * sizes.BLOCK:  # resident
        programs = count * max(1, min(16, _NEAR_BYTES // sets.group_bytes))
        mmd_direct._resident_kernel[(min(sets.G, programs),)](
            *sets.pointers,
            scale,
            weight,
            upstream,
            loss,
            slopes,
            grad,
            *sets.strides,
            _stride(scale),
            _stride(weight),
            _stride(upstream),
            sets.G,
            sets.D,
            what.eps,
            M=sets.M,
            **kernel,
            **numbers,
            HAS_UPSTREAM=upstream is not None,
            **launch,
        )
        return
    parts, features = slices(sets.G, sets.D, 2 * count, sizes.BLOCK, sets.D)
    width = 2 * mmd_direct.leaves(sets.M * (sets.M - 1) // 2) + mmd_direct.leaves(sets.M**2)
    partial = torch.empty((sets.G, parts, width), dtype=torch.float32, device=sets.device)
    mmd_direct._partial_kernel[(sets.G * parts,)](
        *sets.pointers, partial, *sets.strides, sets.D, parts, features, M=sets.M, HAS_MIX=sets.has_mix, **launch
    )
    mmd_direct._combine_kernel[(sets.G,)](
        partial,
        scale,
        weight,
        loss,
        slopes,
        _stride(scale),
        _stride(weight),
        sets.D,
        parts,
        what.eps,
        M=sets.M,
        **kernel,
        HAS_WEIGHT=weight is not None,
        num_warps=1,
    )
    if grad is not None:
        _gradient(sets, weight, upstream, slopes, what.unbiased, grad)


def _loss_by_products(
    sets: _Sets,
    scale: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    what: Kernel,
    loss: Tensor,
    slopes: Tensor,
    grad: Tensor | None,
) -> None:
    M, D = sets.M, sets.D
    sizes = dot_sizes(M, exact_bf16=sets.exact_bf16, mix=sets.has_mix)
    blocks = -(-M // sizes.rows)
    # At most a tenth of what the inputs and the gradient take.
    most = max(1, D * sets.bits // (320 * M))
    per_multiprocessor = 8 // sizes.warps
    programs = 2 * per_multiprocessor * _multiprocessors(sets.device) // blocks**2
    parts, features = slices(sets.G, D, programs, 4 * sizes.features, most)
    products = torch.empty((sets.G, parts, 3, M, M), dtype=torch.float32, device=sets.device)
    norms = torch.empty((sets.G, parts, 3, M), dtype=torch.float32, device=sets.device)
    mmd_dot._products_kernel[(sets.G * parts, blocks**2)](
        *sets.pointers,
        products,
        norms,
        *sets.strides,
        M,
        D,
        parts,
        features,
        HAS_MIX=sets.has_mix,
        EXACT_BF16=sets.exact_bf16,
        ONE_BLOCK=blocks == 1,
        BLOCK_M=sizes.rows,
        BLOCK_D=sizes.features,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    row_blocks = -(-M // _ROWS)
    by_rows = loss if row_blocks == 1 else torch.empty((sets.G, row_blocks), dtype=torch.float32, device=sets.device)
    columns = triton.next_power_of_2(M)
    mmd_dot._pairs_kernel[(sets.G * row_blocks,)](
        *sets.pointers,
        products,
        norms,
        scale,
        weight,
        by_rows,
        slopes,
        *sets.strides,
        _stride(scale),
        _stride(weight),
        M,
        D,
        parts,
        what.eps,
        KERNEL=what.kernel,
        BANDWIDTHS=what.bandwidths,
        UNBIASED=what.unbiased,
        HAS_MIX=sets.has_mix,
        HAS_WEIGHT=weight is not None,
        ROWS=_ROWS,
        COLUMNS=columns,
        BLOCK_D=_FEATURES,
        num_warps=8 if columns > 128 else 4,
        maxnreg=255,
    )
    if row_blocks > 1:
        torch.sum(by_rows, 1, out=loss)
    if grad is not None:
        _gradient(sets, weight, upstream, slopes, what.unbiased, grad)


def _gradient(
    sets: _Sets, weight: Tensor | None, upstream: Tensor | None, slopes: Tensor, unbiased: bool, grad: Tensor
) -> None:
    if sets.G == 0:
        return
    common: dict[str, Any] = {
        "UNBIASED": unbiased,
        "HAS_MIX": sets.has_mix,
        "HAS_WEIGHT": weight is not None,
        "HAS_UPSTREAM": upstream is not None,
    }
    arguments = (*sets.pointers, weight, upstream, slopes, grad, *sets.strides, _stride(weight), _stride(upstream))
    if largest_direct(mix=sets.has_mix) >= sets.M:
        sizes = direct_sizes(sets.M, sets.D, sets.bits, mix=sets.has_mix)
        parts, features = slices(sets.G, sets.D, 16 * _multiprocessors(sets.device), sizes.BLOCK, sets.D)
        mmd_direct._gradient_kernel[(sets.G * parts,)](
            *arguments,
            sets.D,
            parts,
            features,
            M=sets.M,
            **common,
            BLOCK=sizes.BLOCK,
            num_warps=sizes.num_warps,
            maxnreg=sizes.maxnreg,
        )
        return
    dot = dot_sizes(sets.M, exact_bf16=sets.exact_bf16, mix=sets.has_mix)
    programs = sets.G * -(-sets.M // dot.rows) * -(-sets.D // dot.gradient_features)
    mmd_dot._gradient_kernel[(programs,)](
        *arguments,
        sets.M,
        sets.D,
        **common,
        EXACT_BF16=sets.exact_bf16,
        BLOCK_M=dot.rows,
        BLOCK_K=16,
        BLOCK_D=dot.gradient_features,
        num_warps=dot.gradient_warps,
        num_stages=2,
    )


def _outputs(sets: _Sets) -> tuple[Tensor, Tensor]:
    loss = torch.empty((sets.G,), dtype=torch.float32, device=sets.device)
    return loss, torch.empty((sets.G, sets.M, 2 * sets.M), dtype=torch.float32, device=sets.device)


def loss(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, what: Kernel) -> tuple[Tensor, Tensor]:
    """y_t, y_r [G, M, D] -> loss [G], slopes [G, M, 2 M], float32. Arguments are the caller's to check, here and below.

    Particles are float32, bfloat16 or float16 of any strides; scale and weight [G] are of any floating dtype.
    """
    sets = _Sets(y_t, y_r, None)
    values, slopes = _outputs(sets)
    with torch.cuda.device_of(y_t):
        _loss(sets, scale, weight, None, what, values, slopes, None)
    return values, slopes


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
    sets = _Sets(y_t, y_r, mix)
    values, slopes = _outputs(sets)
    grad = torch.empty(y_t.shape, dtype=y_t.dtype, device=y_t.device)
    with torch.cuda.device_of(y_t):
        _loss(sets, scale, weight, upstream, what, values, slopes, grad)
    return values, grad


def rescaled(finished: Tensor, grad: Tensor, upstream: Tensor | None) -> Tensor:
    """finished [G, M, D] times grad / upstream of its group: one pass over it."""
    groups, features = len(finished), finished[0].numel() if len(finished) else 0
    finished = finished.contiguous()
    out = torch.empty_like(finished)
    if out.numel():
        block = 4096
        with torch.cuda.device_of(finished):
            mmd_direct._rescale_kernel[(groups, -(-features // block))](
                finished,
                grad,
                upstream,
                out,
                _stride(grad),
                _stride(upstream),
                features,
                upstream is not None,
                block,
                num_warps=8,
            )
    return out


def gradient(grad: Tensor, slopes: Tensor, y_t: Tensor, y_r: Tensor, weight: Tensor | None, unbiased: bool) -> Tensor:
    """The gradient [G, M, D] to y_t of sum(grad loss), from the slopes of :func:`loss`."""
    sets = _Sets(y_t, y_r, None)
    out = torch.empty(y_t.shape, dtype=y_t.dtype, device=y_t.device)
    with torch.cuda.device_of(y_t):
        _gradient(sets, weight, grad, slopes.contiguous(), unbiased, out)
    return out
