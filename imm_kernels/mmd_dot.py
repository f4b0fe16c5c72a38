"""MMD loss and gradient of larger sets (M > 8) by tensor-core products, in three launches.

products: for slices of the features, x.y of all pairs, |x|^2, and |t_j - r_j|^2 of the matched pairs by direct difference.
pairs: d^2 = |x|^2 + |y|^2 - 2 x.y, the slices added in order; a pair whose d^2 is below CLOSE (|x|^2 + |y|^2), where the
subtraction cancels, or not finite, is computed again by direct difference. Then loss and slopes.
gradient: sum_k c_jk (t_j - z_k) = (sum_k c_jk) t_j - C z by products; the matched and the close pairs, whose slopes may be
large, by direct difference. Their slopes are negative in memory.

Products of float32 numbers are three TF32 products (tf32x3), those of bfloat16 numbers exact; sums are float32. Sets and slopes
are as in mmd_direct.py; M is at most 256.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from imm_kernels.mmd_math import c_out, load_number, load_row, rows_of, value_and_slope

CLOSE = tl.constexpr(1e-2)


@triton.jit
def tile(of, rows, M, offs, last):
    """Features offs of the particles at rows: [rows, offs], zeros beyond either end."""
    return load_row(of, rows[:, None], offs[None, :], (rows < M)[:, None] & (offs < last)[None, :])


@triton.jit
def add_product(total, a, b, EXACT_BF16: tl.constexpr):
    """total + a b^T."""
    if EXACT_BF16:
        return tl.dot(a, tl.trans(b), total)
    else:
        return tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), total, input_precision="tf32x3")


@triton.jit
def add_square(total, a):
    a = a.to(tl.float32)
    return total + tl.sum(a * a, 1)


# Compiling once more for each stride or alignment of these would gain nothing.
_JIT = {
    "do_not_specialize": ["scale", "weight", "upstream", "M", "slices"],
    "do_not_specialize_on_alignment": ["scale", "weight", "upstream", "loss_ptr", "products_ptr", "norms_ptr"],
}


@triton.jit(**_JIT)
def _products_kernel(
    t,  # Set, as the next
    r,
    products_ptr,  # [G, slices, 3, M, M]: t t', r r', t r'
    norms_ptr,  # [G, slices, 3, M]: |t|^2, |r|^2, |t - r|^2
    M,
    D,
    slices,
    slice_features,
    EXACT_BF16: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of block a of both sets times rows of block b of both, over one slice of the features of one group."""
    blocks = tl.cdiv(M, BLOCK_M)
    a = tl.program_id(1) // blocks
    b = tl.program_id(1) % blocks
    if a > b:
        return
    part = tl.program_id(0).to(tl.int64)
    g = part // slices
    first = (tl.program_id(0) % slices) * slice_features
    last = tl.minimum(first + slice_features, D)
    t_rows = rows_of(t, g)
    r_rows = rows_of(r, g)
    rows_a = a * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_b = b * BLOCK_M + tl.arange(0, BLOCK_M)
    tt = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    rr = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    tr = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    rt = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    norm_t = tl.zeros((BLOCK_M,), tl.float32)
    norm_r = tl.zeros((BLOCK_M,), tl.float32)
    matched = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, last, BLOCK_D):
        offs = start + tl.arange(0, BLOCK_D)
        t_a = tile(t_rows, rows_a, M, offs, last)
        r_a = tile(r_rows, rows_a, M, offs, last)
        norm_t = add_square(norm_t, t_a)
        norm_r = add_square(norm_r, r_a)
        matched = add_square(matched, t_a.to(tl.float32) - r_a.to(tl.float32))
        if ONE_BLOCK:
            tt = add_product(tt, t_a, t_a, EXACT_BF16)
            rr = add_product(rr, r_a, r_a, EXACT_BF16)
            tr = add_product(tr, t_a, r_a, EXACT_BF16)
        else:
            t_b = tile(t_rows, rows_b, M, offs, last)
            r_b = tile(r_rows, rows_b, M, offs, last)
            tt = add_product(tt, t_a, t_b, EXACT_BF16)
            rr = add_product(rr, r_a, r_b, EXACT_BF16)
            tr = add_product(tr, t_a, r_b, EXACT_BF16)
            rt = add_product(rt, r_a, t_b, EXACT_BF16)
    products_ptr += part * 3 * M * M
    upper = rows_a[:, None] * M + rows_b[None, :]
    lower = rows_b[None, :] * M + rows_a[:, None]
    mask = (rows_a < M)[:, None] & (rows_b < M)[None, :]
    tl.store(products_ptr + upper, tt, mask=mask)
    tl.store(products_ptr + M * M + upper, rr, mask=mask)
    tl.store(products_ptr + 2 * M * M + upper, tr, mask=mask)
    if a != b:
        tl.store(products_ptr + lower, tt, mask=mask)
        tl.store(products_ptr + M * M + lower, rr, mask=mask)
        tl.store(products_ptr + 2 * M * M + lower, rt, mask=mask)
    else:
        norms_ptr += part * 3 * M
        tl.store(norms_ptr + rows_a, norm_t, mask=rows_a < M)
        tl.store(norms_ptr + M + rows_a, norm_r, mask=rows_a < M)
        tl.store(norms_ptr + 2 * M + rows_a, matched, mask=rows_a < M)


@triton.jit
def is_close(squares, sizes):
    """Where d^2 from a product has lost its digits, or is not finite. sizes: |x|^2 + |y|^2."""
    return (squares >= sizes * CLOSE) == 0


@triton.jit
def difference_close(squares, close, x, y, rows, columns, M_x, M_y, D, BLOCK_D: tl.constexpr):
    """squares of the pairs (x_rows, y_columns), those of close pairs computed again by direct difference."""
    if tl.max(tl.max(close.to(tl.int32), 1), 0) > 0:
        for i in range(columns.shape[0]):
            k = tl.min(columns, 0) + i
            here = close & (columns == k)[None, :]
            if tl.max(tl.max(here.to(tl.int32), 1), 0) > 0:
                square = tl.zeros((rows.shape[0],), tl.float32)
                for start in range(0, D, BLOCK_D):
                    offs = start + tl.arange(0, BLOCK_D)
                    rest = tile(x, rows, M_x, offs, D).to(tl.float32) - load_row(y, k, offs, offs < D)[None, :]
                    square = add_square(square, rest)
                squares = tl.where(here, square[:, None], squares)
    return squares


@triton.jit
def _squares(
    products_ptr,
    x_norms_ptr,
    y_norms_ptr,
    x,
    y,
    rows,
    columns,
    settled,
    settled_squares,
    M,
    D,
    slices,
    BLOCK_D: tl.constexpr,
):
    """Squared distances of the pairs (x_rows, y_columns), and which of them were computed by direct difference.

    Those that are settled are taken as given and not computed.
    """
    mask = (rows < M)[:, None] & (columns < M)[None, :]
    offs = rows[:, None] * M + columns[None, :]
    product = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    x_norm = tl.zeros((rows.shape[0],), tl.float32)
    y_norm = tl.zeros((columns.shape[0],), tl.float32)
    for i in range(slices):
        product += tl.load(products_ptr + i * 3 * M * M + offs, mask=mask, other=0.0)
        x_norm += tl.load(x_norms_ptr + i * 3 * M + rows, mask=rows < M, other=0.0)
        y_norm += tl.load(y_norms_ptr + i * 3 * M + columns, mask=columns < M, other=0.0)
    sizes = x_norm[:, None] + y_norm[None, :]
    squares = tl.where(settled, settled_squares, sizes - 2.0 * product)
    close = mask & (settled == 0) & is_close(squares, sizes)
    return difference_close(squares, close, x, y, rows, columns, M, M, D, BLOCK_D), close


@triton.jit(**_JIT)
def _pairs_kernel(
    t,  # Set, as the next
    r,
    products_ptr,  # [G, slices, 3, M, M]
    norms_ptr,  # [G, slices, 3, M]
    scale,  # Number [G]
    weight,  # Number [G] or None
    loss_ptr,  # [G, blocks of rows]
    slopes_ptr,  # [G, M, 2 M]
    M,
    D,
    slices,
    eps,
    KERNEL: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    UNBIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Loss and slopes of some rows of one group."""
    blocks = tl.cdiv(M, ROWS)
    g = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    t_rows = rows_of(t, g)
    r_rows = rows_of(r, g)
    kappa = load_number(scale, g) / D
    products_ptr += g * slices * 3 * M * M
    norms_ptr += g * slices * 3 * M
    slopes_ptr += g * 2 * M * M
    own = rows[:, None] == columns[None, :]
    counts = (rows < M)[:, None] & (columns < M)[None, :]
    if UNBIASED:
        counts = counts & (own == 0)
    offs = rows[:, None] * 2 * M + columns[None, :]
    mask = (rows < M)[:, None] & (columns < M)[None, :]

    squares, close = _squares(
        products_ptr, norms_ptr, norms_ptr, t_rows, t_rows, rows, columns, own, 0.0, M, D, slices, BLOCK_D
    )
    values, slopes = value_and_slope(squares, kappa, eps, KERNEL, BANDWIDTHS)
    loss = tl.sum(tl.sum(tl.where(counts, values, 0.0), 1), 0)
    tl.store(slopes_ptr + offs, tl.where(close, -slopes, slopes), mask=mask)

    squares, close = _squares(
        products_ptr + M * M, norms_ptr + M, norms_ptr + M, r_rows, r_rows, rows, columns, own, 0.0, M, D, slices, BLOCK_D
    )
    values, _ = value_and_slope(squares, kappa, eps, KERNEL, BANDWIDTHS)
    loss += tl.sum(tl.sum(tl.where(counts, values, 0.0), 1), 0)

    matched = tl.zeros((ROWS,), tl.float32)
    for i in range(slices):
        matched += tl.load(norms_ptr + i * 3 * M + 2 * M + rows, mask=rows < M, other=0.0)
    squares, close = _squares(
        products_ptr + 2 * M * M,
        norms_ptr,
        norms_ptr + M,
        t_rows,
        r_rows,
        rows,
        columns,
        own,
        matched[:, None],
        M,
        D,
        slices,
        BLOCK_D,
    )
    values, slopes = value_and_slope(squares, kappa, eps, KERNEL, BANDWIDTHS)
    loss -= 2.0 * tl.sum(tl.sum(tl.where(counts, values, 0.0), 1), 0)
    # An infinite particle has a kernel of 0 with every other; this makes its group's loss NaN.
    loss += 0.0 * tl.sum(tl.sum(tl.where(mask, squares, 0.0), 1), 0)
    tl.store(slopes_ptr + M + offs, tl.where(counts, tl.where(close | own, -slopes, slopes), 0.0), mask=mask)

    ordered = M * (M - 1) if UNBIASED else M * M
    tl.store(loss_ptr + tl.program_id(0), load_number(weight, g) * loss / ordered)


@triton.jit
def _minus_product(total, c, z, EXACT_BF16: tl.constexpr):
    """total - c z for float32 coefficients."""
    if EXACT_BF16:
        high = c.to(tl.bfloat16)
        low = (c - high.to(tl.float32)).to(tl.bfloat16)
        return total - tl.dot(low, z, tl.dot(high, z))
    else:
        return total - tl.dot(c, z.to(tl.float32), input_precision="tf32x3")


@triton.jit(**_JIT)
def _gradient_kernel(
    t,  # Set, as the next
    r,
    weight,  # Number [G] or None
    upstream,  # Number [G], [1] or None
    slopes_ptr,  # [G, M, 2 M]
    grad_ptr,  # [G, M, D]
    M,
    D,
    UNBIASED: tl.constexpr,
    EXACT_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of a block of rows over a block of features of one group."""
    blocks = tl.cdiv(M, BLOCK_M)
    blocks_d = tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) // blocks_d
    g = (part // blocks).to(tl.int64)
    rows = (part % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    t_rows = rows_of(t, g)
    r_rows = rows_of(r, g)
    ordered = M * (M - 1) if UNBIASED else M * M
    factor = load_number(weight, g) * load_number(upstream, g)
    factor *= 2.0 * c_out(t_rows) / ordered
    slopes_ptr += g * 2 * M * M
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    close = 0
    for start in range(0, M, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = (rows < M)[:, None] & (columns < M)[None, :]
        places = rows[:, None] * 2 * M + columns[None, :]
        within = tl.load(slopes_ptr + places, mask=mask, other=0.0)
        across = tl.load(slopes_ptr + M + places, mask=mask, other=0.0)
        other = (within < 0.0) | ((across < 0.0) & (rows[:, None] != columns[None, :]))
        close += tl.max(tl.max(other.to(tl.int32), 1), 0)
        within = tl.where(within < 0.0, 0.0, -factor * within)
        across = tl.where(across < 0.0, 0.0, factor * across)
        total += tl.sum(within + across, 1)
        grad = _minus_product(grad, within, tile(t_rows, columns, M, offs, D), EXACT_BF16)
        grad = _minus_product(grad, across, tile(r_rows, columns, M, offs, D), EXACT_BF16)
    t_own = tile(t_rows, rows, M, offs, D).to(tl.float32)
    r_own = tile(r_rows, rows, M, offs, D).to(tl.float32)
    grad += total[:, None] * t_own
    matched = tl.load(slopes_ptr + rows * 2 * M + M + rows, mask=rows < M, other=0.0)
    matched = tl.where(matched < 0.0, -factor * matched, 0.0)
    grad += matched[:, None] * (t_own - r_own)
    if close > 0:
        for k in range(M):
            within = tl.load(slopes_ptr + rows * 2 * M + k, mask=rows < M, other=0.0)
            across = tl.load(slopes_ptr + rows * 2 * M + M + k, mask=(rows < M) & (rows != k), other=0.0)
            if tl.max(((within < 0.0) | (across < 0.0)).to(tl.int32), 0) > 0:
                within = tl.where(within < 0.0, factor * within, 0.0)
                across = tl.where(across < 0.0, -factor * across, 0.0)
                grad += within[:, None] * (t_own - load_row(t_rows, k, offs, offs < D)[None, :])
                grad += across[:, None] * (t_own - load_row(r_rows, k, offs, offs < D)[None, :])
    mask = (rows < M)[:, None] & (offs < D)[None, :]
    places = g * M * D + rows[:, None].to(tl.int64) * D + offs[None, :]
    tl.store(grad_ptr + places, grad.to(grad_ptr.dtype.element_ty), mask=mask)
