"""energy_score and crps: loss and gradient of ensembles, at the shapes of their users, beside the expression they publish."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.case import Case, call, compiled
from imm.ops import energy_score as ops

TESTS = {"test_energy_score.py": ""}
CUDA_TESTS = {"test_triton_energy_score.py": ""}

#: G, N, M, D; M < 0: -M targets that are drawn. Tokens of CALM, whose targets are drawn, and of EAR; 90 variables of a weather
#: model, one norm.
CPU_SHAPES = ((512, 8, -100, 128), (512, 8, 100, 128), (16384, 2, 1, 16), (4032, 4, 1, 90))
CUDA_SHAPES = ((8188, 8, -100, 128), (8188, 8, 100, 128), (16384, 2, 1, 16), (40320, 4, 1, 90))
#: Members and numbers of a weather model's CRPS, almost fair.
CPU_LINES, CUDA_LINES = ((8, 1 << 18), (2, 1 << 20)), ((2, 4_300_000), (4, 3_600_000), (8, 3_600_000), (50, 320_000))
ALPHA = 0.95
IMM, EAGER, COMPILED = "imm", "published expression, eager", "published expression, torch.compile"


def expression(x: Tensor, y: Tensor, log_std: Tensor | None, draws: int, factor: float, alpha: float) -> tuple[Tensor, Tensor]:
    """All differences of pairs in memory, the drawn targets too, and autograd."""
    x = x.detach().requires_grad_()
    G, N, D = x.shape
    if log_std is not None:
        y = y[:, None] + log_std.exp()[:, None] * torch.randn(G, draws, D, device=x.device, dtype=x.dtype)
    across = (x[:, :, None] - y[:, None]).norm(dim=3).mean((1, 2))
    within = (x[:, :, None] - x[:, None]).norm(dim=3).sum((1, 2))
    loss = factor * (2 * across - (N - 1 + alpha) / (N**2 * (N - 1)) * within)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


def case(G: int, N: int, M: int, D: int, device: torch.device) -> Case:
    """D = 1: the CRPS of x with G contiguous numbers a member, as crps has it."""
    draws, line = max(-M, 0), D == 1
    factor, alpha = (0.5, ALPHA) if line else (1.0, 1.0)

    def inputs() -> tuple[Any, ...]:
        normal = lambda *shape: torch.randn(*shape, device=device)
        x = normal(N, G).t().unsqueeze(2) if line else normal(G, N, D)
        seed = torch.randint(2**62, (1,), device=device)
        return (x, normal(G, D), 0.1 * normal(G, D), seed) if draws else (x, normal(G, M, D), None, None)

    def ours(x: Tensor, y: Tensor, log_std: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.ops.imm.energy_score(x, y, log_std, seed, draws, None, None, factor, alpha, None, "energy", [1.0])

    def exact(*given: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = (v.double() if v is not None and v.is_floating_point() else v for v in given)
        return ops.energy_score(*wide, draws, None, None, factor, alpha, None, "energy", [1.0])

    theirs = lambda x, y, log_std, seed: expression(x, y, log_std, draws, factor, alpha)
    pairs = N * abs(M) + N * (N - 1) // 2
    return Case(
        op="energy_score",
        mode="drawn" if draws else "crps" if line else "given",
        shape={"G": G, "N": N, "M": abs(M), "D": D},
        dtype=torch.float32,
        # Reads x and the targets, or their mean and deviation; writes the gradient and a loss a group.
        bytes=4 * G * (2 * N * D + (2 if draws else M) * D + 1),
        # A difference, a square and a sum a feature, then a multiply-add to the gradient.
        flops=5 * G * pairs * D,
        inputs=inputs,
        truth=exact,
        tolerances=(1e-5, 1e-5),
        peers={IMM: call(ours), EAGER: call(theirs), COMPILED: compiled(theirs)},
        late=(COMPILED,),
        rough={EAGER: 1.0, COMPILED: 1.0} if draws else {},  # its targets are other draws
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    shapes = [*(CUDA_SHAPES if cuda else CPU_SHAPES), *((G, N, 1, 1) for N, G in (CUDA_LINES if cuda else CPU_LINES))]
    for shape in shapes[:1] if quick else shapes:
        yield case(*shape, device)
