"""Every CUDA and Triton kernel once on small, odd shapes, beside the CPU; alone or under compute-sanitizer.

compute-sanitizer --tool memcheck python bench/check_kernels.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import imm.ops  # noqa: F401  (registers torch.ops.imm)

#: Aligned rows, odd rows, a single element.
SHAPES = ((2, 1024), (3, 37), (1, 1))


def arguments(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    x, g, g_uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    c_skip, c_out, guidance, c_noise = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(4))
    return x, g, c_skip, c_out, g_uncond, guidance, c_noise, torch.arange(shape[0]) + 2**40, 3


def on(device: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)


def check(name: str, run: Callable[..., Any], given: tuple[Any, ...], right: Any, eps: float) -> bool:
    """Run on CUDA and compare; prints a line."""
    try:
        results = run(*on("cuda", given))
        pairs = [(results, right)] if isinstance(right, Tensor) else list(zip(results, right, strict=True))
        errors = [float((a.cpu().double() - b.double()).abs().max()) for a, b in pairs if b.numel()]
    except Exception as error:
        print(f"{name}: FAILED: {type(error).__name__}: {error}")
        return False
    good = all(error <= 16 * eps for error in errors)
    print(f"{name}: {'ok' if good else 'WRONG'}, largest error {max(errors):.1e}")
    return good


def flow_step_in_place(x: Tensor, *rest: Any) -> Tensor:
    x = x.clone()
    torch.ops.imm.flow_step.out(x, *rest, out=x)
    return x


def noise_into(seeds: Tensor, numel: int, step: int) -> Tensor:
    out = torch.empty(len(seeds), numel, device=seeds.device)
    torch.ops.imm.noise.out(seeds, numel, step, out=out)
    return out


def mmd_arguments(M: int, D: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """y_t, y_r, scale, weight, and what follows them in the schemas."""
    y_r = torch.randn(3, M, D)
    y_t = y_r + 0.1 * torch.randn(3, M, D)
    return y_t.to(dtype), y_r.to(dtype), torch.rand(3) + 1.0, torch.rand(3), "rbf", [0.5, 1.0], 1e-8


def check_mmd(M: int, D: int, dtype: torch.dtype) -> bool:
    """Every MMD op at one size."""
    ops, eps = torch.ops.imm, torch.finfo(dtype).eps
    y_t, y_r, scale, weight, *kernel = mmd_arguments(M, D, dtype)
    one = torch.ones(1)
    numbers = [torch.rand(3, dtype=torch.float64) for _ in range(4)]
    slopes = ops.mmd_loss(y_t, y_r, scale, weight, *kernel, False)[1]
    gram_up = torch.randn(3, M, M)
    calls: tuple[tuple[str, Callable[..., Any], tuple[Any, ...]], ...] = (
        ("mmd_loss", lambda *a: ops.mmd_loss(*a)[0], (y_t, y_r, scale, weight, *kernel, False)),
        ("mmd_loss_bwd", ops.mmd_loss_bwd, (torch.ones(3), slopes, y_t, y_r, weight, False)),
        ("mmd_loss_grad", ops.mmd_loss_grad, (y_t, y_r, scale, weight, one, *kernel, False)),
        ("flow_map_mmd", ops.flow_map_mmd, (y_t.float(), y_r.float(), y_t, y_r, *numbers, scale, weight, one, *kernel, False)),
        ("mmd_gram", ops.mmd_gram, (y_t, y_r, scale, *kernel)),
        ("mmd_gram_bwd", ops.mmd_gram_bwd, (gram_up, y_t, y_r, scale, *kernel)),
    )
    found = [check(f"imm::{name} M={M} D={D} {dtype}", run, given, run(*given), 4 * eps) for name, run, given in calls]
    return all(found)


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check")
        return 0
    from imm_kernels.flow_step import flow_step as triton_flow_step
    from imm_kernels.noise import noise as triton_noise

    ops, good = torch.ops.imm, True
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            given, eps = arguments(shape, dtype), torch.finfo(dtype).eps
            right = ops.flow_step(*given)
            for name, run in (
                ("imm::flow_step", ops.flow_step),
                ("imm::flow_step in place", flow_step_in_place),
                ("triton flow_step", triton_flow_step),
            ):
                good &= check(f"{name} {shape} {dtype}", run, given, right, eps)
            back = given[:6]
            good &= check(f"imm::flow_step_bwd {shape} {dtype}", ops.flow_step_bwd, back, ops.flow_step_bwd(*back), eps)
        seeds = (torch.arange(shape[0]) + 2**40, shape[1], 3)
        for name, run in (("imm::noise", ops.noise), ("imm::noise out=", noise_into), ("triton noise", triton_noise)):
            good &= check(f"{name} {shape}", run, seeds, ops.noise(*seeds), torch.finfo(torch.float32).eps)
    # Resident and split, every pair and products; aligned and odd.
    for M, D in ((1, 5), (4, 37), (4, 4096), (4, 40000), (8, 64), (12, 70), (40, 128)):
        for dtype in (torch.float32, torch.bfloat16):
            good &= check_mmd(M, D, dtype)
    torch.cuda.synchronize()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
