"""Attention of all tokens to all tokens on packed q, k and v, forward and backward.

    out = softmax(q k^T / sqrt(d)) v,  lse = log sum_j exp(q k_j^T / sqrt(d))

The d features of a head are two parts of powers of two, MAIN and, for what is left, REST (72 = 64 + 8 in 16), because padding
72 to 128 would cost 1.8 times the products. Forward: up to 256 keys of a head and their values stay on chip while a program
walks its blocks of queries; more keys are processed in blocks, with running maxima, for one block of queries. Backward, with no
atomics: rowsums of grad out; then keys by blocks, which pass over the queries; then queries by blocks, over the keys.
Both compute the scores again. Sums are float32.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imm_kernels.device import multiprocessors, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
DELTA_TOKENS, DELTA_WARPS = 64, 4


class Sizes(NamedTuple):
    """Of a launch: queries and keys of a block, warps and stages of the loop's loads. blocks: how many of queries a program of
    the forward walks with all keys on chip; 0 where it loops over blocks of keys."""

    queries: int
    keys: int
    warps: int
    stages: int
    blocks: int = 0


def parts(d: int) -> tuple[int, int]:
    """(MAIN, REST): the powers of two from 16 that hold the d features of a head; REST is 0 where MAIN holds all."""
    main = max(16, 1 << (d.bit_length() - 1))
    return main, 0 if main >= d else max(16, next_power_of_2(d - main))


def forward_sizes(d: int, T: int, element_bits: int, heads: int, multiprocessors: int) -> Sizes:
    """Blocks of the forward; ``heads``: of all images. All keys are on chip where two programs fit a multiprocessor so, and few
    heads are split over programs."""
    if element_bits == 32:  # products without tensor cores keep their operands in registers
        return Sizes(32, 32, 8, 1)
    if T > 256 or d > 80:
        return Sizes(64, 64, 4, 2)
    blocks = -(-T // 64)

    def cost(walked: int) -> int:
        """Of all rounds of programs, in blocks of queries; loading keys and values takes about as long as one."""
        programs = heads * -(-blocks // walked)
        return -(-programs // (2 * multiprocessors)) * (1 + walked)

    return Sizes(64, max(16, next_power_of_2(T)), 4, 1, min(range(blocks, 0, -1), key=cost))


def key_sizes(d: int, element_bits: int) -> Sizes:
    """Blocks of the backward to k and v: a program's keys, and the queries of a turn."""
    if element_bits == 32:
        return Sizes(16, 32, 8, 1)
    return Sizes(64, 64, 4, 1) if d <= 80 else Sizes(32, 64, 8, 1)


def query_sizes(d: int, element_bits: int) -> Sizes:
    """Blocks of the backward to q: a program's queries, and the keys of a turn."""
    if element_bits == 32:
        return Sizes(32, 16, 8, 1)
    return Sizes(64, 64, 4, 2) if d <= 80 else Sizes(64, 64, 8, 1)


@triton.jit
def _part(ptr, stride, rows, T, FIRST: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr):
    """[ROWS, SIZE] from feature FIRST of a head; 0 outside of it and past token T. FULL: no row is past T."""
    columns = FIRST + tl.arange(0, SIZE)
    places = ptr + rows[:, None] * stride + columns[None, :]
    if FULL and FIRST + SIZE <= D:
        return tl.load(places)
    elif FULL:
        return tl.load(places, mask=(columns < D)[None, :], other=0.0)
    elif FIRST + SIZE <= D:
        return tl.load(places, mask=(rows < T)[:, None], other=0.0)
    else:
        return tl.load(places, mask=(rows < T)[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def _load(ptr, stride, rows, T, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, FULL: tl.constexpr):
    """Rows of a head in two parts; the second is the first again where there is no rest."""
    main = _part(ptr, stride, rows, T, 0, MAIN, D, FULL)
    if REST > 0:
        return main, _part(ptr, stride, rows, T, MAIN, REST, D, FULL)
    else:
        return main, main


@triton.jit
def _store(ptr, stride, rows, T, main, rest, D: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    columns = tl.arange(0, MAIN)
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + columns[None, :], main.to(ptr.dtype.element_ty), mask=mask)
    if REST > 0:
        columns = MAIN + tl.arange(0, REST)
        mask = (rows < T)[:, None] & (columns < D)[None, :]
        tl.store(ptr + rows[:, None] * stride + columns[None, :], rest.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(a_main, a_rest, b_main, b_rest, REST: tl.constexpr):
    """a b^T over the features, float32."""
    product = tl.dot(a_main, tl.trans(b_main), input_precision="ieee")
    if REST > 0:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision="ieee")
    return product


@triton.jit
def _add_product(main, rest, a, b_main, b_rest, REST: tl.constexpr):
    """(main, rest) + a b, with a [ROWS, KEYS] rounded to b's dtype."""
    a = a.to(b_main.dtype)
    main = tl.dot(a, b_main, main, input_precision="ieee")
    if REST > 0:
        rest = tl.dot(a, b_rest, rest, input_precision="ieee")
    return main, rest


@triton.jit
def _zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    if REST > 0:
        return tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    else:
        return tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit
def _place(T, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """(image, head, first token) of a program; blocks of a head are next to each other."""
    blocks = tl.cdiv(T, BLOCK)
    image_head = tl.program_id(0) // blocks
    return (image_head // HEADS).to(tl.int64), image_head % HEADS, (tl.program_id(0) % blocks) * BLOCK


@triton.jit
def _store_weighted(
    out_ptr,
    lse_ptr,
    rows,
    T,
    main,
    rest,
    largest,  # scaled scores, base 2
    total,  # of the weights
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """The weighted sums of v over the weights' total, and lse."""
    main /= total[:, None]
    if REST > 0:
        rest /= total[:, None]
    _store(out_ptr, HEADS * D, rows, T, main, rest, D, MAIN, REST)
    tl.store(lse_ptr + rows, (largest + tl.log2(total)) * LN_2, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _attention_fwd_kernel(
    qkv_ptr,  # [B, T, 3, HEADS, D]
    out_ptr,  # [B, T, HEADS, D]
    lse_ptr,  # [B, HEADS, T]
    batch_stride,  # of qkv, in units of 8 elements as the next
    token_stride,
    T,
    scale,  # log2(e) / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,  # all blocks of a program are within T
    BLOCKS: tl.constexpr,  # blocks of queries that a program walks where all keys are in one block, else 0
):
    token_stride *= 8  # the compiler sees that rows are aligned to 16 bytes and more
    b, h, first = _place(T, HEADS, BLOCK_M * max(BLOCKS, 1))
    q_ptr = qkv_ptr + b * batch_stride * 8 + h * D
    k_ptr = q_ptr + HEADS * D
    v_ptr = k_ptr + HEADS * D
    out_ptr += b * T * HEADS * D + h * D
    lse_ptr += (b * HEADS + h) * T
    if BLOCKS > 0:
        keys = tl.arange(0, BLOCK_N)
        k_main, k_rest = _load(k_ptr, token_stride, keys, T, D, MAIN, REST, FULL)
        v_main, v_rest = _load(v_ptr, token_stride, keys, T, D, MAIN, REST, FULL)
        # Addresses computed before the loop would take the registers of the scores.
        for i in tl.range(0, BLOCKS, disable_licm=True):
            rows = first + i * BLOCK_M + tl.arange(0, BLOCK_M)
            q_main, q_rest = _load(q_ptr, token_stride, rows, T, D, MAIN, REST, FULL)
            scores = _product(q_main, q_rest, k_main, k_rest, REST)
            if not FULL:
                scores = tl.where((keys < T)[None, :], scores, -float("inf"))
            largest = tl.max(scores, 1) * scale  # its rounding cancels: in the weights over their total, and in lse
            weights = tl.exp2(scores * scale - largest[:, None])
            total = tl.sum(weights, 1)
            o_main, o_rest = _zeros(BLOCK_M, MAIN, REST)
            o_main, o_rest = _add_product(o_main, o_rest, weights, v_main, v_rest, REST)
            _store_weighted(out_ptr, lse_ptr, rows, T, o_main, o_rest, largest, total, HEADS, D, MAIN, REST)
    else:
        rows = first + tl.arange(0, BLOCK_M)
        q_main, q_rest = _load(q_ptr, token_stride, rows, T, D, MAIN, REST, FULL)
        o_main, o_rest = _zeros(BLOCK_M, MAIN, REST)
        largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, T, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            k_main, k_rest = _load(k_ptr, token_stride, keys, T, D, MAIN, REST, FULL)
            scores = _product(q_main, q_rest, k_main, k_rest, REST)
            if not FULL:
                scores = tl.where((keys < T)[None, :], scores, -float("inf"))
            higher = tl.maximum(largest, tl.max(scores, 1) * scale)
            shrink = tl.exp2(largest - higher)
            weights = tl.exp2(scores * scale - higher[:, None])
            total = total * shrink + tl.sum(weights, 1)
            largest = higher
            o_main *= shrink[:, None]
            if REST > 0:
                o_rest *= shrink[:, None]
            v_main, v_rest = _load(v_ptr, token_stride, keys, T, D, MAIN, REST, FULL)
            o_main, o_rest = _add_product(o_main, o_rest, weights, v_main, v_rest, REST)
        _store_weighted(out_ptr, lse_ptr, rows, T, o_main, o_rest, largest, total, HEADS, D, MAIN, REST)


@triton.jit(do_not_specialize=["T"])
def _attention_delta_kernel(
    grad_ptr,  # [B, T, HEADS, D], as out
    out_ptr,
    delta_ptr,  # [B, HEADS, T]: sum over features of grad out
    T,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, h, first = _place(T, HEADS, BLOCK)
    rows = first + tl.arange(0, BLOCK)
    offset = b * T * HEADS * D + h * D
    grad_main, grad_rest = _load(grad_ptr + offset, HEADS * D, rows, T, D, MAIN, REST, False)
    out_main, out_rest = _load(out_ptr + offset, HEADS * D, rows, T, D, MAIN, REST, False)
    delta = tl.sum(grad_main.to(tl.float32) * out_main.to(tl.float32), 1)
    if REST > 0:
        delta += tl.sum(grad_rest.to(tl.float32) * out_rest.to(tl.float32), 1)
    tl.store(delta_ptr + (b * HEADS + h) * T + rows, delta, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _attention_bwd_keys_kernel(
    grad_ptr,  # [B, T, HEADS, D]
    qkv_ptr,  # [B, T, 3, HEADS, D]
    lse_ptr,  # [B, HEADS, T], as delta
    delta_ptr,
    grad_qkv_ptr,  # [B, T, 3, HEADS, D], contiguous; writes k and v
    batch_stride,  # of qkv, in units of 8 elements as the next
    token_stride,
    T,
    scale,  # 1 / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
):
    token_stride *= 8  # the compiler sees that rows are aligned to 16 bytes and more
    b, h, first = _place(T, HEADS, BLOCK_N)
    keys = first + tl.arange(0, BLOCK_N)
    q_ptr = qkv_ptr + b * batch_stride * 8 + h * D
    grad_ptr += b * T * HEADS * D + h * D
    numbers = (b * HEADS + h) * T
    k_main, k_rest = _load(q_ptr + HEADS * D, token_stride, keys, T, D, MAIN, REST, FULL)
    v_main, v_rest = _load(q_ptr + 2 * HEADS * D, token_stride, keys, T, D, MAIN, REST, FULL)
    grad_k_main, grad_k_rest = _zeros(BLOCK_N, MAIN, REST)
    grad_v_main, grad_v_rest = _zeros(BLOCK_N, MAIN, REST)
    for start in range(0, T, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_main, q_rest = _load(q_ptr, token_stride, rows, T, D, MAIN, REST, FULL)
        up_main, up_rest = _load(grad_ptr, HEADS * D, rows, T, D, MAIN, REST, FULL)
        # Past T the upstream and delta are 0, and lse = inf makes the weights 0.
        lse = tl.load(lse_ptr + numbers + rows, mask=rows < T, other=float("inf"))
        delta = tl.load(delta_ptr + numbers + rows, mask=rows < T, other=0.0)
        scores = _product(k_main, k_rest, q_main, q_rest, REST)  # [BLOCK_N, BLOCK_M]
        weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[None, :])
        grad_v_main, grad_v_rest = _add_product(grad_v_main, grad_v_rest, weights, up_main, up_rest, REST)
        slopes = weights * (_product(v_main, v_rest, up_main, up_rest, REST) - delta[None, :])
        grad_k_main, grad_k_rest = _add_product(grad_k_main, grad_k_rest, slopes, q_main, q_rest, REST)
    grad_k_ptr = grad_qkv_ptr + b * T * 3 * HEADS * D + (HEADS + h) * D
    _store(grad_k_ptr, 3 * HEADS * D, keys, T, grad_k_main * scale, grad_k_rest * scale, D, MAIN, REST)
    _store(grad_k_ptr + HEADS * D, 3 * HEADS * D, keys, T, grad_v_main, grad_v_rest, D, MAIN, REST)


@triton.jit(do_not_specialize=["T"])
def _attention_bwd_queries_kernel(
    grad_ptr,  # [B, T, HEADS, D]
    qkv_ptr,  # [B, T, 3, HEADS, D]
    lse_ptr,  # [B, HEADS, T], as delta
    delta_ptr,
    grad_qkv_ptr,  # [B, T, 3, HEADS, D], contiguous; writes q
    batch_stride,  # of qkv, in units of 8 elements as the next
    token_stride,
    T,
    scale,  # 1 / sqrt(D)
    HEADS: tl.constexpr,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
):
    token_stride *= 8  # the compiler sees that rows are aligned to 16 bytes and more
    b, h, first = _place(T, HEADS, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + b * batch_stride * 8 + h * D
    k_ptr = q_ptr + HEADS * D
    numbers = (b * HEADS + h) * T
    q_main, q_rest = _load(q_ptr, token_stride, rows, T, D, MAIN, REST, FULL)
    up_main, up_rest = _load(grad_ptr + b * T * HEADS * D + h * D, HEADS * D, rows, T, D, MAIN, REST, FULL)
    lse = tl.load(lse_ptr + numbers + rows, mask=rows < T, other=float("inf"))
    delta = tl.load(delta_ptr + numbers + rows, mask=rows < T, other=0.0)
    grad_main, grad_rest = _zeros(BLOCK_M, MAIN, REST)
    for start in range(0, T, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_main, k_rest = _load(k_ptr, token_stride, keys, T, D, MAIN, REST, FULL)
        v_main, v_rest = _load(k_ptr + HEADS * D, token_stride, keys, T, D, MAIN, REST, FULL)
        # Keys past T are 0, so that their slopes add nothing.
        weights = tl.exp2(_product(q_main, q_rest, k_main, k_rest, REST) * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
        if not FULL:
            weights = tl.where((keys < T)[None, :], weights, 0.0)  # e^-lse may overflow
        slopes = weights * (_product(up_main, up_rest, v_main, v_rest, REST) - delta[:, None])
        grad_main, grad_rest = _add_product(grad_main, grad_rest, slopes, k_main, k_rest, REST)
    grad_q_ptr = grad_qkv_ptr + b * T * 3 * HEADS * D + h * D
    _store(grad_q_ptr, 3 * HEADS * D, rows, T, grad_main * scale, grad_rest * scale, D, MAIN, REST)


def _readable(qkv: Tensor) -> Tensor:
    """qkv itself where rows of a head can be read 16 bytes at a time, else a copy."""
    wide = qkv.stride(2) == 1 and qkv.stride(0) % 8 == 0 and qkv.stride(1) % 8 == 0 and qkv.data_ptr() % 16 == 0
    near = qkv.stride(1) * qkv.shape[1] < 2**31  # offsets inside an image have 32 bits
    return qkv if wide and near else qkv.clone(memory_format=torch.contiguous_format)


def _bits(value: Tensor) -> int:
    return 8 * value.element_size()


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """qkv [B, T, 3 H d] of 16 or 32 bits and any strides -> out [B, T, H d], lse [B, H, T] float32.

    d is a multiple of 8 up to 128. All tensors are on one device; the arguments are the caller's to check.
    """
    B, T, width = qkv.shape
    d = width // (3 * heads)
    out = torch.empty((B, T, heads * d), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, heads, T), dtype=torch.float32, device=qkv.device)
    if B == 0:
        return out, lse
    qkv = _readable(qkv)
    main, rest = parts(d)
    sizes = forward_sizes(d, T, _bits(qkv), B * heads, multiprocessors(qkv.device))
    queries = sizes.queries * max(sizes.blocks, 1)
    with torch.cuda.device_of(qkv):
        _attention_fwd_kernel[(B * heads * -(-T // queries),)](
            qkv,
            out,
            lse,
            qkv.stride(0) // 8,
            qkv.stride(1) // 8,
            T,
            LOG2_E.value * d**-0.5,
            HEADS=heads,
            D=d,
            MAIN=main,
            REST=rest,
            BLOCK_M=sizes.queries,
            BLOCK_N=sizes.keys,
            FULL=T % queries == 0 and T % sizes.keys == 0,
            BLOCKS=sizes.blocks,
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
    return out, lse


def attention_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    """Gradient of sum(grad out) to qkv, [B, T, 3 H d], contiguous, in qkv's dtype."""
    B, T, width = qkv.shape
    d = width // (3 * heads)
    grad_qkv = torch.empty((B, T, width), dtype=qkv.dtype, device=qkv.device)
    if B == 0:
        return grad_qkv
    delta = torch.empty((B, heads, T), dtype=torch.float32, device=qkv.device)
    grad, qkv, lse = _readable(grad).contiguous(), _readable(qkv), lse.contiguous()
    main, rest = parts(d)
    arguments = (grad, qkv, lse, delta, grad_qkv, qkv.stride(0) // 8, qkv.stride(1) // 8, T, d**-0.5)
    shape = {"HEADS": heads, "D": d, "MAIN": main, "REST": rest}
    with torch.cuda.device_of(qkv):
        _attention_delta_kernel[(B * heads * -(-T // DELTA_TOKENS),)](
            grad, out.contiguous(), delta, T, **shape, BLOCK=DELTA_TOKENS, num_warps=DELTA_WARPS
        )
        keys, queries = key_sizes(d, _bits(qkv)), query_sizes(d, _bits(qkv))
        for kernel, sizes, block in (
            (_attention_bwd_keys_kernel, keys, keys.keys),
            (_attention_bwd_queries_kernel, queries, queries.queries),
        ):
            kernel[(B * heads * -(-T // block),)](
                *arguments,
                **shape,
                BLOCK_M=sizes.queries,
                BLOCK_N=sizes.keys,
                FULL=T % sizes.queries == 0 and T % sizes.keys == 0,
                num_warps=sizes.warps,
                num_stages=sizes.stages,
            )
    return grad_qkv
