"""Schedules against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from imm.schedules import SCHEDULES, get_schedule

TIMES = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_eta_and_log_snr_have_inverses(name) -> None:
    schedule = get_schedule(name)
    for value in (schedule.t_from_eta(schedule.eta(TIMES)), schedule.t_from_log_snr(schedule.log_snr(TIMES))):
        torch.testing.assert_close(value, TIMES, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(schedule.log_snr(TIMES), -2 * schedule.eta(TIMES).log(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_ends(name) -> None:
    schedule = get_schedule(name)
    assert float(schedule.alpha(0.0)) == 1.0
    assert float(schedule.sigma(0.0)) == 0.0
    assert float(schedule.eta(0.0)) == 0.0
    assert float(schedule.t_from_eta(0.0)) == 0.0
    assert float(schedule.t_from_eta(math.inf)) == 1.0
    assert float(schedule.log_snr(0.0)) == math.inf
    assert float(schedule.sigma(1.0)) == 1.0
    assert float(schedule.alpha(1.0)) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_derivative(name) -> None:
    schedule = get_schedule(name)
    t = TIMES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(schedule.log_snr_derivative(TIMES), derivative, rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_cross_does_not_cancel(name) -> None:
    schedule = get_schedule(name)
    naive = schedule.alpha(TIMES / 2) * schedule.sigma(TIMES) - schedule.sigma(TIMES / 2) * schedule.alpha(TIMES)
    torch.testing.assert_close(schedule.cross(TIMES / 2, TIMES), naive, rtol=1e-12, atol=1e-15)
    gap = 1e-9
    assert float(schedule.cross(0.9, 0.9 + gap)) == pytest.approx(gap * schedule.speed / 2, rel=1e-6)
    assert float(schedule.cross(0.3, 0.3)) == 0.0


def test_published_ends_of_eta() -> None:
    assert float(get_schedule("fm").eta(0.994)) == pytest.approx(165.667, abs=1e-3)
    assert float(get_schedule("vp_cosine").eta(0.996)) == pytest.approx(159.153, abs=1e-3)
    assert float(get_schedule("fm").eta(0.006)) == pytest.approx(0.0060362, abs=1e-7)


def test_everything_is_float64_whatever_comes_in() -> None:
    schedule = get_schedule("fm")
    for t in (0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.float16)):
        assert schedule.alpha(t).dtype == torch.float64


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"unknown schedule 'linear'; expected one of \['fm', 'vp_cosine'\]"):
        get_schedule("linear")
