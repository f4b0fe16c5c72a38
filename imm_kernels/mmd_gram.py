"""Kernel matrices k(x_j, y_k) of batches of particle sets, and their gradients to x and y.

Forward: a program takes a block of pairs, x.y by tensor-core products as in mmd_dot.py, close pairs by direct difference.
Backward: the slopes come from the same distances; the gradient sum_k c_jk (x_j - y_k) is added up pair by pair, by direct
difference. Reads x and y once per block of the other's rows.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.mmd_dot import add_product, add_square, difference_close, is_close, tile
from imm_kernels.mmd_math import Set, load_number, load_row, number_of, rows_of, set_of, value_and_slope

ROWS, FEATURES = 16, 64  # of a block of pairs
NUM_WARPS = 1
GRADIENT_ROWS, GRADIENT_FEATURES, GRADIENT_WARPS = 8, 128, 4


@triton.jit(do_not_specialize=["M_x", "M_y", "scale"], do_not_specialize_on_alignment=["scale", "out_ptr"])
def _gram_kernel(
    x,  # Set [G, M_x, D]
    y,  # Set [G, M_y, D]
    scale,  # Number [G]
    grad_ptr,  # [G, M_x, M_y], or None for the forward
    out_ptr,  # [G, M_x, M_y]: k or, of the backward, -grad slope
    M_x,
    M_y,
    D,
    eps,
    KERNEL: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    EXACT_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_y = tl.cdiv(M_y, ROWS)
    blocks = tl.cdiv(M_x, ROWS) * blocks_y
    g = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    rows = (block // blocks_y) * ROWS + tl.arange(0, ROWS)
    columns = (block % blocks_y) * ROWS + tl.arange(0, ROWS)
    x_rows = rows_of(x, g)
    y_rows = rows_of(y, g)
    product = tl.zeros((ROWS, ROWS), tl.float32)
    x_norm = tl.zeros((ROWS,), tl.float32)
    y_norm = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK_D):
        offs = start + tl.arange(0, BLOCK_D)
        x_tile = tile(x_rows, rows, M_x, offs, D)
        y_tile = tile(y_rows, columns, M_y, offs, D)
        product = add_product(product, x_tile, y_tile, EXACT_BF16)
        x_norm = add_square(x_norm, x_tile)
        y_norm = add_square(y_norm, y_tile)
    sizes = x_norm[:, None] + y_norm[None, :]
    squares = sizes - 2.0 * product
    mask = (rows < M_x)[:, None] & (columns < M_y)[None, :]
    close = mask & is_close(squares, sizes)
    squares = difference_close(squares, close, x_rows, y_rows, rows, columns, M_x, M_y, D, BLOCK_D)
    kappa = load_number(scale, g) / D
    values, slopes = value_and_slope(squares, kappa, eps, KERNEL, BANDWIDTHS)
    places = (g * M_x + rows[:, None]) * M_y + columns[None, :]
    if grad_ptr is not None:
        values = -tl.load(grad_ptr + places, mask=mask, other=0.0).to(tl.float32) * slopes
    elif KERNEL != "energy":
        values += 1.0
    tl.store(out_ptr + places, values, mask=mask)


@triton.jit(do_not_specialize=["M_x", "M_y", "row_step", "column_step"], do_not_specialize_on_alignment=["coefficient_ptr"])
def _gram_gradient_kernel(
    x,  # Set [G, M_x, D]
    y,  # Set [G, M_y, D]
    coefficient_ptr,  # [G, M_x, M_y], element (j, k) at j row_step + k column_step of its group
    grad_ptr,  # [G, M_x, D]
    row_step,
    column_step,
    M_x,
    M_y,
    D,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad_j = sum_k coefficient_jk (x_j - y_k) for a block of rows and of features."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    blocks = tl.cdiv(M_x, ROWS)
    part = tl.program_id(0) // blocks_d
    g = (part // blocks).to(tl.int64)
    rows = (part % blocks) * ROWS + tl.arange(0, ROWS)
    offs = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    x_tile = tile(rows_of(x, g), rows, M_x, offs, D).to(tl.float32)
    y_rows = rows_of(y, g)
    coefficient_ptr += g * M_x * M_y + rows.to(tl.int64) * row_step
    grad = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for k in range(M_y):
        coefficient = tl.load(coefficient_ptr, mask=rows < M_x, other=0.0)
        grad += coefficient[:, None] * (x_tile - load_row(y_rows, k, offs, offs < D)[None, :])
        coefficient_ptr += column_step
    places = (g * M_x + rows[:, None]) * D + offs[None, :]
    tl.store(grad_ptr + places, grad.to(grad_ptr.dtype.element_ty), mask=(rows < M_x)[:, None] & (offs < D)[None, :])


def _pairs(x: Set, y: Set, scale: Tensor, grad: Tensor | None, kernel: str, bandwidths: Sequence[float], eps: float) -> Tensor:
    """Kernel matrices or, with ``grad`` [G, M_x, M_y], the coefficients of the gradient."""
    (G, M_x, D), M_y = x.y.shape, y.y.shape[1]
    out = torch.empty((G, M_x, M_y), dtype=torch.float32, device=scale.device)
    if G == 0:
        return out
    bf16 = x.y.dtype == torch.bfloat16
    interpreted = not isinstance(_gram_kernel, triton.runtime.JITFunction)  # its bfloat16 products are wrong
    _gram_kernel[(G * -(-M_x // ROWS) * -(-M_y // ROWS),)](
        x,
        y,
        number_of(scale),
        grad,
        out,
        M_x,
        M_y,
        D,
        eps,
        KERNEL=kernel,
        BANDWIDTHS=tuple(bandwidths),
        EXACT_BF16=bf16 and not interpreted,
        ROWS=ROWS,
        BLOCK_D=FEATURES if bf16 else FEATURES // 2,
        num_warps=NUM_WARPS,
    )
    return out


def gram(x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float], eps: float) -> Tensor:
    """x [G, M_x, D], y [G, M_y, D] -> [G, M_x, M_y] float32. Arguments are the caller's to check."""
    with torch.cuda.device_of(x):
        return _pairs(set_of(x), set_of(y), scale, None, kernel, bandwidths, eps)


def gram_gradients(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float], eps: float
) -> tuple[Tensor, Tensor]:
    """The gradients of sum(grad gram) to x and y."""
    G, D, M_y = x.shape[0], x.shape[2], y.shape[1]
    grad_x, grad_y = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, y))
    if G == 0:
        return grad_x, grad_y
    with torch.cuda.device_of(x):
        xs, ys = set_of(x), set_of(y)
        coefficient = _pairs(xs, ys, scale, grad.contiguous(), kernel, bandwidths, eps)
        for first, second, out, steps in ((xs, ys, grad_x, (M_y, 1)), (ys, xs, grad_y, (1, M_y))):
            rows = first.y.shape[1]
            _gram_gradient_kernel[(G * -(-rows // GRADIENT_ROWS) * -(-D // GRADIENT_FEATURES),)](
                first,
                second,
                coefficient,
                out,
                *steps,
                rows,
                second.y.shape[1],
                D,
                ROWS=GRADIENT_ROWS,
                BLOCK_D=GRADIENT_FEATURES,
                num_warps=GRADIENT_WARPS,
            )
    return grad_x, grad_y
