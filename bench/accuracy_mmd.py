"""Accuracy of the MMD loss and its gradient against float64, as a page: implementation, dtype, distance of the matched pairs.

    TRITON_INTERPRET=1 python bench/accuracy_mmd.py > docs/accuracy.md

Without a GPU the Triton kernels run in Triton's interpreter, whose arithmetic is float32 where the GPU has three TF32 products.
"""

from __future__ import annotations

import contextlib

import torch
from bench_mmd import gram
from torch import Tensor

from harness.case import words
from harness.losses import plain_mmd, trained_with
from imm.ops import dispatch, mmd

G, D = 2, 1024
APART = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
KERNEL = (None, None, "laplace", [1.0], 1e-8, False)
HEAD = f"""# Accuracy of the MMD loss

Made by `TRITON_INTERPRET=1 python bench/accuracy_mmd.py > docs/accuracy.md`; figures are not edited by hand.

Relative errors against float64 on the same rounded inputs: of the loss (the largest of the groups, over the largest loss), and
of the gradient (norm of the difference over the norm). Laplace kernel, {D} features, the exponent of independent particles near
1. "apart" is the distance of a matched pair (t_j, r_j) over that of independent particles: it is small when r is near t, and
the loss is then a small difference of numbers of size 1. A 16-bit gradient carries the rounding of its dtype, and particles
that round to the same number have no distance left: what is lost there was lost before the loss was called."""


def errors(found: tuple[Tensor, ...], y_t: Tensor, y_r: Tensor, scale: Tensor) -> str:
    """Of the loss and of the gradient, as a cell."""
    loss, grad = (v.double() for v in found)
    exact, right = mmd.mmd_loss_grad(y_t.double(), y_r.double(), scale.double(), *KERNEL)
    of_loss = (loss - exact).abs().max() / exact.abs().max()
    return f"{float(of_loss):.0e}, {float((grad - right).norm() / right.norm()):.0e}"


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.cuda.device_of = lambda tensor: contextlib.nullcontext()  # type: ignore[assignment,misc]
    # Triton's row takes tensors of the CPU in the interpreter alone, which it cannot tell.
    request = dispatch.Request(device, torch.float32, (G, 4, D))
    rows = {
        row.name: row.run
        for row in reversed(dispatch._TABLE["mmd_loss_grad"])
        if row.name == "triton" or not row.refuses(request)
    }
    runs = {name: lambda *given, run=run: run(*given, *KERNEL) for name, run in rows.items()}
    runs |= {
        "eager broadcast": lambda *given: trained_with(plain_mmd)(*given)(),
        "bmm Gram": lambda *given: trained_with(gram)(*given)(),
    }
    print(HEAD)
    for M in (4, 32):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            print(f"\n## {M} particles, {words(dtype)}: loss, gradient\n")
            print(f"| | {' | '.join(f'apart {apart:g}' for apart in APART)} |\n|---|{'---|' * len(APART)}")
            torch.manual_seed(0)
            base, noise = torch.randn(2, G, M, D, device=device)
            scale = torch.full((G,), D**0.5, device=device)
            for name, run in runs.items():
                inputs = [((base + apart * noise).to(dtype), base.to(dtype), scale) for apart in APART]
                print(f"| {name} | {' | '.join(errors(run(*given), *given) for given in inputs)} |")


if __name__ == "__main__":
    main()
