"""Attention and its forward-mode tangent in one launch, on packed q, k, v and their tangents.

    S = q k^T / sqrt(d),  P = softmax(S),  out = P v,  lse = log sum_j exp(S_j)
    dS = (dq k^T + q dk^T) / sqrt(d),  dlse = rowsum(P dS),  dout = P (dS - dlse) v + P dv

Keys are processed in blocks with running maxima m; nothing is of size T x T. With p = exp(S - m) and sums over keys l = sum p,
r = sum p ds and A = sum p (ds v + dv): out = sum p v / l, dout = (A - r out) / l, dlse = r / l. m needs no tangent, since out
does not depend on it. ds is dS less a number of its row, which dout does not depend on either: the mean of the first block, so
that p ds is small where it is rounded to 16 bits, and little cancels in A - r out. Six matmuls a block of keys, where the
forward alone has two; 8 passes over the tokens instead of 4. A program takes a block of queries of a head.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.attention import (
    LN_2,
    LOG2_E,
    Sizes,
    _add_product,
    _bits,
    _load,
    _place,
    _product,
    _readable,
    _store,
    _zeros,
    parts,
)


def jvp_sizes(d: int, element_bits: int) -> Sizes:
    """Queries and keys of a block; warps and stages."""
    if element_bits == 32:  # products without tensor cores keep their operands in registers
        return Sizes(32 if d <= 80 else 16, 16, 8, 1)
    return Sizes(64, 64 if d <= 80 else 32, 4, 2)


@triton.jit(do_not_specialize=["T"])
def _attention_jvp_kernel(
    qkv_ptr,  # [B, T, 3, HEADS, D]
    dqkv_ptr,  # as qkv
    out_ptr,  # [B, T, HEADS, D]
    dout_ptr,  # as out
    lse_ptr,  # [B, HEADS, T]
    dlse_ptr,  # as lse
    batch_stride,  # of qkv, in units of 8 elements as the next three
    token_stride,
    dbatch_stride,
    dtoken_stride,
    T,
    scale,  # log2(e) / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,  # both blocks divide T
):
    token_stride *= 8  # the compiler sees that rows are aligned to 16 bytes and more
    dtoken_stride *= 8
    b, h, first = _place(T, HEADS, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + b * batch_stride * 8 + h * D
    dq_ptr = dqkv_ptr + b * dbatch_stride * 8 + h * D
    q_main, q_rest = _load(q_ptr, token_stride, rows, T, D, MAIN, REST, FULL)
    dq_main, dq_rest = _load(dq_ptr, dtoken_stride, rows, T, D, MAIN, REST, FULL)
    o_main, o_rest = _zeros(BLOCK_M, MAIN, REST)
    a_main, a_rest = _zeros(BLOCK_M, MAIN, REST)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    residue = tl.zeros((BLOCK_M,), tl.float32)
    shift = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_main, k_rest = _load(q_ptr + HEADS * D, token_stride, keys, T, D, MAIN, REST, FULL)
        dk_main, dk_rest = _load(dq_ptr + HEADS * D, dtoken_stride, keys, T, D, MAIN, REST, FULL)
        scores = _product(q_main, q_rest, k_main, k_rest, REST)
        slopes = _product(dq_main, dq_rest, k_main, k_rest, REST)
        slopes = tl.dot(q_main, tl.trans(dk_main), slopes, input_precision="ieee")
        if REST > 0:
            slopes = tl.dot(q_rest, tl.trans(dk_rest), slopes, input_precision="ieee")
        if not FULL:
            scores = tl.where((keys < T)[None, :], scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * scale)
        shrink = tl.exp2(largest - higher)
        weights = tl.exp2(scores * scale - higher[:, None])
        added = tl.sum(weights, 1)
        if start == 0:
            shift = tl.sum(weights * slopes, 1) / added
        slopes = weights * (slopes - shift[:, None]) * (scale * LN_2)
        total = total * shrink + added
        residue = residue * shrink + tl.sum(slopes, 1)
        largest = higher
        o_main *= shrink[:, None]
        a_main *= shrink[:, None]
        if REST > 0:
            o_rest *= shrink[:, None]
            a_rest *= shrink[:, None]
        v_main, v_rest = _load(q_ptr + 2 * HEADS * D, token_stride, keys, T, D, MAIN, REST, FULL)
        dv_main, dv_rest = _load(dq_ptr + 2 * HEADS * D, dtoken_stride, keys, T, D, MAIN, REST, FULL)
        o_main, o_rest = _add_product(o_main, o_rest, weights, v_main, v_rest, REST)
        a_main, a_rest = _add_product(a_main, a_rest, slopes, v_main, v_rest, REST)
        a_main, a_rest = _add_product(a_main, a_rest, weights, dv_main, dv_rest, REST)
    o_main /= total[:, None]
    a_main = (a_main - residue[:, None] * o_main) / total[:, None]
    if REST > 0:
        o_rest /= total[:, None]
        a_rest = (a_rest - residue[:, None] * o_rest) / total[:, None]
    place = b * T * HEADS * D + h * D
    _store(out_ptr + place, HEADS * D, rows, T, o_main, o_rest, D, MAIN, REST)
    _store(dout_ptr + place, HEADS * D, rows, T, a_main, a_rest, D, MAIN, REST)
    places = (b * HEADS + h) * T + rows
    tl.store(lse_ptr + places, (largest + tl.log2(total)) * LN_2, mask=rows < T)
    tl.store(dlse_ptr + places, residue / total + shift * (scale * LN_2), mask=rows < T)


def attention_jvp(qkv: Tensor, heads: int, dqkv: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv and dqkv [B, T, 3 H d] of 16 or 32 bits -> out, lse, and their tangents: [B, T, H d] and [B, H, T] float32."""
    B, T, width = qkv.shape
    d = width // (3 * heads)
    out, dout = (torch.empty((B, T, heads * d), dtype=qkv.dtype, device=qkv.device) for _ in range(2))
    lse, dlse = (torch.empty((B, heads, T), dtype=torch.float32, device=qkv.device) for _ in range(2))
    if B == 0:
        return out, lse, dout, dlse
    qkv, dqkv = _readable(qkv), _readable(dqkv)
    main, rest = parts(d)
    sizes = jvp_sizes(d, _bits(qkv))
    with torch.cuda.device_of(qkv):
        _attention_jvp_kernel[(B * heads * -(-T // sizes.queries),)](
            *(qkv, dqkv, out, dout, lse, dlse),
            *(stride // 8 for x in (qkv, dqkv) for stride in x.stride()[:2]),
            T,
            LOG2_E.value * d**-0.5,
            HEADS=heads,
            D=d,
            MAIN=main,
            REST=rest,
            BLOCK_M=sizes.queries,
            BLOCK_N=sizes.keys,
            FULL=T % sizes.queries == 0 and T % sizes.keys == 0,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    return out, lse, dout, dlse
