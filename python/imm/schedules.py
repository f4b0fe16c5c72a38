"""Noise schedules: x_t = alpha_t x + sigma_t eps with eps ~ N(0, sigma_data^2), t = 0 data, t = 1 prior (paper section 4.2).

Everything is evaluated in float64: r - t falls to 1e-6 near the prior, below what float32 resolves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

Time = float | Tensor


def as_time(t: Time, device: torch.device | None = None) -> Tensor:
    """A time as a float64 tensor; a tensor keeps its shape and, unless told otherwise, its device."""
    return torch.as_tensor(t, dtype=torch.float64, device=device)


class Schedule(ABC):
    """alpha, sigma and what follows from them. All methods take a time in [0, 1], float or tensor, and return float64."""

    name: str
    #: -alpha sigma d(log_snr)/dt, which does not depend on t for either schedule.
    speed: float

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Signal level alpha_t."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Noise level sigma_t."""

    @abstractmethod
    def d_alpha(self, t: Time) -> Tensor:
        """d alpha_t / dt."""

    @abstractmethod
    def d_sigma(self, t: Time) -> Tensor:
        """d sigma_t / dt."""

    @abstractmethod
    def cross(self, s: Time, t: Time) -> Tensor:
        """alpha_s sigma_t - sigma_s alpha_t without cancellation; 0 at s = t, positive for s < t."""

    @abstractmethod
    def eta(self, t: Time) -> Tensor:
        """sigma_t / alpha_t, from 0 at the data to infinity at the prior."""

    @abstractmethod
    def t_from_eta(self, eta: Time) -> Tensor:
        """The inverse of :meth:`eta`; infinity maps to 1."""

    def log_snr(self, t: Time) -> Tensor:
        """lambda_t = 2 log(alpha_t / sigma_t), decreasing in t."""
        return 2.0 * (self.alpha(t).log() - self.sigma(t).log())

    def t_from_log_snr(self, log_snr: Time) -> Tensor:
        """The inverse of :meth:`log_snr`."""
        return self.t_from_eta(torch.exp(-0.5 * as_time(log_snr)))

    def log_snr_derivative(self, t: Time) -> Tensor:
        """d lambda_t / dt; minus infinity at both ends."""
        return -self.speed / (self.alpha(t) * self.sigma(t))


class FlowMatching(Schedule):
    """OT-FM: alpha = 1 - t, sigma = t."""

    name = "fm"
    speed = 2.0

    def alpha(self, t: Time) -> Tensor:
        return 1.0 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        return as_time(t)

    def d_alpha(self, t: Time) -> Tensor:
        return torch.full_like(as_time(t), -1.0)

    def d_sigma(self, t: Time) -> Tensor:
        return torch.ones_like(as_time(t))

    def cross(self, s: Time, t: Time) -> Tensor:
        return as_time(t) - as_time(s)

    def eta(self, t: Time) -> Tensor:
        t = as_time(t)
        return t / (1.0 - t)

    def t_from_eta(self, eta: Time) -> Tensor:
        eta = as_time(eta)
        return torch.where(torch.isinf(eta), 1.0, eta / (1.0 + eta))


class VPCosine(Schedule):
    """Variance preserving cosine: alpha = cos(pi t / 2), sigma = sin(pi t / 2)."""

    name = "vp_cosine"
    speed = math.pi

    def alpha(self, t: Time) -> Tensor:
        return torch.cos(0.5 * math.pi * as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return torch.sin(0.5 * math.pi * as_time(t))

    def d_alpha(self, t: Time) -> Tensor:
        return -0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Time) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def cross(self, s: Time, t: Time) -> Tensor:
        return torch.sin(0.5 * math.pi * (as_time(t) - as_time(s)))

    def eta(self, t: Time) -> Tensor:
        return torch.tan(0.5 * math.pi * as_time(t))

    def t_from_eta(self, eta: Time) -> Tensor:
        return torch.atan(as_time(eta)) * (2.0 / math.pi)


SCHEDULES: dict[str, Schedule] = {schedule.name: schedule for schedule in (FlowMatching(), VPCosine())}


def get_schedule(name: str) -> Schedule:
    """The schedule called ``name``: "fm" or "vp_cosine". Raises ValueError for any other name."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; expected one of {sorted(SCHEDULES)}")
    return SCHEDULES[name]
