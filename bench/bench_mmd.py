"""mmd_loss on the CPU, forward and backward as a user calls it, beside eager broadcast and torch.compile of it.

Compulsory bytes: read y_t and y_r, write the gradient: 3 G M D elements; the copy of as many bytes is in the same run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imm.functional import mmd_loss

#: CIFAR-10 and ImageNet latents at M = 4.
SHAPES = [(256, 4, 3072), (512, 4, 4096)]


def broadcast(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Tensor:
    """The form found in training scripts."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        square = (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(1e-16)
        return torch.exp(-scale[:, None, None] * square.sqrt() / x.shape[2]).mean((1, 2))

    return mean_kernel(y_t, y_t) + mean_kernel(y_r, y_r) - 2 * mean_kernel(y_t, y_r)


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "imm": mmd_loss,
    "eager broadcast": broadcast,
    "compiled broadcast": torch.compile(broadcast),
}


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    y_r = torch.randn(shape)
    return (y_r + 0.1 * torch.randn(shape)).requires_grad_(), y_r, torch.full((shape[0],), shape[2] ** 0.5)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"G{s[0]}-M{s[1]}-D{s[2]}")
def test_loss_and_gradient(benchmark, shape, peer) -> None:
    y_t, y_r, scale = inputs(shape)

    def step() -> Tensor:
        y_t.grad = None
        loss = PEERS[peer](y_t, y_r, scale).mean()
        loss.backward()
        return loss

    exact = broadcast(y_t.detach().double(), y_r.double(), scale.double()).mean()
    assert float(step().detach()) == pytest.approx(float(exact), rel=1e-3)
    benchmark.group = f"mmd loss + gradient {shape}"
    benchmark.extra_info["bytes"] = 3 * 4 * y_t.numel()
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"G{s[0]}-M{s[1]}-D{s[2]}")
def test_copy_of_the_same_bytes(benchmark, shape) -> None:
    count = 3 * shape[0] * shape[1] * shape[2] // 2  # read and written: as many bytes as the floor
    source, target = torch.randn(count), torch.empty(count)
    benchmark.group = f"mmd loss + gradient {shape}"
    benchmark.extra_info["bytes"] = 8 * count
    benchmark.pedantic(target.copy_, (source,), rounds=7, warmup_rounds=2)
