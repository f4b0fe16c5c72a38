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
    torch.cuda.synchronize()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
