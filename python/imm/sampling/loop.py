"""The sampling loop: pushforward and restart (paper algorithms 2, 4 and 5), and the one step that every form of it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from imm import functional
from imm.flow_map import FlowMap
from imm.sampling.grid import StepTable, step_table
from imm.schedules import Time, as_time

#: (step, x [R, ...], t [R], s [R], labels [R] or None, cond [R, C] or None) -> x's shape.
Network = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
#: (step, state after it) -> the noise that is added, of the state's shape.
Fresh = Callable[[int, Tensor], Tensor]
#: The noise of a network with a latent, before step i, is that of its seed at this step + i.
LATENT = 1 << 32


class Plain:
    """A network as the loop calls it."""

    prepare = None

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, step: int, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, cond: Tensor | None = None) -> Tensor:
        g = self.network(x, t, s, labels) if cond is None else self.network(x, t, s, labels, cond=cond)
        if not isinstance(g, Tensor):
            raise ValueError(f"network: expected an output of its input's shape {list(x.shape)}, got {type(g).__name__}")
        return g


def initial_state(
    flow_map: FlowMap, seeds: Tensor | Sequence[int] | range, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """x at t_max: sigma_data times each seed's step-0 noise, ``[B, *shape]`` float32."""
    return functional.noise(seeds, shape, scale=flow_map.sigma_data, device=device)


def jump(
    table: StepTable,
    i: int,
    x: Tensor,
    g: Tensor,
    g_uncond: Tensor | None = None,
    guidance: Time | None = None,
    seeds: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The state after step i from the one before, x ``[B, ...]``, and what the network gave for it, with noise of ``seeds``
    where there are any and the table has noise."""
    noisy = seeds is not None and table.c_noise[i] != 0.0
    return functional.flow_step(
        x,
        g,
        table.c_skip[i],
        table.c_out[i],
        g_uncond=g_uncond,
        guidance=guidance,
        c_noise=table.c_noise[i] if noisy else None,
        seeds=seeds if noisy else None,
        step=i + 1,
        out=out,
    )


def step(
    table: StepTable,
    i: int,
    network: Network,
    x: Tensor,
    labels: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
    kept: Tensor | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    """Step i: one call of the network and one :func:`jump`.

    Args:
        x: the state, ``[B, ...]``. labels: ``[R]``, of R = B rows of the network, or 2 B with guidance (:func:`with_none`).
        guidance: float64 ``[1]`` or ``[B]``. seeds: ``[B]`` int64 on x's device. dtype: of the network's input.
        out: where to write, which may be x. kept: the state that the step before began with, where the table adds of it.
        cond: ``[R, C]`` in ``dtype``, what the network is conditioned on, or None.

    Raises:
        ValueError: an output of another shape than the network's input.
    """
    batch, wide = len(x), torch.promote_types(x.dtype, torch.float32)
    scaled = (x.to(wide) * table.c_in[i]).to(dtype)
    if guidance is not None:
        scaled = torch.cat([scaled, scaled])
    t, s = (torch.full((len(scaled),), v[i], dtype=torch.float64, device=x.device) for v in (table.t, table.s))
    g = network(i, scaled, t, s, labels, cond)
    if g.shape != scaled.shape:
        raise ValueError(f"network: expected an output of its input's shape {list(scaled.shape)}, got {list(g.shape)}")
    uncond, g = (None, g) if guidance is None else (g[:batch], g[batch:])
    x = jump(table, i, x, g, uncond, guidance, seeds, out)
    return x if kept is None else x.add_(kept, alpha=table.c_kept[i])


def run(
    table: StepTable,
    network: Network,
    x: Tensor,
    labels: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor | None,
    dtype: torch.dtype,
    fresh: Fresh | None = None,
    cond: Tensor | None = None,
    latent: int = 0,
) -> Tensor:
    """Every :func:`step` of a table; in place from the second one on, so that x stays as it is. Without seeds ``fresh`` gives
    the noise. ``cond`` ``[B, C]``; ``latent``: numbers of the network's own noise, which follow it, of the seeds."""
    out = kept = None
    cond = None if cond is None else rows_of_cond(cond, latent, guidance is not None, dtype)
    for i in range(len(table)):
        if latent and cond is not None:
            fill_latent(cond, latent, i, seeds)
        begun = x.clone() if i + 1 < len(table) and table.c_kept[i + 1] != 0.0 else None
        x = out = step(table, i, network, x, labels, guidance, seeds, dtype, out, kept, cond)
        kept = begun
        if fresh is not None and table.c_noise[i] != 0.0:
            functional.flow_step(x, fresh(i, x), 1.0, table.c_noise[i], out=x)
    return x


def rows_of_cond(cond: Tensor, latent: int, guided: bool, dtype: torch.dtype) -> Tensor:
    """What a call of the network is given, ``[R, C + latent]``, the last ``latent`` columns to be filled."""
    rows = torch.cat([cond, cond.new_zeros(len(cond), latent)], 1).to(dtype)
    return torch.cat([rows, rows]) if guided else rows


def fill_latent(cond: Tensor, latent: int, step: int, seeds: Tensor | None) -> None:
    """Write the noise of a step into the last columns of ``cond``, for each copy of the images' rows."""
    if seeds is None:
        raise ValueError(
            "seeds: expected those of the images for a network with noise of its own (restart takes them), got None"
        )
    noise = functional.noise(seeds, (latent,), LATENT + step)
    cond[:, -latent:] = noise.repeat(len(cond) // len(seeds), 1)


def with_none(labels: Tensor, num_classes: int) -> Tensor:
    """The labels of a guided call of the network, ``[2 B]``: first "none", ``num_classes``, for each image."""
    return torch.cat([torch.full_like(labels, num_classes), labels])


def checked_guidance(flow_map: FlowMap, guidance: Time | None, count: int) -> Tensor | None:
    """Guidance as float64 ``[1]`` or ``[count]``, where it is."""
    if guidance is None:
        return None
    if flow_map.num_classes == 0:
        raise ValueError("guidance: expected a class-conditional network, got one with num_classes = 0")
    w = as_time(guidance).reshape(-1)
    if len(w) not in (1, count):
        raise ValueError(f"guidance: expected a number or [{count}], got {list(w.shape)}")
    if w.device.type == "cpu" and not bool(torch.isfinite(w).all()):
        raise ValueError(f"guidance: expected finite numbers, got {w.tolist()}")
    return w


@torch.no_grad()
def pushforward(
    flow_map: FlowMap,
    x: Tensor,
    times: Tensor,
    labels: Tensor | None = None,
    guidance: Time | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    method: str = "pushforward",
    cond: Tensor | None = None,
) -> Tensor:
    """Jump through the times one after the other: x <- f_{times[i+1], times[i]}(x) (algorithms 2 and 4).

    Args:
        flow_map: in evaluation mode, unless its dropout is wanted.
        x: the state at ``times[0]``, ``[B, ...]``, of standard deviation sigma_data (:func:`initial_state`).
        times: ``[steps + 1]``, strictly decreasing (:func:`time_grid`).
        labels, guidance, cond: as in :class:`FlowMap`.
        dtype: of the state between steps; the network keeps its own.
        method: "pushforward", or "ddim" and "heun", which integrate the velocity (:func:`imm.sampling.step_table`).

    Returns:
        ``[B, ...]`` in ``dtype``.

    Raises:
        ValueError, TypeError: times that do not decrease or leave the flow map's range; what :class:`FlowMap` refuses.
    """
    if method == "restart":
        raise ValueError("method: expected pushforward, ddim or heun, got 'restart', which imm.sampling.restart does")
    return _sample(flow_map, step_table(flow_map, times, method), x, labels, guidance, dtype, cond=cond)


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
    cond: Tensor | None = None,
) -> Tensor:
    """Jump to the last time from each time, re-noising in between (algorithm 5).

    Args:
        flow_map, x, labels, guidance, dtype: as in :func:`pushforward`.
        cond: ``[B, cond_dim]``; a network's own noise (``latent_dim``) is the seeds'.
        times: ``[steps + 1]``; all but the last above the last, in any order.
        noise: the steps - 1 tensors of fresh noise in sampling order, of x's shape and already scaled by sigma_data.
        seeds: image seeds to draw that noise from (:func:`imm.noise` at steps 1, 2, ...). With neither, torch's default
            generator gives it.

    Returns:
        ``[B, ...]`` in ``dtype``.

    Raises:
        ValueError, TypeError: as :func:`pushforward`; both noise and seeds, or either of another number or shape.
    """
    table = step_table(flow_map, times, "restart")
    if seeds is not None:
        if noise is not None:
            raise ValueError("noise and seeds: expected one of them at most")
        keys = functional.as_seeds(seeds, x.device)
        if len(keys) != len(x):
            raise ValueError(f"seeds: expected one per image, {len(x)}, got {len(keys)}")
        return _sample(flow_map, table, x, labels, guidance, dtype, keys, cond=cond)
    if noise is not None and (len(noise) != len(table) - 1 or any(n.shape != x.shape for n in noise)):
        expected = f"{len(table) - 1} tensors of shape {list(x.shape)}"
        raise ValueError(f"noise: expected {expected}, got {[list(n.shape) for n in noise]}")
    table = replace(table, c_noise=tuple(c / flow_map.sigma_data for c in table.c_noise))
    fresh = lambda i, state: torch.randn_like(state) * flow_map.sigma_data if noise is None else noise[i].to(state)
    return _sample(flow_map, table, x, labels, guidance, dtype, fresh=fresh, cond=cond)


def _sample(
    flow_map: FlowMap,
    table: StepTable,
    x: Tensor,
    labels: Tensor | None,
    guidance: Time | None,
    dtype: torch.dtype,
    seeds: Tensor | None = None,
    fresh: Fresh | None = None,
    cond: Tensor | None = None,
) -> Tensor:
    flow_map.checked_cond(cond, len(x), latent=False)
    labels = flow_map.checked_labels(labels, len(x), x.device)
    w = checked_guidance(flow_map, guidance, len(x))
    if w is not None and labels is not None:
        labels, w = with_none(labels, flow_map.num_classes), w.to(x.device)
    network, latent = Plain(flow_map.network), flow_map.latent_dim
    return run(table, network, x.to(dtype), labels, w, seeds, flow_map.network_dtype, fresh, cond, latent)
