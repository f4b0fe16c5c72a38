"""Few-step sampling: time grids, pushforward and restart (paper algorithms 2, 4 and 5)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from imm import functional
from imm.flow_map import FlowMap
from imm.schedules import Time, as_time

KINDS = ("uniform", "edm", "eta")
METHODS = ("pushforward", "restart")
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
    """What a sampling run needs to know of its schedule, one float64 a step.

    t, s: the two times as the network takes them. c_in: the coefficient of its input. c_skip, c_out: those of
    :func:`imm.functional.flow_step`, with the re-noising of the restart method folded in; c_noise: of the fresh noise after the
    step, 0 for none.
    """

    t: tuple[float, ...]
    s: tuple[float, ...]
    c_in: tuple[float, ...]
    c_skip: tuple[float, ...]
    c_out: tuple[float, ...]
    c_noise: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.t)

    def columns(self) -> dict[str, tuple[float, ...]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_table(flow_map: FlowMap, times: Tensor, method: str = "pushforward") -> StepTable:
    """The table of a run through ``times`` ``[steps + 1]`` by "pushforward" or "restart"; see those for what the times must be.

    A restart jumps to the last time and adds noise: x' = alpha (c_skip x + c_out G) + sigma sigma_data n.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {list(METHODS)}")
    pushing = method == "pushforward"
    times = _checked_times(flow_map, times, decreasing=pushing)
    schedule, parametrization = flow_map.schedule, flow_map.parametrization
    t, s = times[:-1], times[1:] if pushing else times[-1:].expand(len(times) - 1)
    first, second = flow_map.network_times(t, s)
    alpha, sigma = torch.ones_like(t), torch.zeros_like(t)
    if not pushing:
        alpha[:-1], sigma[:-1] = schedule.alpha(t[1:]), schedule.sigma(t[1:])
    columns = (
        first,
        second,
        parametrization.c_in(t),
        alpha * parametrization.c_skip(s, t),
        alpha * parametrization.c_out(s, t),
        sigma * flow_map.sigma_data,
    )
    return StepTable(*(tuple(column.tolist()) for column in columns))


def initial_state(
    flow_map: FlowMap, seeds: Tensor | Sequence[int] | range, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """x at t_max: sigma_data times each seed's step-0 noise, ``[B, *shape]`` float32."""
    return functional.noise(seeds, shape, 0, device=device) * flow_map.sigma_data


@torch.no_grad()
def pushforward(
    flow_map: FlowMap,
    x: Tensor,
    times: Tensor,
    labels: Tensor | None = None,
    guidance: Time | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Jump through the times one after the other: x <- f_{times[i+1], times[i]}(x) (algorithms 2 and 4).

    Args:
        flow_map: in evaluation mode, unless its dropout is wanted.
        x: the state at ``times[0]``, ``[B, ...]``, of standard deviation sigma_data (:func:`initial_state`).
        times: ``[steps + 1]``, strictly decreasing (:func:`time_grid`).
        labels, guidance: as in :class:`FlowMap`.
        dtype: of the state between steps; the network keeps its own.

    Returns:
        ``[B, ...]`` in ``dtype``.

    Raises:
        ValueError: times that do not decrease or leave the flow map's range; what :class:`FlowMap` refuses.
    """
    times = _checked_times(flow_map, times, decreasing=True)
    state, out = x.to(dtype), None
    for t, s in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        state = out = flow_map.jump(state, t, s, labels, guidance, out)  # in place from the second step on
    return state


@torch.no_grad()
def restart(
    flow_map: FlowMap,
    x: Tensor,
    times: Tensor,
    labels: Tensor | None = None,
    guidance: Time | None = None,
    dtype: torch.dtype = torch.float32,
    noise: Sequence[Tensor] | None = None,
    *,
    seeds: Tensor | Sequence[int] | range | None = None,
) -> Tensor:
    """Jump to the last time from each time, re-noising in between (algorithm 5).

    Args:
        flow_map, x, labels, guidance, dtype: as in :func:`pushforward`.
        times: ``[steps + 1]``; all but the last above the last, in any order.
        noise: the steps - 1 tensors of fresh noise in sampling order, of x's shape and already scaled by sigma_data.
        seeds: image seeds to draw that noise from (:func:`imm.noise` at steps 1, 2, ...). With neither, torch's default
            generator gives it.

    Returns:
        ``[B, ...]`` in ``dtype``.

    Raises:
        ValueError: as :func:`pushforward`; both noise and seeds, or noise of another number or shape.
    """
    times = _checked_times(flow_map, times, decreasing=False)
    steps = len(times) - 1
    if noise is not None:
        if seeds is not None:
            raise ValueError("noise and seeds: expected one of them at most")
        if len(noise) != steps - 1 or any(n.shape != x.shape for n in noise):
            raise ValueError(
                f"noise: expected {steps - 1} tensors of shape {list(x.shape)}, got {[list(n.shape) for n in noise]}"
            )
    if seeds is not None and len(seeds) != len(x):
        raise ValueError(f"seeds: expected one per image, {len(x)}, got {len(seeds)}")
    schedule, end = flow_map.schedule, float(times[-1])
    keys = None if seeds is None else functional.as_seeds(seeds, x.device)
    state, out = x.to(dtype), None
    for i, t in enumerate(times[:-1].tolist()):
        alpha, sigma = (1.0, 0.0) if i + 1 == steps else (schedule.alpha(times[i + 1]), schedule.sigma(times[i + 1]))
        renoise = None
        if keys is not None and i + 1 < steps:
            renoise = (float(alpha), float(sigma) * flow_map.sigma_data, keys, i + 1)
        state = out = flow_map.jump(state, t, end, labels, guidance, out, renoise)
        if keys is None and i + 1 < steps:
            fresh = torch.randn_like(state) * flow_map.sigma_data if noise is None else noise[i].to(state)
            functional.flow_step(state, fresh, alpha, sigma, out=state)
    return state
