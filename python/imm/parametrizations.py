"""Parametrizations: f_{s,t}(x) = c_skip(s,t) x + c_out(s,t) G(c_in(t) x, t, s) (paper section 4.2, appendix C.5).

Each one is the DDIM step from t to s applied to a particular reading of the network's output G. At s = t every one is the
identity exactly: c_skip = 1, c_out = 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from imm.schedules import Schedule, Time, as_time


class Parametrization(ABC):
    """Coefficients in float64 for times in [0, 1], s <= t. ``sigma_data`` is the standard deviation of the data."""

    name: str

    def __init__(self, schedule: Schedule, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data: expected a positive number, got {sigma_data}")
        self.schedule = schedule
        self.sigma_data = float(sigma_data)

    def _variance(self, t: Time) -> Tensor:
        return self.schedule.alpha(t).square() + self.schedule.sigma(t).square()

    def c_in(self, t: Time) -> Tensor:
        """1 / (sigma_data sqrt(alpha_t^2 + sigma_t^2)): the network sees unit variance."""
        return 1.0 / (self.sigma_data * self._variance(t).sqrt())

    @abstractmethod
    def c_skip(self, s: Time, t: Time) -> Tensor:
        """Weight of x_t in x_s."""

    @abstractmethod
    def c_out(self, s: Time, t: Time) -> Tensor:
        """Weight of the network's output in x_s."""

    @abstractmethod
    def d_c_skip(self, t: Time) -> Tensor:
        """d/ds c_skip(s, t) at s = t: the weight of x_t in the velocity at t."""

    @abstractmethod
    def d_c_out(self, t: Time) -> Tensor:
        """d/ds c_out(s, t) at s = t: the weight of the network's output in the velocity at t."""

    def _turn(self, t: Time) -> Tensor:
        """alpha'_t sigma_t - sigma'_t alpha_t, the derivative of :meth:`Schedule.cross` in s at s = t."""
        schedule = self.schedule
        return schedule.d_alpha(t) * schedule.sigma(t) - schedule.d_sigma(t) * schedule.alpha(t)


class Identity(Parametrization):
    """G predicts x (any schedule). A jump to s = 0 keeps nothing of x_t, so the boundary holds for s > 0 only."""

    name = "identity"

    def c_skip(self, s: Time, t: Time) -> Tensor:
        s, t = as_time(s), as_time(t)
        return torch.where(s == t, 1.0, self.schedule.sigma(s) / self.schedule.sigma(t))

    def c_out(self, s: Time, t: Time) -> Tensor:
        s, t = as_time(s), as_time(t)
        return torch.where(s == t, 0.0, self.schedule.cross(s, t) / self.schedule.sigma(t))

    def d_c_skip(self, t: Time) -> Tensor:
        return self.schedule.d_sigma(t) / self.schedule.sigma(t)

    def d_c_out(self, t: Time) -> Tensor:
        return self._turn(t) / self.schedule.sigma(t)


class SimpleEDM(Parametrization):
    """G predicts (alpha_t eps - sigma_t x) / (sigma_data sqrt(alpha_t^2 + sigma_t^2)) (any schedule)."""

    name = "simple_edm"

    def c_skip(self, s: Time, t: Time) -> Tensor:
        schedule = self.schedule
        return (schedule.alpha(s) * schedule.alpha(t) + schedule.sigma(s) * schedule.sigma(t)) / self._variance(t)

    def c_out(self, s: Time, t: Time) -> Tensor:
        return -self.sigma_data * self.schedule.cross(s, t) / self._variance(t).sqrt()

    def d_c_skip(self, t: Time) -> Tensor:
        schedule = self.schedule
        return (schedule.alpha(t) * schedule.d_alpha(t) + schedule.sigma(t) * schedule.d_sigma(t)) / self._variance(t)

    def d_c_out(self, t: Time) -> Tensor:
        return -self.sigma_data * self._turn(t) / self._variance(t).sqrt()


class EulerFM(Parametrization):
    """G predicts (eps - x) / sigma_data: one Euler step of the OT-FM velocity. Only with the "fm" schedule."""

    name = "euler_fm"

    def __init__(self, schedule: Schedule, sigma_data: float = 0.5) -> None:
        super().__init__(schedule, sigma_data)
        if schedule.name != "fm":
            raise ValueError(f'parametrization "euler_fm" needs the schedule "fm", got {schedule.name!r}')

    def c_skip(self, s: Time, t: Time) -> Tensor:
        return torch.ones_like(as_time(s) + as_time(t))

    def c_out(self, s: Time, t: Time) -> Tensor:
        return -self.sigma_data * self.schedule.cross(s, t)

    def d_c_skip(self, t: Time) -> Tensor:
        return torch.zeros_like(as_time(t))

    def d_c_out(self, t: Time) -> Tensor:
        return torch.full_like(as_time(t), self.sigma_data)


PARAMETRIZATIONS: dict[str, type[Parametrization]] = {cls.name: cls for cls in (Identity, SimpleEDM, EulerFM)}


def get_parametrization(name: str, schedule: Schedule, sigma_data: float = 0.5) -> Parametrization:
    """The parametrization called ``name`` ("identity", "simple_edm", "euler_fm") on a schedule.

    Raises ValueError for an unknown name, a non-positive ``sigma_data``, or "euler_fm" off the "fm" schedule.
    """
    if name not in PARAMETRIZATIONS:
        raise ValueError(f"unknown parametrization {name!r}; expected one of {sorted(PARAMETRIZATIONS)}")
    return PARAMETRIZATIONS[name](schedule, sigma_data)
