"""The training step as a benchmark: every form is right, call after call; parts, counts, memory; a wrong loss is refused."""

from __future__ import annotations

import dataclasses
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


@functools.cache
def tiny() -> UNet:
    return random_convolutions(lambda: UNet(channels=3, resolution=16, num_classes=5, width=4, multipliers=(1,)))


def training(particles: int = 2, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> steps.Training:
    return steps.Training(tiny, Preset("UNet", {}), particles, optimizer, dtype, ("conv_in.weight", "conv_out.weight"))


def batch(images: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(images, 3, 16, 16) * 0.5, torch.arange(images) % 5


def right(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], accepted: Any = (1e-4, 1e-3, 1e-3)) -> bool:
    return all(error <= most for error, most in zip(measure.errors(found, truth), accepted, strict=True))


@pytest.mark.parametrize("make", [steps.trainer_step, steps.plain_step])
def test_every_call_gives_the_loss_and_gradients_of_the_first(make: Callable[..., Any]) -> None:
    """And sixteen bits are worse, within their tolerance."""
    for optimizer in ("adamw", "radam"):
        given, setup = batch(12), training(optimizer=optimizer)
        truth = steps.exact_outputs(setup, *given)  # six groups: in two parts
        step = make(setup, *given)
        outputs = [tuple(value.clone() for value in step()) for _ in range(3)]
        assert right(outputs[0], truth)
        assert all(torch.equal(a, b) for later in outputs[1:] for a, b in zip(outputs[0], later, strict=True))
    rounded = make(training(dtype=torch.bfloat16), *given)()
    assert right(rounded, truth, (1e-2, 5e-2, 5e-2))
    assert not right(rounded, truth)


def test_a_wrong_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = load("objective").case("UNet", 8, 4, CPU, compiled=False)
    given = declared.inputs()
    truth = declared.truth(*given)
    original = steps.plain_mmd
    monkeypatch.setattr(steps, "plain_mmd", lambda y_t, y_r, scale: original(y_t, y_r, 1.01 * scale))
    for name, refused in (("plain eager step", True), ("imm.training.Trainer", False)):
        found = measure.errors(declared.peers[name](*given)(), truth)
        assert ("refused: wrong" in str(measure.refusal(declared, name, found))) == refused


def test_a_step_of_meanflow_is_right_by_tangent_and_by_difference() -> None:
    setup = dataclasses.replace(training(), preset=Preset("UNet", {}, {"time_scale": 1.0}))
    given, half = batch(4), {"loss": "meanflow", "fm_share": 0.5}
    truth = steps.exact_bare_step(setup, *given, **half)
    for derivative in ("jvp", "difference"):
        step = steps.bare_step(setup, *given, derivative=derivative, **half)
        outputs = [tuple(value.clone() for value in step()) for _ in range(2)]
        assert all(right(found, truth) for found in outputs)
    assert not right(steps.bare_step(setup, *given, loss="meanflow", fm_share=1.0)(), truth)


def test_memory_of_a_step_does_not_grow_with_the_particles() -> None:
    peak = lambda step, particles: peak_bytes(functools.partial(step, training(particles)), batch(32), CPU)
    (few, many), (plain_few, plain_many) = ([peak(step, m) for m in (4, 16)] for step in (steps.trainer_step, steps.plain_step))
    assert many <= 1.01 * few
    assert plain_many > max(many, 1.1 * plain_few)


def test_counts_of_convolutions() -> None:
    """The published figure of DDPM++."""
    assert work_of(DDPMpp).flops == pytest.approx(42.4e9, rel=0.01)
