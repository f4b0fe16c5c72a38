"""mmd_loss: the loss of each group and its gradient to y_t, beside the forms found in training scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from imm.benchmark.case import COPY, Case, Claim, Step
from imm.functional import mmd_loss
from imm.ops import mmd

#: CIFAR-10 and ImageNet latents at M = 4.
SHAPES = ((256, 4, 3072), (512, 4, 4096))
KERNEL, EPS = "laplace", 1e-8

OUT, USER, EAGER, COMPILED = "imm out=", "imm as a user calls it", "eager broadcast", "torch.compile of the broadcast"
CLAIMS = (
    Claim(OUT, COPY, at_most=1.3),
    Claim(COMPILED, OUT, at_least=2.5),
    Claim(EAGER, USER, at_least=20.0),
    Claim(COMPILED, USER, at_least=1.0),
)


def broadcast(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Tensor:
    """The form found in training scripts."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        square = (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(EPS**2)
        return torch.exp(-scale[:, None, None] * square.sqrt() / x.shape[2]).mean((1, 2))

    return mean_kernel(y_t, y_t) + mean_kernel(y_r, y_r) - 2 * mean_kernel(y_t, y_r)


def cdist(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Tensor:
    """The same with torch's own distances."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-scale[:, None, None] * torch.cdist(x, y).clamp_min(EPS) / x.shape[2]).mean((1, 2))

    return mean_kernel(y_t, y_t) + mean_kernel(y_r, y_r) - 2 * mean_kernel(y_t, y_r)


def trained_with(loss_of: Callable[..., Tensor]) -> Callable[..., Step]:
    """A peer as a training loop calls it: loss, backward, a fresh gradient each step."""

    def prepare(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Step:
        leaf = y_t.detach().requires_grad_()

        def step() -> tuple[Tensor, ...]:
            leaf.grad = None
            loss = loss_of(leaf, y_r, scale)
            loss.sum().backward()
            assert leaf.grad is not None
            return loss.detach(), leaf.grad

        return step

    return prepare


def compiled(*inputs: Tensor) -> Step:
    return trained_with(torch.compile(broadcast))(*inputs)


def preallocated(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Step:
    loss, grad = torch.empty(len(y_t), device=y_t.device), torch.empty_like(y_t)

    def step() -> tuple[Tensor, ...]:
        torch.ops.imm.mmd_loss_grad.out(y_t, y_r, scale, None, KERNEL, EPS, loss=loss, grad=grad)
        return loss, grad

    return step


def fresh(*inputs: Tensor) -> Step:
    return lambda: torch.ops.imm.mmd_loss_grad(*inputs, None, KERNEL, EPS)


def reference(*inputs: Tensor) -> Step:
    return lambda: mmd.mmd_loss_grad(*inputs, None, KERNEL, EPS)


def truth(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Autograd through the broadcast form in float64, some groups at a time for memory."""
    parts = [trained_with(broadcast)(*part)() for part in zip(*(v.double().split(64) for v in inputs), strict=True)]
    return torch.cat([loss for loss, _ in parts]), torch.cat([grad for _, grad in parts])


def case(G: int, M: int, D: int, device: torch.device) -> Case:
    def inputs() -> tuple[Any, ...]:
        y_r = torch.randn(G, M, D, device=device)
        return y_r + 0.1 * torch.randn_like(y_r), y_r, torch.full((G,), D**0.5, device=device)

    return Case(
        op="mmd",
        mode="loss + gradient",
        shape={"G": G, "M": M, "D": D},
        dtype=torch.float32,
        # I/O: read y_t, y_r [G, M, D] and scale [G]; write the gradient [G, M, D] and the loss [G].
        bytes=4 * (3 * G * M * D + 2 * G),
        # Pairs: M (M - 1) / 2 within each set and M^2 across. Distance: subtract, multiply, add per feature; the gradient has
        # as many pairs (M (M - 1) ordered ones within y_t) and the same three.
        flops=6 * G * D * (2 * M * M - M),
        inputs=inputs,
        truth=truth,
        # The loss is a small difference of means of size 1.
        tolerances=(1e-3, 1e-4),
        peers={
            OUT: preallocated,
            "imm": fresh,
            USER: trained_with(mmd_loss),
            COMPILED: compiled,
            "reference": reference,
            "torch.cdist": trained_with(cdist),
            EAGER: trained_with(broadcast),
        },
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape in SHAPES[:1] if quick else SHAPES:
        yield case(*shape, device)
