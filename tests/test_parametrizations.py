"""Parametrizations are the DDIM step, read three ways (reference formulas of section C.5)."""

from __future__ import annotations

import pytest
import torch

from imm.parametrizations import PARAMETRIZATIONS, get_parametrization
from imm.schedules import SCHEDULES, Schedule, get_schedule

CASES = [(p, s) for p in PARAMETRIZATIONS for s in SCHEDULES if p != "euler_fm" or s == "fm"]
SIGMA_DATA = 0.5


def ddim(schedule: Schedule, x_t, x, s, t):
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return (schedule.alpha(s) - ratio * schedule.alpha(t)) * x + ratio * x_t


def pair(schedule: Schedule, t):
    x, eps = torch.randn(2, 64, dtype=torch.float64) * SIGMA_DATA
    return x, eps, schedule.alpha(t) * x + schedule.sigma(t) * eps


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_in_two_hops_is_one(name) -> None:
    schedule, (s, r, t) = get_schedule(name), (0.2, 0.5, 0.9)
    x, _, x_t = pair(schedule, t)
    two = ddim(schedule, ddim(schedule, x_t, x, r, t), x, s, r)
    torch.testing.assert_close(two, ddim(schedule, x_t, x, s, t), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "schedule_name"), CASES)
def test_the_regression_target_lands_on_x_s(name, schedule_name) -> None:
    """A network that gives the table's target maps x_t to alpha_s x + sigma_s eps."""
    schedule, (s, t) = get_schedule(schedule_name), (0.3, 0.8)
    parametrization = get_parametrization(name, schedule, SIGMA_DATA)
    x, eps, x_t = pair(schedule, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    target = {
        "identity": x,
        "simple_edm": (alpha * eps - sigma * x) / (SIGMA_DATA * (alpha**2 + sigma**2).sqrt()),
        "euler_fm": (eps - x) / SIGMA_DATA,
    }[name]
    x_s = parametrization.c_skip(s, t) * x_t + parametrization.c_out(s, t) * target
    torch.testing.assert_close(x_s, schedule.alpha(s) * x + schedule.sigma(s) * eps, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(x_s, ddim(schedule, x_t, x, s, t), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "schedule_name"), CASES)
def test_s_equal_t_is_the_identity_exactly(name, schedule_name) -> None:
    parametrization = get_parametrization(name, get_schedule(schedule_name))
    t = torch.tensor([0.0, 0.1, 0.5, 0.994], dtype=torch.float64)
    assert torch.equal(parametrization.c_skip(t, t), torch.ones(4, dtype=torch.float64))
    assert torch.equal(parametrization.c_out(t, t).abs(), torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize(("name", "schedule_name"), CASES)
def test_c_in_gives_unit_variance(name, schedule_name) -> None:
    schedule = get_schedule(schedule_name)
    t = torch.tensor([0.0, 0.4, 0.994], dtype=torch.float64)
    variance = SIGMA_DATA**2 * (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)
    c_in = get_parametrization(name, schedule, SIGMA_DATA).c_in(t)
    torch.testing.assert_close(c_in**2 * variance, torch.ones(3, dtype=torch.float64))


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match=r"unknown parametrization 'edm'"):
        get_parametrization("edm", get_schedule("fm"))
    with pytest.raises(ValueError, match='needs the schedule "fm"'):
        get_parametrization("euler_fm", get_schedule("vp_cosine"))
    with pytest.raises(ValueError, match="sigma_data: expected a positive number, got 0"):
        get_parametrization("identity", get_schedule("fm"), 0)
