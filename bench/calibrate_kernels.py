"""The Triton kernel of bench/calibrate.py: reads a buffer many times, from L2 where it fits."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

BLOCK, NUM_WARPS = 4096, 8
#: Programs of a multiprocessor: 64 registers a thread.
PROGRAMS = 4


@triton.jit
def _read_kernel(x_ptr, sum_ptr, blocks, passes, BLOCK: tl.constexpr):
    """The sum, ``passes`` times, of what a program reads of x [blocks BLOCK], into sum [programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(passes):
        for place in range(program, blocks, programs):
            # Every pass reads other blocks than the one before, and .cg keeps them out of L1: L2 is what answers.
            block = (place + turn) % blocks
            total += tl.load(x_ptr + block * BLOCK + offsets, cache_modifier=".cg")
    tl.store(sum_ptr + program, tl.sum(total))


def read(x, sums, passes):
    """Read x [n BLOCK] float32 ``passes`` times; sums [programs] gets what each program added up."""
    _read_kernel[(len(sums),)](x, sums, x.numel() // BLOCK, passes, BLOCK=BLOCK, num_warps=NUM_WARPS)
