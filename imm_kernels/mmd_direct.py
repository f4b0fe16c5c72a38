"""MMD loss and gradient of small sets (M <= 8), every pair by direct difference.

A program loads the same features of all 2 M particles, takes the squared differences of every pair and keeps one partial sum
per pair and thread; the sums of many pairs are then added over threads in one reduction of a [threads, pairs] tile, which is a
matter of naming registers: joining them moves nothing. The second pass over the features, which finds them in the cache,
writes the gradient.

resident: one launch, a program takes whole groups, 3 G M D elements moved. partial, combine, gradient: for few groups of many
features, a program takes a slice of a group and the slices' sums are added in order. gradient is also the backward from saved
slopes.

The gradient of a flow map's particles (mmd_math.Set) is that of the network's output. slopes [G, M, 2 M] are those of the pairs
(t_j, t_k), then (t_j, r_k); see mmd_math.py.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from imm_kernels.mmd_math import c_out, load_number, load_row, rows_of, share, value_and_slope


def leaves(pairs):
    """Pairs rounded up to a power of two."""
    return 1 << max(pairs - 1, 0).bit_length()


_leaves = triton.constexpr_function(leaves)


@triton.constexpr_function
def _reversed_bits(index, n):
    """The bits of index in [0, n) in reverse order: where _joined puts its operands."""
    result = 0
    while n > 1:
        result = 2 * result + index % 2
        index //= 2
        n //= 2
    return result


@triton.constexpr_function
def _inner(j, k, M):
    """Place of the pair j < k among the pairs of one set."""
    return j * M - j * (j + 1) // 2 + k - j - 1


@triton.jit
def _joined(parts, n: tl.constexpr):
    if n == 1:
        return parts[0]
    else:
        half = ()
        for i in tl.static_range(n // 2):
            half = half + (tl.join(parts[2 * i], parts[2 * i + 1]),)
        return _joined(half, n // 2)


@triton.jit
def _total(sums, pairs: tl.constexpr):
    """Per-thread sums of each pair, [T] each, -> [_leaves(pairs)], zeros after the pairs, in every thread."""
    n: tl.constexpr = _leaves(pairs)
    threads: tl.constexpr = sums[0].shape[0]
    zero = tl.zeros((threads,), sums[0].dtype)
    parts = ()
    for i in tl.static_range(n):
        if _reversed_bits(i, n) < pairs:
            parts = parts + (sums[_reversed_bits(i, n)],)
        else:
            parts = parts + (zero,)
    return tl.sum(tl.reshape(_joined(parts, n), (threads, n)), 0)


@triton.jit
def _some(total, first: tl.constexpr, pairs: tl.constexpr):
    """The sums of pairs from first, [_leaves(pairs)], zeros after them.

    Gathered, each is in one lane, so that what follows is not computed by every thread for all pairs.
    """
    place = tl.arange(0, _leaves(pairs))
    some = tl.gather(total, tl.minimum(first + place, total.shape[0] - 1), 0)
    return tl.where(place < pairs, some, 0.0)


@triton.jit
def _particles(of, offs, mask, M: tl.constexpr):
    """The M particles of a group at features offs, float32 each."""
    rows = ()
    for j in tl.static_range(M):
        rows = rows + (load_row(of, j, offs, mask).to(tl.float32),)
    return rows


@triton.jit
def _square(a, b, EACH: tl.constexpr):
    """Squared differences, added over a thread's EACH neighbouring features."""
    diff = a - b
    return tl.sum(tl.reshape(diff * diff, (a.shape[0] // EACH, EACH)), 1)


@triton.jit
def _add_within(sums, rows, M: tl.constexpr, EACH: tl.constexpr):
    """sums + squared distances of the pairs of one set."""
    added = ()
    for j in tl.static_range(M):
        for k in tl.static_range(j + 1, M):
            added = added + (sums[_inner(j, k, M)] + _square(rows[j], rows[k], EACH),)
    return added


@triton.jit
def _add_across(sums, t, r, M: tl.constexpr, EACH: tl.constexpr):
    """sums + squared distances of the pairs (t_j, r_k)."""
    added = ()
    for j in tl.static_range(M):
        for k in tl.static_range(M):
            added = added + (sums[j * M + k] + _square(t[j], r[k], EACH),)
    return added


@triton.jit
def _zeros(n: tl.constexpr, threads: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(n):
        zeros = zeros + (tl.zeros((threads,), tl.float32),)
    return zeros


@triton.jit
def _squared_distances(t_rows, r_rows, first, last, M: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """Over features [first, last): within t and within r [_leaves(M (M - 1) / 2)], across [_leaves(M^2)]."""
    INNER: tl.constexpr = M * (M - 1) // 2
    offs = tl.arange(0, BLOCK)
    if (6 if len(t_rows.state) == 0 else 4) >= M:
        tt = _zeros(INNER, BLOCK // EACH)
        rr = _zeros(INNER, BLOCK // EACH)
        tr = _zeros(M * M, BLOCK // EACH)
        for start in range(first, last, BLOCK):
            t = _particles(t_rows, start + offs, start + offs < last, M)
            r = _particles(r_rows, start + offs, start + offs < last, M)
            if M > 1:
                tt = _add_within(tt, t, M, EACH)
                rr = _add_within(rr, r, M, EACH)
            tr = _add_across(tr, t, r, M, EACH)
        across = _some(_total(tr, M * M), 0, M * M)
        if M > 1:
            inner = _total(tt + rr, 2 * INNER)
            return _some(inner, 0, INNER), _some(inner, INNER, INNER), across
        else:
            none = tl.zeros((1,), tl.float32)
            return none, none, across
    else:  # the partial sums of all pairs at once would not fit the registers
        tt = _zeros(INNER, BLOCK // EACH)
        for start in range(first, last, BLOCK):
            t = _particles(t_rows, start + offs, start + offs < last, M)
            tt = _add_within(tt, t, M, EACH)
        total_tt = _some(_total(tt, INNER), 0, INNER)
        rr = _zeros(INNER, BLOCK // EACH)
        for start in range(first, last, BLOCK):
            r = _particles(r_rows, start + offs, start + offs < last, M)
            rr = _add_within(rr, r, M, EACH)
        total_rr = _some(_total(rr, INNER), 0, INNER)
        tr = _zeros(M * M, BLOCK // EACH)
        for start in range(first, last, BLOCK):
            t = _particles(t_rows, start + offs, start + offs < last, M)
            r = _particles(r_rows, start + offs, start + offs < last, M)
            tr = _add_across(tr, t, r, M, EACH)
        return total_tt, total_rr, _some(_total(tr, M * M), 0, M * M)


@triton.jit
def _loss_and_slopes(
    tt,
    rr,
    tr,
    kappa,
    eps,
    M: tl.constexpr,
    KERNEL: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    UNBIASED: tl.constexpr,
):
    """Squared distances -> the group's loss without weight, slopes within t, slopes across."""
    across = tl.arange(0, tr.shape[0])
    counts = across < M * M
    if UNBIASED:
        counts = counts & (across % (M + 1) != 0)
    values, slopes = value_and_slope(tr, kappa, eps, KERNEL, BANDWIDTHS)
    # An infinite particle has a kernel of 0 with every other; the last term makes its group's loss NaN.
    loss = -2.0 * tl.sum(tl.where(counts, values, 0.0), 0) + 0.0 * tl.sum(tr, 0)
    slopes_tr = tl.where(counts, slopes, 0.0)
    values_tt, slopes_tt = value_and_slope(tt, kappa, eps, KERNEL, BANDWIDTHS)
    if M > 1:
        values_rr, _ = value_and_slope(rr, kappa, eps, KERNEL, BANDWIDTHS)
        within = tl.arange(0, tt.shape[0]) < M * (M - 1) // 2
        loss += 2.0 * tl.sum(tl.where(within, values_tt + values_rr, 0.0), 0)
    if UNBIASED:
        loss *= 1.0 / (M * (M - 1))
    else:
        own, _ = value_and_slope(0.0 * kappa, kappa, eps, KERNEL, BANDWIDTHS)
        loss = (loss + 2.0 * M * own) * (1.0 / (M * M))
    return loss, slopes_tt, slopes_tr


@triton.jit
def _store_slopes(slopes_ptr, tt, tr, M: tl.constexpr):
    """Into [M, 2 M]: slopes within t, a zero diagonal, slopes across."""
    across = tl.arange(0, tr.shape[0])
    j = across // M
    k = across % M
    tl.store(slopes_ptr + j * 2 * M + M + k, tr, mask=across < M * M)
    tl.store(slopes_ptr + j * 2 * M + k, 0.0 * tr, mask=(across < M * M) & (j == k))
    if M > 1:
        within = tl.arange(0, tt.shape[0])
        j = tl.zeros_like(within)
        for row in tl.static_range(1, M - 1):
            j = tl.where(within >= _inner(row, row + 1, M), row, j)
        k = within - (j * M - j * (j + 1) // 2 - j - 1)
        mask = within < M * (M - 1) // 2
        tl.store(slopes_ptr + j * 2 * M + k, tt, mask=mask)
        tl.store(slopes_ptr + k * 2 * M + j, tt, mask=mask)


IN_REGISTERS = tl.constexpr(6)  # largest M whose slopes stay in registers; above, each block of features loads them again


@triton.jit
def _load_slopes(slopes_ptr, factor, M: tl.constexpr):
    """factor times the M (M - 1) / 2 slopes within t and the M^2 across, scalars."""
    within = ()
    across = ()
    for j in tl.static_range(M):
        for k in tl.static_range(j + 1, M):
            within = within + (factor * tl.load(slopes_ptr + j * 2 * M + k),)
        for k in tl.static_range(M):
            across = across + (factor * tl.load(slopes_ptr + j * 2 * M + M + k),)
    return within, across


@triton.jit
def _store_gradient(grad_ptr, t_rows, r_rows, within, across, offs, mask, D, M: tl.constexpr):
    """grad_j = sum_k across_jk (t_j - r_k) - within_jk (t_j - t_k) at features offs, into [M, D]."""
    t = _particles(t_rows, offs, mask, M)
    r = _particles(r_rows, offs, mask, M)
    for j in tl.static_range(M):
        grad = tl.zeros_like(t[0])
        for k in tl.static_range(M):
            grad += across[j * M + k] * (t[j] - r[k])
        for k in tl.static_range(M):
            if k < j:
                grad -= within[_inner(k, j, M)] * (t[j] - t[k])
            if k > j:
                grad -= within[_inner(j, k, M)] * (t[j] - t[k])
        tl.store(grad_ptr + j * tl.cast(D, tl.int64) + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


# Compiling once more for each stride or alignment of these would gain nothing.
_JIT = {
    "do_not_specialize": ["scale", "weight", "upstream", "G", "slices"],
    "do_not_specialize_on_alignment": ["scale", "weight", "upstream", "loss_ptr", "slopes_ptr", "partial_ptr"],
}


@triton.jit(**_JIT)
def _resident_kernel(
    t,  # Set, as the next
    r,
    scale,  # Number [G]
    weight,  # Number [G] or None
    upstream,  # Number [G], [1] or None
    loss_ptr,  # [G]
    slopes_ptr,  # [G, M, 2 M]
    grad_ptr,  # [G, M, D]
    G,
    D,
    eps,
    M: tl.constexpr,
    KERNEL: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    # What the compiler would move before the loop takes the registers of the particles.
    for group in tl.range(tl.program_id(0), G, tl.num_programs(0), disable_licm=True):
        g = tl.cast(group, tl.int64)
        t_rows = rows_of(t, g)
        r_rows = rows_of(r, g)
        kappa = load_number(scale, g) / D
        factor = load_number(weight, g)
        tt, rr, tr = _squared_distances(t_rows, r_rows, 0, D, M, BLOCK, EACH)
        loss, tt, tr = _loss_and_slopes(tt, rr, tr, kappa, eps, M, KERNEL, BANDWIDTHS, UNBIASED)
        tl.store(loss_ptr + g, factor * loss)
        group_slopes_ptr = slopes_ptr + g * (2 * M * M)
        _store_slopes(group_slopes_ptr, tt, tr, M)
        if grad_ptr is not None:
            factor *= load_number(upstream, g) * share(M, UNBIASED) * c_out(t_rows)
            tl.debug_barrier()  # every thread now sees all slopes
            if M <= IN_REGISTERS:
                within, across = _load_slopes(group_slopes_ptr, factor, M)
            blocks = tl.cdiv(D, BLOCK)
            for i in range(blocks):  # what was read last is still near
                if M > IN_REGISTERS:
                    within, across = _load_slopes(group_slopes_ptr, factor, M)
                offs = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
                _store_gradient(grad_ptr + g * M * D, t_rows, r_rows, within, across, offs, offs < D, D, M)


@triton.jit(**_JIT)
def _partial_kernel(
    t,  # Set, as the next
    r,
    partial_ptr,  # [G, slices, 2 N + N_TR]
    D,
    slices,
    slice_features,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
):
    """Squared distances over one slice of the features of one group."""
    N: tl.constexpr = _leaves(M * (M - 1) // 2)
    N_TR: tl.constexpr = _leaves(M * M)
    g = (tl.program_id(0) // slices).to(tl.int64)
    first = (tl.program_id(0) % slices) * slice_features
    t_rows = rows_of(t, g)
    r_rows = rows_of(r, g)
    last = tl.minimum(first + slice_features, D)
    tt, rr, tr = _squared_distances(t_rows, r_rows, first, last, M, BLOCK, EACH)
    partial_ptr += tl.program_id(0).to(tl.int64) * (2 * N + N_TR)
    tl.store(partial_ptr + tl.arange(0, N), tt)
    tl.store(partial_ptr + N + tl.arange(0, N), rr)
    tl.store(partial_ptr + 2 * N + tl.arange(0, N_TR), tr)


@triton.jit(**_JIT)
def _combine_kernel(
    partial_ptr,  # [G, slices, 2 N + N_TR]
    scale,  # Number [G]
    weight,  # Number [G] or None
    loss_ptr,  # [G]
    slopes_ptr,  # [G, M, 2 M]
    D,
    slices,
    eps,
    M: tl.constexpr,
    KERNEL: tl.constexpr,
    BANDWIDTHS: tl.constexpr,
    UNBIASED: tl.constexpr,
):
    """Loss and slopes of one group from the sums of its slices, added in order."""
    N: tl.constexpr = _leaves(M * (M - 1) // 2)
    N_TR: tl.constexpr = _leaves(M * M)
    g = tl.program_id(0).to(tl.int64)
    partial_ptr += g * slices * (2 * N + N_TR)
    tt = tl.zeros((N,), tl.float32)
    rr = tl.zeros((N,), tl.float32)
    tr = tl.zeros((N_TR,), tl.float32)
    for _ in range(slices):
        tt += tl.load(partial_ptr + tl.arange(0, N))
        rr += tl.load(partial_ptr + N + tl.arange(0, N))
        tr += tl.load(partial_ptr + 2 * N + tl.arange(0, N_TR))
        partial_ptr += 2 * N + N_TR
    kappa = load_number(scale, g) / D
    loss, tt, tr = _loss_and_slopes(tt, rr, tr, kappa, eps, M, KERNEL, BANDWIDTHS, UNBIASED)
    tl.store(loss_ptr + g, load_number(weight, g) * loss)
    _store_slopes(slopes_ptr + g * (2 * M * M), tt, tr, M)


@triton.jit(**_JIT)
def _gradient_kernel(
    t,  # Set, as the next
    r,
    weight,  # Number [G] or None
    upstream,  # Number [G], [1] or None
    slopes_ptr,  # [G, M, 2 M]
    grad_ptr,  # [G, M, D]
    D,
    slices,
    slice_features,
    M: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient over one slice of the features of one group."""
    g = (tl.program_id(0) // slices).to(tl.int64)
    first = (tl.program_id(0) % slices) * slice_features
    t_rows = rows_of(t, g)
    r_rows = rows_of(r, g)
    factor = load_number(weight, g) * load_number(upstream, g)
    factor *= share(M, UNBIASED) * c_out(t_rows)
    slopes_ptr += g * (2 * M * M)
    if M <= IN_REGISTERS:
        within, across = _load_slopes(slopes_ptr, factor, M)
    last = tl.minimum(first + slice_features, D)
    for start in range(first, last, BLOCK):
        if M > IN_REGISTERS:
            within, across = _load_slopes(slopes_ptr, factor, M)
        offs = start + tl.arange(0, BLOCK)
        _store_gradient(grad_ptr + g * M * D, t_rows, r_rows, within, across, offs, offs < last, D, M)


@triton.jit(do_not_specialize=["grad", "upstream"], do_not_specialize_on_alignment=["grad", "upstream"])
def _rescale_kernel(
    finished_ptr,  # [G, features]
    grad,  # Number [G]
    upstream,  # Number [G], [1] or None
    out_ptr,  # [G, features]
    features,
    BLOCK: tl.constexpr,
):
    """A finished gradient for another factor than it was finished for; 0 for 0 is 1."""
    g = tl.program_id(0).to(tl.int64)
    ratio = tl.load(grad.ptr + g * grad.stride).to(tl.float64)
    if upstream is not None:
        finished_for = tl.load(upstream.ptr + g * upstream.stride).to(tl.float64)
        ratio = tl.where(ratio == finished_for, 1.0, ratio / finished_for)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < features
    values = tl.load(finished_ptr + g * features + offs, mask=mask).to(tl.float32)
    tl.store(out_ptr + g * features + offs, (values * ratio.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)
