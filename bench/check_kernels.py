"""Every CUDA and Triton kernel once on small, odd shapes, beside the CPU; alone or under compute-sanitizer.

    python bench/check_kernels.py [--jobs 8] [--repeat 100] [--ptxas toolkit]
    compute-sanitizer --tool memcheck python bench/check_kernels.py
    compute-sanitizer --tool racecheck python bench/check_kernels.py --small

``--repeat 100`` launches each op that often and expects bitwise identical results. ``--ptxas toolkit`` assembles Triton's
kernels with the assembler of nvcc's toolkit instead of Triton's own: right with one and wrong with the other is a fault of the
assembler. Some sizes of the attention are picked at random; ``--seed`` picks them again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.ops import dispatch

#: (what it is, the op, its arguments, the unit of its errors)
Call = tuple[str, str, tuple[Any, ...], float]
#: A process makes the calls of a whole group.
Group = Callable[[], Iterator[Call]]
FLOATS = (torch.float32, torch.bfloat16)
#: Aligned rows, odd rows, a single element.
SHAPES = ((2, 1024), (3, 37), (1, 1))
#: (M, D) of the MMD: resident and split, every pair and products; aligned and odd.
MMD_SIZES = ((1, 5), (4, 37), (4, 4096), (4, 40000), (8, 64), (12, 70), (40, 128))
#: (N, M, D) of the energy score: a line, drawn and given, odd.
SCORES = ((4, 1, 1), (8, 3, 128), (2, 1, 16), (5, 3, 37), (50, 1, 1), (16, 1, 1))
#: (rows, tokens, features), (rows, tokens, heads, head size), with one block of keys and with several.
TOKENS = ((2, 5, 37), (2, 64, 1152))
ATTENTION = ((2, 37, 2, 8), (2, 256, 16, 72), (16, 256, 16, 72), (1, 300, 2, 64))


def random_attention(seed: int, count: int = 4) -> tuple[tuple[int, int, int, int], ...]:
    """Sizes (rows, tokens, heads, head size) of a seed, every other of whole blocks of tokens."""
    pick = random.Random(seed)
    tokens = [16 * pick.randint(1, 32) if i % 2 else pick.randint(1, 400) for i in range(count)]
    return tuple((pick.randint(1, 3), T, pick.randint(1, 4), 8 * pick.randint(1, 16)) for T in tokens)


def steps(shape: tuple[int, int], dtype: torch.dtype) -> Iterator[Call]:
    """flow_step with its backward, and the step of sampling; with guidance and noise, and with neither."""
    x, g, g_uncond = (torch.randn(shape).to(dtype) for _ in range(3))
    c_skip, c_out, guidance, c_noise, c_in = (torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(5))
    seeds, eps, what = torch.arange(shape[0]) + 2**40, torch.finfo(dtype).eps, f"{shape} {dtype}"
    given = (x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, 3)
    plain = (x, g, c_skip, c_out, None, None, None, None, 0)
    yield f"imm::flow_step {what}", "flow_step", given, eps
    yield f"imm::flow_step alone {what}", "flow_step", plain, eps
    yield f"imm::flow_step out= {what}", "flow_step.out", (*given, {"out": torch.empty_like(x)}), eps
    yield f"imm::flow_step_bwd {what}", "flow_step_bwd", given[:6], eps
    yield f"imm::sampling_step {what}", "sampling_step", (*given, c_in, 2), 2 * eps


def noises(shape: tuple[int, int]) -> Iterator[Call]:
    given, eps = (torch.arange(shape[0]) + 2**40, shape[1], 3), torch.finfo(torch.float32).eps
    yield f"imm::noise {shape}", "noise", given, eps
    yield f"imm::noise out= {shape}", "noise.out", (*given, {"out": torch.empty(shape)}), eps


def mmds(M: int, D: int, dtype: torch.dtype, G: int = 3, gram: bool = True) -> Iterator[Call]:
    """Every MMD op at one size."""
    eps, what = torch.finfo(dtype).eps, f"M={M} D={D} {dtype}"
    y_r = torch.randn(G, M, D)
    y_t = (y_r + 0.1 * torch.randn(G, M, D)).to(dtype)
    y_r, scale, weight, one = y_r.to(dtype), torch.rand(G) + 1.0, torch.rand(G), torch.ones(1)
    kernel = ("rbf", [0.5, 1.0], 1e-8)
    numbers = [torch.rand(G, dtype=torch.float64) for _ in range(4)]
    states = y_t.float(), y_r.float(), y_t, y_r
    slopes = torch.ops.imm.mmd_loss(y_t, y_r, scale, weight, *kernel, False)[1] if gram else torch.randn(G, M, 2 * M)
    yield f"imm::mmd_loss {what}", "mmd_loss", (y_t, y_r, scale, weight, *kernel, False), 4 * eps
    yield f"imm::mmd_loss_bwd {what}", "mmd_loss_bwd", (torch.ones(G), slopes, y_t, y_r, weight, False), 4 * eps
    yield f"imm::flow_map_mmd {what}", "flow_map_mmd", (*states, *numbers, scale, weight, one, *kernel, False), 4 * eps
    yield f"imm::flow_map_mmd_bwd {what}", "flow_map_mmd_bwd", (torch.rand(G), y_t, y_r, one), 4 * eps
    if gram:
        yield f"imm::mmd_gram {what}", "mmd_gram", (y_t, y_r, scale, *kernel), 4 * eps
        yield f"imm::mmd_gram_bwd {what}", "mmd_gram_bwd", (torch.randn(G, M, M), y_t, y_r, scale, *kernel), 4 * eps


def energy_scores(N: int, M: int, D: int, dtype: torch.dtype, G: int = 3, kernel: str = "energy") -> Iterator[Call]:
    """The energy score with targets that are given and drawn; members apart as CRPS has them where D = 1."""
    eps, what = torch.finfo(dtype).eps, f"N={N} M={M} D={D} {dtype}"
    x, y = torch.randn(N, G, D).to(dtype).transpose(0, 1), torch.randn(M, G, D).to(dtype).transpose(0, 1)
    numbers = None, torch.rand(G), 1.0, float(N > 1), None, kernel, [1.0] if kernel == "energy" else [0.5, 1.0]
    unit = 4 * eps * D**0.5
    yield f"imm::energy_score {what}", "energy_score", (x, y, None, None, 0, *numbers), unit
    if D % 4 == 0:
        drawn = y[:, 0], -torch.rand(G, D).to(dtype), torch.tensor([2**40]), 5
        yield f"imm::energy_score drawn {what}", "energy_score", (x, *drawn, *numbers), max(unit, 1e-6)


def norms(B: int, T: int, C: int, dtype: torch.dtype, output: torch.dtype | None = None) -> Iterator[Call]:
    """The norms of a block with their backwards, whose sums over the tokens are as large as these are many."""
    eps, what = torch.finfo(dtype).eps, f"{(B, T, C)} {dtype}"
    x, y, up, up_z = (torch.randn(B, T, C).to(dtype) for _ in range(4))
    gate, shift, scale = (torch.randn(B, C).to(output or dtype) for _ in range(3))
    y, up = y.to(output or dtype), up.to(output or dtype)
    yield f"imm::adaln_modulate {what}", "adaln_modulate", (x, shift, scale, 1e-6), 4 * eps
    yield f"imm::adaln_modulate_bwd {what}", "adaln_modulate_bwd", (up, x, scale, 1e-6), T * eps
    yield f"imm::gated_residual_adaln {what}", "gated_residual_adaln", (x, y, gate, shift, scale, 1e-6), 4 * eps
    tangents = (x.flip(0), scale.flip(1), shift.flip(1))
    yield f"imm::adaln_modulate_jvp {what}", "adaln_modulate_jvp", (x, shift, scale, 1e-6, *tangents), 8 * eps
    given = (x, y, gate, shift, scale, 1e-6, x.flip(0), y.flip(0), gate.flip(1), *tangents[1:])
    yield f"imm::gated_residual_adaln_jvp {what}", "gated_residual_adaln_jvp", given, 8 * eps
    back = (up_z, up, x, y, gate, scale, 1e-6)
    yield f"imm::gated_residual_adaln_bwd {what}", "gated_residual_adaln_bwd", back, T * eps


def attentions(B: int, T: int, H: int, d: int, dtype: torch.dtype, backward: bool = True) -> Iterator[Call]:
    """Attention, forward and backward."""
    eps, what = torch.finfo(dtype).eps, f"{(B, T, H, d)} {dtype}"
    qkv = torch.randn(B, T, 3 * H * d).to(dtype)
    yield f"imm::timestep_attention {what}", "timestep_attention", (qkv, H), 4 * eps
    if not backward:
        return
    yield f"imm::timestep_attention_jvp {what}", "timestep_attention_jvp", (qkv, H, qkv.flip(1)), 16 * eps
    up, (out, lse) = torch.randn(B, T, H * d).to(dtype), torch.ops.imm.timestep_attention(qkv, H)
    yield f"imm::timestep_attention_bwd {what}", "timestep_attention_bwd", (up, qkv, out, lse, H), 8 * eps


def embeddings(dtype: torch.dtype) -> Iterator[Call]:
    given = (*(1000 * torch.rand(2, 3, dtype=torch.float64)), 256, 10000.0, dtype)
    yield f"imm::timestep_embedding {dtype}", "timestep_embedding", given, torch.finfo(dtype).eps
    along = torch.rand(2, 3, dtype=torch.float64)
    yield f"imm::timestep_embedding_jvp {dtype}", "timestep_embedding_jvp", (*given, *along), torch.finfo(dtype).eps


def checked(seed: int | None) -> list[Group]:
    """Small, odd sizes, and some of the attention at random; without a seed the smallest that take every kernel, where 8208 is
    as 40000: more features than one program's."""
    sizes = (SHAPES, MMD_SIZES, TOKENS, (*ATTENTION, *random_attention(seed or 0)), SCORES)
    if seed is None:
        sizes = (SHAPES[1:2], ((4, 37), (4, 8208), (12, 70)), TOKENS[:1], ATTENTION[:1], SCORES[:2])
    groups = [(steps, (shape,)) for shape in sizes[0]] + [(mmds, size) for size in sizes[1]]
    groups += [(norms, size) for size in sizes[2]] + [(attentions, size) for size in sizes[3]] + [(embeddings, ())]
    groups += [(energy_scores, size) for size in sizes[4]]
    of_dtype: list[Group] = [partial(make, *size, dtype) for make, size in reversed(groups) for dtype in FLOATS]
    return [*of_dtype, *(partial(noises, shape) for shape in sizes[0])]


def shipped(quick: bool) -> list[Group]:
    """Aligned sizes: whatever a launcher chooses by shape and dtype is among them; quick: a few of each kernel."""
    halves, single = (torch.bfloat16, torch.float16), torch.float32
    every = (single, *halves)
    # Resident: up to four blocks of features, of however few groups.
    sizes = [(2, M, D) for M in range(1, 9) for D in (1024, 2048)] + [(1, M, 65536) for M in range(1, 9)]
    sizes += [(1, M, 1024) for M in (16, 32, 64, 128, 256)]
    heads = [(72, 256), *itertools.product((64, 72, 80, 128), (256, 1024)), (64, 250), (40, 256), (96, 256), (8, 16), (72, 300)]
    # Rows of two heads, with which a program of the forward walks some blocks of queries, or all.
    walked = [*itertools.product((8, 24, 40, 56, 64, 72), (250, 256)), (80, 256), (64, 128), (72, 100), (72, 130)]
    walks = [(B, *size, dtype) for B in (40, 128) for size in walked for dtype in halves]
    if quick:
        sizes, heads = [(2, 4, 4096), (1, 4, 65536), (1, 64, 1024)], [(72, 256)]
        walks = [(B, 72, 256, torch.bfloat16) for B in (40, 128)]
    # Rows rounded up to powers of two, and all that N * D of the registers allows.
    ensembles = [(1 << n, 1 << d) for d in range(10) for n in range(13 - d)]
    ensembles += [(2, 90), (4, 90), (50, 1)]
    lines = [(N, 1) for N in range(1, 17)]
    if quick:
        ensembles, lines = [(8, 128), (2, 16)], [(8, 1)]
    pairs = ((single, None), (torch.bfloat16, None), (single, torch.bfloat16))
    return [
        *(partial(attentions, 1, T, 2, d, dtype) for d, T in heads for dtype in (every[1:2] if quick else every)),
        *(partial(attentions, B, T, 2, d, dtype, backward=False) for B, d, T, dtype in walks),
        *(partial(mmds, M, D, dtype, G=G, gram=M == 64) for G, M, D in sizes for dtype in every[: 2 if quick else 3]),
        *(partial(energy_scores, N, 2, D, dtype, G=64) for N, D in ensembles for dtype in every[: 2 if quick else 3]),
        *(partial(energy_scores, N, 1, D, dtype, G=4096) for N, D in lines for dtype in every[: 2 if quick else 3]),
        *(
            partial(energy_scores, N, 2, D, single, 64, kernel)
            for N, D in ensembles[3::5]
            for kernel in ("laplace", "rbf", "imq")
        ),
        *(partial(norms, 2, 64, C, *dtypes) for C in ((384, 1152)[quick:]) for dtypes in pairs[quick:]),
        *(partial(steps, SHAPES[0], dtype) for dtype in (FLOATS if quick else (*every, torch.float64))),
        partial(noises, SHAPES[0]),
        *(partial(embeddings, dtype) for dtype in FLOATS),
    ]


def on(device: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies there."""
    move = lambda v: v.to(device, copy=True) if isinstance(v, Tensor) else v
    return tuple({k: move(v) for k, v in value.items()} if isinstance(value, dict) else move(value) for value in values)


def run(function: Callable[..., Any], given: tuple[Any, ...]) -> list[Tensor]:
    """The results, of an out= form those that were given last."""
    *rest, last = given
    if isinstance(last, dict):
        function(*rest, **last)
        return list(last.values())
    results = function(*given)
    return [results] if isinstance(results, Tensor) else list(results)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal to the bit, a NaN like any other number."""
    return a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(
    name: str, function: Callable[..., Any], given: tuple[Any, ...], right: list[Tensor], eps: float, repeat: int
) -> bool:
    """Run on CUDA, ``repeat`` times, and compare; prints a line."""
    try:
        results = [[r.clone() for r in run(function, on("cuda", given))] for _ in range(repeat)]
        pairs = list(zip(results[0], right, strict=True))
        errors = [float((a.cpu().double() - b.double()).abs().max()) for a, b in pairs if b.numel()]
        other = sum(not all(map(same_bits, results[0], again)) for again in results[1:])
    except Exception as error:
        print(f"{name}: FAILED: {type(error).__name__}: {error}")
        return False
    good = all(error <= 16 * eps for error in errors) and not other
    launches = f", other bits in {other} of {repeat} launches" if other else ""
    print(f"{name}: {'ok' if good else 'WRONG'}, largest error {max(errors):.1e}{launches}")
    return good


def run_part(groups: Sequence[Group], repeat: int = 1) -> int:
    """Check each op as it is called, and by Triton where that has another kernel; 1 where a check fails."""
    good = True
    for make in groups:
        torch.manual_seed(0)
        for name, op, given, eps in make():
            packet, _, overload = op.partition(".")
            function = getattr(getattr(torch.ops.imm, packet), overload or "default")
            right = [r.clone() for r in run(function, on("cpu", given))]
            good &= check(name, function, given, right, eps, repeat)
            rows = {row.name: row.run for row in dispatch._TABLE[op]}
            if {"cuda", "triton"} <= rows.keys():
                good &= check(name.replace("imm::", "triton "), rows["triton"], given, right, eps, repeat)
            if not good:
                try:  # after an illegal access nothing in this process would
                    torch.cuda.synchronize()
                except RuntimeError:
                    print("the device does not answer any more; what follows in this process is not checked")
                    return 1
    return 0 if good else 1


def use_ptxas(path: str) -> str:
    """Make Triton assemble with a ptxas, "toolkit" (that of nvcc, which may be a wrapper elsewhere) or a path; its version.
    Triton's cache tells them apart by that. Raises OSError where there is none."""
    if path == "toolkit":
        said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
        root = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        path = str(Path(root[1].strip() if root else "no toolkit", "bin", "ptxas").resolve())
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release .*", said)
    if not version:  # Triton would take its own without a word
        raise FileNotFoundError(f"--ptxas: expected an assembler that names its release, got {path}")
    os.environ["TRITON_PTXAS_PATH"] = path
    return version[0]


def share(jobs: int, *options: str) -> int:
    """The checks in so many processes, whose output comes in their order."""
    parts = [[sys.executable, __file__, *options, "--part", str(i), "--jobs", str(jobs)] for i in range(jobs)]
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
            given = [f"--seed={options.seed}", f"--repeat={options.repeat}", *["--small"] * options.small]
            return share(options.jobs, *given)
    groups = checked(None if options.small else options.seed)
    return run_part(groups[options.part or 0 :: options.jobs], options.repeat)


if __name__ == "__main__":
    sys.exit(main())
