"""Settings of torch's backends that make results repeatable: algorithms, and the precision of matmuls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

#: The names of ``--precision`` -> the dtype of a network's arithmetic; None: float32, whose matmuls "tf32" rounds on CUDA.
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Of 16-bit matmuls on CUDA: whether partial sums may be rounded to 16 bits.
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextlib.contextmanager
def repeatable(*, tf32: bool) -> Iterator[None]:
    """Use cuDNN's deterministic algorithms, accumulate 16-bit matmuls in float32, and run float32 ones in TF32 on CUDA or not.

    Float32 products on the CPU are float32 in either case. Everything is as it was afterwards.

    torch has two names for the precision of products. To read the earlier one (``allow_tf32``) raises where a program has used
    the present one (``fp32_precision``), so precision is read by the present one. It is set by the earlier one, which sets
    both: torch.export reads the earlier one itself.
    """
    backends: Any = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    on_cuda, on_cpu = (matmul, cudnn.conv, cudnn.rnn), (backends.mkldnn.matmul, backends.mkldnn.conv)
    algorithms = cudnn.deterministic, cudnn.benchmark
    reductions = [getattr(matmul, name) for name in _REDUCTIONS]
    earlier = [(of, allowed) for of in (cudnn, matmul) if (allowed := _allows_tf32(of)) is not None]
    present = [(of, of.fp32_precision) for of in (*on_cuda, *on_cpu)]
    cudnn.deterministic, cudnn.benchmark = True, False
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    for of in (*on_cpu, *(() if tf32 else on_cuda)):
        if of.fp32_precision not in ("none", "ieee"):  # by a setting for all
            of.fp32_precision = "ieee"
    for name in _REDUCTIONS:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = algorithms
        for of, allowed in earlier:
            of.allow_tf32 = allowed
        for of, precision in present:
            if of.fp32_precision != precision:
                of.fp32_precision = "none"  # as a setting for all has it, if there is one
            if of.fp32_precision != precision:
                of.fp32_precision = precision
        for name, allowed in zip(_REDUCTIONS, reductions, strict=True):
            setattr(matmul, name, allowed)


@contextlib.contextmanager
def deterministic(*, tf32: bool) -> Iterator[None]:
    """As :func:`repeatable`, and use the deterministic algorithm of every op that has one."""
    utils: Any = torch.utils.deterministic  # its attributes are made by its class
    fills = utils.fill_uninitialized_memory
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may choose anew; read at its first product
    utils.fill_uninitialized_memory = False  # costs a pass over memory, and only hides reads of what was not written
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with repeatable(tf32=tf32):
            yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        utils.fill_uninitialized_memory = fills


def _allows_tf32(of: Any) -> bool | None:
    """The earlier name's value; None where the program has used the present one."""
    try:
        return bool(of.allow_tf32)
    except RuntimeError:
        return None
