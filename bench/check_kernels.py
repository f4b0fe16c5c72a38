"""Every CUDA and Triton kernel once on small, odd shapes, beside the CPU; alone or under compute-sanitizer.

    python bench/check_kernels.py [--jobs 8] [--repeat 100] [--ptxas toolkit]
    compute-sanitizer --tool memcheck python bench/check_kernels.py
    compute-sanitizer --tool racecheck python bench/check_kernels.py --small

With jobs, so many processes share the checks: most of the time goes to compiling Triton's kernels, which are then kept.
``--repeat 100`` launches each op that often and expects the same bits. ``--ptxas toolkit`` assembles Triton's kernels with the
assembler of nvcc's toolkit instead of Triton's own: right with one and wrong with the other is a fault of the assembler. Some
sizes of the attention are picked at random; ``--seed`` picks them again.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
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


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results of an op are equal to the bit, a NaN like any other number."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(
        x.shape == y.shape and torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in pairs
    )


def check(name: str, run: Callable[..., Any], given: tuple[Any, ...], right: Any, eps: float, repeat: int = 1) -> bool:
    """Run on CUDA, ``repeat`` times, and compare; prints a line."""
    try:
        given = on("cuda", given)
        results = run(*given)
        pairs = list(zip(tensors(results), tensors(right), strict=True))
        errors = [float((a.cpu().double() - b.double()).abs().max()) for a, b in pairs if b.numel()]
        other = sum(not same_bits(results, run(*given)) for _ in range(repeat - 1))
    except Exception as error:
        print(f"{name}: FAILED: {type(error).__name__}: {error}")
        return False
    good = all(error <= 16 * eps for error in errors) and not other
    launches = f", other bits in {other} of {repeat} launches" if other else ""
    print(f"{name}: {'ok' if good else 'WRONG'}, largest error {max(errors):.1e}{launches}")
    return good


def random_attention(seed: int, count: int = 4) -> tuple[tuple[int, int, int, int], ...]:
    """Sizes (rows, tokens, heads, head size) of a seed, every other of whole blocks of tokens."""
    pick = random.Random(seed)
    tokens = [16 * pick.randint(1, 32) if i % 2 else pick.randint(1, 400) for i in range(count)]
    return tuple((pick.randint(1, 3), T, pick.randint(1, 4), 8 * pick.randint(1, 16)) for T in tokens)


def toolkit_ptxas() -> Path:
    """The assembler of nvcc's toolkit, which may be elsewhere than the nvcc on the path. Raises OSError where there is none."""
    said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    root = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    path = Path(root[1].strip() if root else "", "bin", "ptxas").resolve()
    if not root or not path.is_file():
        raise FileNotFoundError(f"expected ptxas in nvcc's toolkit, got {path if root else said[:200]!r}")
    return path


def use_ptxas(which: str) -> str:
    """Make Triton assemble with a ptxas, "toolkit" or a path; its version. Triton's cache tells them apart by that."""
    path = toolkit_ptxas() if which == "toolkit" else Path(which)
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release .*", said)
    if not version:  # Triton would take its own without a word
        raise FileNotFoundError(f"--ptxas: expected an assembler that names its release, got {path}")
    os.environ["TRITON_PTXAS_PATH"] = str(path)
    return version[0]


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


def run_part(index: int, parts: int, sizes: dict[str, Any], repeat: int = 1) -> int:
    """Every ``parts``-th group from ``index``; 1 where a check fails."""
    good = True
    for make in list(groups(sizes))[index::parts]:
        torch.manual_seed(0)
        for one in make():
            good &= check(*one, repeat)
            if not good and not answers():
                print("the device does not answer any more; what follows in this process is not checked")
                return 1
    return 0 if good else 1


def share(jobs: int, small: bool, *options: str) -> int:
    """The checks in so many processes, whose output comes in their order."""
    command = [sys.executable, __file__, *(["--small"] if small else []), *options]
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
    parser.add_argument("--small", action="store_true", help="the smallest sizes that take every kernel, none at random")
    parser.add_argument("--repeat", type=int, default=1, help="launches of each op, whose bits have to be the same")
    parser.add_argument("--ptxas", help='the assembler of Triton\'s kernels: "toolkit" or a path')
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="of the sizes that are picked at random")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--part", type=int, help="of the jobs, the one that this process does")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to check")
        return 0
    if options.part is None:
        if options.ptxas:
            print(f"ptxas of --ptxas={options.ptxas}: {use_ptxas(options.ptxas)}")
        if not options.small:
            print(f"attention of --seed={options.seed}: {random_attention(options.seed)}")
        if options.jobs > 1:
            return share(options.jobs, options.small, f"--seed={options.seed}", f"--repeat={options.repeat}")
    sizes = SMALL if options.small else {**LARGE, "ATTENTION": (*ATTENTION, *random_attention(options.seed))}
    return run_part(options.part or 0, options.jobs, sizes, options.repeat)


if __name__ == "__main__":
    sys.exit(main())
