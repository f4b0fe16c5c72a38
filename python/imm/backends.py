"""What torch's backends may do while a result must be the same every time: algorithms, and the precision of products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

#: Of 16-bit matmuls on CUDA: whether partial sums may be rounded to 16 bits.
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextlib.contextmanager
def repeatable(*, tf32: bool) -> Iterator[None]:
    """Within: cuDNN's deterministic algorithms, 16-bit products summed in float32, and float32 ones in TF32 on CUDA or not.

    Float32 products on the CPU are float32 in either case. Everything is as it was afterwards. Precision is read and set by
    torch's present names (``fp32_precision``): to read an earlier one (``allow_tf32``) where a program has used those raises.
    """
    backends: Any = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    products = {matmul: tf32, cudnn.conv: tf32, backends.mkldnn.matmul: False, backends.mkldnn.conv: False}
    algorithms = cudnn.deterministic, cudnn.benchmark
    precisions = [of.fp32_precision for of in products]
    reductions = [getattr(matmul, name) for name in _REDUCTIONS]
    cudnn.deterministic, cudnn.benchmark = True, False
    for of, allowed in products.items():
        of.fp32_precision = "tf32" if allowed else "ieee"
    for name in _REDUCTIONS:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = algorithms
        for of, precision in zip(products, precisions, strict=True):
            of.fp32_precision = "none"  # as a general setting has it, if there is one
            if of.fp32_precision != precision:
                of.fp32_precision = precision
        for name, allowed in zip(_REDUCTIONS, reductions, strict=True):
            setattr(matmul, name, allowed)
