"""The training step as a benchmark: every form is right, call after call; parts, counts, memory; a wrong loss is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import measure, steps
from harness.case import load
from harness.measure import peak_bytes
from harness.networks import random_convolutions, work_of
from imm.networks import DDPMpp, UNet
from imm.presets import Preset

CPU = torch.device("cpu")
ACCEPTED = (1e-4, 1e-3, 1e-3)


@functools.cache
def tiny() -> UNet:
    return random_convolutions(lambda: UNet(channels=3, resolution=16, num_classes=5, width=4, multipliers=(1,)))


def training(particles: int = 2, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> steps.Training:
    watched = "conv_in.weight", "conv_out.weight"
    return steps.Training(tiny, Preset("UNet", {}), particles, optimizer, dtype, watched)


def batch(images: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(images, 3, 16, 16) * 0.5, torch.arange(images) % 5


def right(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], accepted: tuple[float, ...] = ACCEPTED) -> bool:
    errors = measure.errors(found, truth)
    return len(errors) == len(accepted) and all(error <= most for error, most in zip(errors, accepted, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
@pytest.mark.parametrize("make", [steps.trainer_step, steps.plain_step])
def test_every_call_gives_the_loss_and_gradients_of_the_first(make: Callable[..., Any], optimizer: str) -> None:
    given, setup = batch(12), training(optimizer=optimizer)
    truth = steps.exact_outputs(setup, *given)  # six groups: in two parts
    step = make(setup, *given)
    outputs = [tuple(value.clone() for value in step()) for _ in range(3)]
    assert right(outputs[0], truth)
    assert all(torch.equal(a, b) for later in outputs[1:] for a, b in zip(outputs[0], later, strict=True))


def test_sixteen_bits_are_worse_and_within_their_tolerance() -> None:
    given, setup = batch(8), training(dtype=torch.bfloat16)
    truth = steps.exact_outputs(setup, *given)
    for make in (steps.trainer_step, steps.plain_step):
        outputs = make(setup, *given)()
        assert right(outputs, truth, (1e-2, 5e-2, 5e-2))
        assert not right(outputs, truth)


def test_a_wrong_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = load("objective").case("UNet", 8, 4, CPU, compiled=False)
    given = declared.inputs()
    truth = declared.truth(*given)
    original = steps.plain_mmd
    monkeypatch.setattr(steps, "plain_mmd", lambda y_t, y_r, scale: original(y_t, y_r, 1.01 * scale))
    found = measure.errors(declared.peers["plain eager step"](*given)(), truth)
    assert "refused: wrong" in str(measure.refusal(declared, "plain eager step", found))
    found = measure.errors(declared.peers["imm.training.Trainer"](*given)(), truth)
    assert measure.refusal(declared, "imm.training.Trainer", found) is None


def test_memory_of_a_step_does_not_grow_with_the_particles() -> None:
    given = batch(32)
    ours = {m: peak_bytes(functools.partial(steps.trainer_step, training(m)), given, CPU) for m in (4, 16)}
    plain = {m: peak_bytes(functools.partial(steps.plain_step, training(m)), given, CPU) for m in (4, 16)}
    assert ours[16] <= 1.01 * ours[4]
    assert plain[16] > 1.1 * plain[4]
    assert ours[16] < plain[16]


def test_counts_of_convolutions() -> None:
    """The published figure of DDPM++."""
    assert work_of(DDPMpp).flops == pytest.approx(42.4e9, rel=0.01)
