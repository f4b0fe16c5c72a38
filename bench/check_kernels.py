"""Every CUDA and Triton kernel once on small, odd shapes, beside the CPU; alone or under compute-sanitizer.

    python bench/check_kernels.py [--jobs 8]
    compute-sanitizer --tool memcheck python bench/check_kernels.py
    compute-sanitizer --tool racecheck python bench/check_kernels.py --small

With jobs, so many processes share the checks: most of the time goes to compiling Triton's kernels, which are then kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import imm.ops  # noqa: F401  (registers torch.ops.imm)

#: Aligned rows, odd rows, a single element.
SHAPES = ((2, 1024), (3, 37), (1, 1))
#: (M, D) of the MMD: resident and split, every pair and products; aligned and odd.
MMD_SIZES = ((1, 5), (4, 37), (4, 4096), (4, 40000), (8, 64), (12, 70), (40, 128))
#: (rows, tokens, features), (rows, tokens, heads, head size), with one block of keys and with several.
TOKENS = ((2, 5, 37), (2, 64, 1152))
ATTENTION = ((2, 37, 2, 8), (2, 256, 16, 72), (1, 300, 2, 64))
#: Of these the smallest that take every kernel; 8208 as 40000 more features than one program's, in fewer of them.
SMALL = {"SHAPES": SHAPES[1:2], "MMD_SIZES": ((4, 37), (4, 8208), (12, 70)), "TOKENS": TOKENS[:1], "ATTENTION": ATTENTION[:1]}
LARGE = {"SHAPES": SHAPES, "MMD_SIZES": MMD_SIZES, "TOKENS": TOKENS, "ATTENTION": ATTENTION}

#: (name, the op or kernel, its arguments on the CPU, the right results, the unit of its errors)
Check = tuple[str, Callable[..., Any], tuple[Any, ...], Any, float]


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


def step_checks(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Check]:
    """flow_step with its backward, in place and in Triton, and the step of sampling."""
    from imm_kernels.flow_step import flow_step as triton_flow_step

    ops, eps = torch.ops.imm, torch.finfo(dtype).eps
    x, g, g_uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    c_skip, c_out, guidance, c_noise = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(4))
    given = (x, g, c_skip, c_out, g_uncond, guidance, c_noise, torch.arange(shape[0]) + 2**40, 3)
    right = ops.flow_step(*given)
    yield f"imm::flow_step {shape} {dtype}", ops.flow_step, given, right, eps
    yield f"imm::flow_step in place {shape} {dtype}", flow_step_in_place, given, right, eps
    yield f"triton flow_step {shape} {dtype}", triton_flow_step, given, right, eps
    yield f"imm::flow_step_bwd {shape} {dtype}", ops.flow_step_bwd, given[:6], ops.flow_step_bwd(*given[:6]), eps
    given = (*given, torch.rand(shape[0], dtype=torch.float64) + 0.5, 2)
    yield f"imm::sampling_step {shape} {dtype}", ops.sampling_step, given, ops.sampling_step(*given), 2 * eps


def noise_checks(shape: tuple[int, int]) -> Iterator[Check]:
    from imm_kernels.noise import noise as triton_noise

    seeds = (torch.arange(shape[0]) + 2**40, shape[1], 3)
    right, eps = torch.ops.imm.noise(*seeds), torch.finfo(torch.float32).eps
    for name, run in (("imm::noise", torch.ops.imm.noise), ("imm::noise out=", noise_into), ("triton noise", triton_noise)):
        yield f"{name} {shape}", run, seeds, right, eps


def mmd_checks(M: int, D: int, dtype: torch.dtype) -> Iterator[Check]:
    """Every MMD op at one size."""
    ops, eps = torch.ops.imm, torch.finfo(dtype).eps
    y_r = torch.randn(3, M, D)
    y_t = (y_r + 0.1 * torch.randn(3, M, D)).to(dtype)
    y_r, scale, weight, one = y_r.to(dtype), torch.rand(3) + 1.0, torch.rand(3), torch.ones(1)
    kernel = ("rbf", [0.5, 1.0], 1e-8)
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
    for name, run, given in calls:
        yield f"imm::{name} M={M} D={D} {dtype}", run, given, run(*given), 4 * eps


def adaln_checks(B: int, T: int, C: int, dtype: torch.dtype) -> Iterator[Check]:
    """The norms of a block with their backwards, whose sums over the tokens are as large as these are many."""
    ops, eps = torch.ops.imm, torch.finfo(dtype).eps
    x, y, up, up_z = (torch.randn(B, T, C).to(dtype) for _ in range(4))
    gate, shift, scale = (torch.randn(B, C).to(dtype) for _ in range(3))
    for name, given, unit in (
        ("adaln_modulate", (x, shift, scale, 1e-6), 4 * eps),
        ("adaln_modulate_bwd", (up, x, scale, 1e-6), T * eps),
        ("gated_residual_adaln", (x, y, gate, shift, scale, 1e-6), 4 * eps),
        ("gated_residual_adaln_bwd", (up_z, up, x, y, gate, scale, 1e-6), T * eps),
    ):
        run = getattr(ops, name)
        yield f"imm::{name} {(B, T, C)} {dtype}", run, given, run(*given), unit


def attention_checks(B: int, T: int, H: int, d: int, dtype: torch.dtype) -> Iterator[Check]:
    """Attention with and without norms of q and k, forward and backward."""
    ops, eps = torch.ops.imm, torch.finfo(dtype).eps
    qkv, up = torch.randn(B, T, 3 * H * d).to(dtype), torch.randn(B, T, H * d).to(dtype)
    for norms, words in (((None, None), ""), ((torch.rand(d).to(dtype), torch.rand(d).to(dtype)), " norm")):
        given = (qkv, H, *norms, 1e-6)
        out, lse = ops.timestep_attention(*given)
        name = f"{(B, T, H, d)}{words} {dtype}"
        yield f"imm::timestep_attention {name}", ops.timestep_attention, given, (out, lse), 4 * eps
        back = (up, qkv, out, lse, H, *norms, 1e-6)
        yield (
            f"imm::timestep_attention_bwd {name}",
            ops.timestep_attention_bwd,
            back,
            ops.timestep_attention_bwd(*back),
            8 * eps,
        )


def embedding_checks(dtype: torch.dtype) -> Iterator[Check]:
    t, s = 1000 * torch.rand(3, dtype=torch.float64), 1000 * torch.rand(3, dtype=torch.float64)
    given = (t, s, 256, 10000.0, dtype)
    run = torch.ops.imm.timestep_embedding
    yield f"imm::timestep_embedding {dtype}", run, given, run(*given), torch.finfo(dtype).eps


def groups(sizes: dict[str, Any]) -> Iterator[Callable[[], Iterator[Check]]]:
    """Groups of checks; a process takes whole ones."""
    dtypes = (torch.float32, torch.bfloat16)
    for size in sizes["ATTENTION"]:
        yield from (partial(attention_checks, *size, dtype) for dtype in dtypes)
    for size in sizes["MMD_SIZES"]:
        yield from (partial(mmd_checks, *size, dtype) for dtype in dtypes)
    for size in sizes["TOKENS"]:
        yield from (partial(adaln_checks, *size, dtype) for dtype in dtypes)
    for shape in sizes["SHAPES"]:
        yield from (partial(step_checks, shape, dtype) for dtype in dtypes)
        yield partial(noise_checks, shape)
    yield from (partial(embedding_checks, dtype) for dtype in dtypes)


def answers() -> bool:
    """Whether the device does: after an illegal access nothing in this process would."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_part(index: int, parts: int, sizes: dict[str, Any]) -> int:
    """Every ``parts``-th group from ``index``; 1 where a check fails."""
    good = True
    for make in list(groups(sizes))[index::parts]:
        torch.manual_seed(0)
        for one in make():
            good &= check(*one)
            if not good and not answers():
                print("the device does not answer any more; what follows in this process is not checked")
                return 1
    return 0 if good else 1


def share(jobs: int, small: bool) -> int:
    """The checks in so many processes, whose output comes in their order."""
    command = [sys.executable, __file__, *(["--small"] if small else [])]
    parts = [[*command, "--part", str(i), "--jobs", str(jobs)] for i in range(jobs)]
    running = [subprocess.Popen(part, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for part in parts]
    status = 0
    for process in running:
        text, _ = process.communicate()
        print(text, end="")
        if process.returncode not in (0, 1):
            last = text.strip().splitlines()[-1:] or ["its first check"]
            print(f"after {last[0].partition(': ')[0]}: FAILED: the process ended with {process.returncode}")
        status |= process.returncode != 0
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the smallest sizes that take every kernel")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--part", type=int, help="of the jobs, the one that this process does")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check")
        return 0
    if options.jobs > 1 and options.part is None:
        return share(options.jobs, options.small)
    return run_part(options.part or 0, options.jobs, SMALL if options.small else LARGE)


if __name__ == "__main__":
    sys.exit(main())
