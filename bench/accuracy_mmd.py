"""Accuracy of the MMD loss and its gradient against float64, as a page: implementation, dtype, distance of the matched pairs.

    TRITON_INTERPRET=1 python bench/accuracy_mmd.py > docs/accuracy.md

Without a GPU the Triton kernels run in Triton's interpreter, whose arithmetic is float32 where the GPU has three TF32 products.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import torch
from bench_mmd import gram
from torch import Tensor

import imm.ops  # noqa: F401  (registers torch.ops.imm)
from imm.benchmark.losses import plain_mmd, trained_with
from imm.ops import mmd, native

G, D = 2, 1024
SETS = (4, 32)
APART = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL = ("laplace", [1.0], 1e-8, False)

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]

HEAD = """# Accuracy of the MMD loss

Made by `TRITON_INTERPRET=1 python bench/accuracy_mmd.py > docs/accuracy.md`; figures are not edited by hand.

Relative errors against float64 on the same rounded inputs: of the loss (the largest of the groups, over the largest loss), and
of the gradient (norm of the difference over the norm). Laplace kernel, {D} features, the exponent of independent particles near
1. "apart" is the distance of a matched pair (t_j, r_j) over that of independent particles: it is small when r is near t, and
the loss is then a small difference of numbers of size 1. A 16-bit gradient carries the rounding of its dtype, and particles
that round to the same number have no distance left: what is lost there was lost before the loss was called.
"""


def triton(*inputs: Tensor) -> tuple[Tensor, ...]:
    from imm_kernels import mmd as kernels

    return kernels.loss_and_gradient(*inputs, None, None, kernels.Kernel("laplace", (1.0,), 1e-8, False))


def implementations(device: torch.device) -> dict[str, Run]:
    """What this machine can run."""
    found: dict[str, Run] = {"reference": lambda *inputs: mmd.mmd_loss_grad(*inputs, None, None, *KERNEL)}
    if device.type == "cpu" and native.status() is None:
        found["cpu"] = lambda *inputs: torch.ops.imm.mmd_loss_grad(*inputs, None, None, *KERNEL)
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        found["triton"] = triton
    found["eager broadcast"] = lambda *inputs: trained_with(plain_mmd)(*inputs)()
    found["bmm Gram"] = lambda *inputs: trained_with(gram)(*inputs)()
    return found


def errors(run: Run, y_t: Tensor, y_r: Tensor, scale: Tensor) -> str:
    """Of the loss and of the gradient, as a cell."""
    loss, grad = (v.double() for v in run(y_t, y_r, scale))
    exact, right = mmd.mmd_loss_grad(y_t.double(), y_r.double(), scale.double(), None, None, *KERNEL)
    of_loss = (loss - exact).abs().max() / exact.abs().max()
    return f"{float(of_loss):.0e}, {float((grad - right).norm() / right.norm()):.0e}"


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment,misc]
    runs = implementations(device)
    print(HEAD.format(D=D), end="")
    for M in SETS:
        for dtype in DTYPES:
            print(f"\n## {M} particles, {str(dtype).removeprefix('torch.')}: loss, gradient\n")
            print(f"| | {' | '.join(f'apart {apart:g}' for apart in APART)} |")
            print(f"|---|{'---|' * len(APART)}")
            torch.manual_seed(0)
            base, noise = torch.randn(2, G, M, D, device=device)
            scale = torch.full((G,), D**0.5, device=device)
            for name, run in runs.items():
                cells = [errors(run, (base + apart * noise).to(dtype), base.to(dtype), scale) for apart in APART]
                print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
