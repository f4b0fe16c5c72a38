"""The times that a sampler visits, and the numbers of each of its steps (paper algorithms 2, 4 and 5, eq. 118; DDIM, Heun)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.schedules import Time, as_time

KINDS = ("uniform", "edm", "eta")
METHODS = ("pushforward", "restart", "ddim", "heun")
#: Exponent of the "edm" grid (eq. 118).
RHO = 7.0


def time_grid(flow_map: FlowMap, steps: int, kind: str = "uniform", mid_eta: Sequence[float] = ()) -> Tensor:
    """The times a sampler visits, from t_max down to t_min.

    Args:
        flow_map: gives the range of times and the schedule.
        steps: number of jumps, >= 1.
        kind: "uniform" in t; "edm": eta^(1/7) uniform (eq. 118); "eta": through the times of ``mid_eta``.
        mid_eta: for "eta", the steps - 1 noise levels in between, decreasing: (1.4,) for the paper's two steps on CIFAR-10.

    Returns:
        ``[steps + 1]`` float64 on the CPU, strictly decreasing.

    Raises:
        ValueError: an unknown kind, steps < 1, mid_eta of another length or out of order. TypeError: steps that are no integer.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {list(KINDS)}")
    try:
        steps = operator.index(steps)  # NumPy's integers too
    except TypeError as error:
        raise TypeError(f"steps: expected an integer, got {steps!r}") from error
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if kind != "eta" and len(mid_eta):
        raise ValueError(f'mid_eta: expected none for kind {kind!r}; it belongs to kind "eta"')
    schedule, low, high = flow_map.schedule, flow_map.t_min, flow_map.t_max
    if any(not eta > 0 for eta in mid_eta):
        raise ValueError(f"mid_eta: expected positive noise levels, got {list(mid_eta)}")
    if kind == "edm" and bool(torch.isinf(schedule.eta(high))):
        raise ValueError(f'kind "edm": expected t_max < 1, where eta is finite, got {high}')
    if kind == "uniform":
        times = torch.linspace(high, low, steps + 1, dtype=torch.float64)
    elif kind == "edm":
        ends = schedule.eta(high) ** (1 / RHO), schedule.eta(low) ** (1 / RHO)
        share = torch.arange(steps + 1, dtype=torch.float64) / steps
        times = schedule.t_from_eta((ends[0] + share * (ends[1] - ends[0])) ** RHO)
    else:
        if len(mid_eta) != steps - 1:
            raise ValueError(f"mid_eta: expected steps - 1 = {steps - 1} noise levels, got {len(mid_eta)}")
        times = torch.cat(
            [as_time(high)[None], schedule.t_from_eta(torch.tensor(list(mid_eta), dtype=torch.float64)), as_time(low)[None]]
        )
    times[0], times[-1] = high, low
    return _checked_times(flow_map, times, decreasing=True)


def _checked_times(flow_map: FlowMap, times: Time, decreasing: bool) -> Tensor:
    times = as_time(times).cpu()
    if times.dim() != 1 or times.shape[0] < 2:
        raise ValueError(f"times: expected at least two times, [steps + 1], got {list(times.shape)}")
    if decreasing and not bool((times[1:] < times[:-1]).all()):
        raise ValueError(f"times: expected strictly decreasing times, got {times.tolist()}")
    if not bool((times[:-1] > times[-1]).all()):
        raise ValueError(f"times: expected every time above the last one, got {times.tolist()}")
    return flow_map.checked_times("times", times)


@dataclass(frozen=True)
class StepTable:
    """What a sampling run needs to know of its schedule, one float64 a call of the network.

    t, s: the two times as the network takes them. c_in: the coefficient of its input. c_skip, c_out: those of
    :func:`imm.functional.flow_step`, with the re-noising of the restart method folded in; c_noise: of the fresh noise after the
    step, 0 for none. c_kept: of the state that the step before began with, which is added after the step, 0 for none.
    """

    t: tuple[float, ...]
    s: tuple[float, ...]
    c_in: tuple[float, ...]
    c_skip: tuple[float, ...]
    c_out: tuple[float, ...]
    c_noise: tuple[float, ...]
    c_kept: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.t)

    def columns(self) -> dict[str, tuple[float, ...]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_table(flow_map: FlowMap, times: Tensor, method: str = "pushforward") -> StepTable:
    """The table of a run through ``times`` ``[steps + 1]``; these decrease strictly, but for "restart".

    - "pushforward": x <- f_{s,t}(x) from each time to the next.
    - "restart" jumps to the last time and adds noise: x' = alpha (c_skip x + c_out G) + sigma sigma_data n.
    - "ddim": pushforward with the network at s = t, the velocity (Song et al. 2021): networks that ignore s need no other.
    - "heun": Heun's second-order method on the velocity, two calls a step; a step that ends without noise (t_min = 0) has no
      second one (Karras et al. 2022).
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {list(METHODS)}")
    times = _checked_times(flow_map, times, decreasing=method != "restart")
    if method == "heun":
        return _heun(flow_map, times)
    schedule, parametrization = flow_map.schedule, flow_map.parametrization
    t, s = times[:-1], times[-1:].expand(len(times) - 1) if method == "restart" else times[1:]
    first, second = flow_map.network_times(t, t if method == "ddim" else s)
    alpha, sigma = torch.ones_like(t), torch.zeros_like(t)
    if method == "restart":
        alpha[:-1], sigma[:-1] = schedule.alpha(t[1:]), schedule.sigma(t[1:])
    columns = (
        first,
        second,
        parametrization.c_in(t),
        alpha * parametrization.c_skip(s, t),
        alpha * parametrization.c_out(s, t),
        sigma * flow_map.sigma_data,
        torch.zeros_like(t),
    )
    return StepTable(*(tuple(column.tolist()) for column in columns))


def _heun(flow_map: FlowMap, times: Tensor) -> StepTable:
    """x' = x + h v(x, t), then x + h/2 (v(x, t) + v(x', s)) = (1/2 + h/2 a_s) x' + h/2 b_s G(x', s) + x / 2, with v = a x + b G
    and h = s - t: the second step needs the state that the first began with, and no velocity of it."""
    parametrization = flow_map.parametrization
    rows: list[tuple[float, ...]] = []
    for t, s in itertools.pairwise(times):
        h = s - t
        skip, out = 1.0 + h * parametrization.d_c_skip(t), h * parametrization.d_c_out(t)
        rows.append(_at(flow_map, t, skip, out, 0.0))
        if float(flow_map.schedule.sigma(s)) > 0.0:
            skip, out = 0.5 + 0.5 * h * parametrization.d_c_skip(s), 0.5 * h * parametrization.d_c_out(s)
            rows.append(_at(flow_map, s, skip, out, 0.5))
    return StepTable(*zip(*rows, strict=True))


def _at(flow_map: FlowMap, t: Tensor, c_skip: Tensor, c_out: Tensor, c_kept: float) -> tuple[float, ...]:
    """A row with the network at s = t."""
    first, second = flow_map.network_times(t, t)
    return float(first), float(second), float(flow_map.parametrization.c_in(t)), float(c_skip), float(c_out), 0.0, c_kept
