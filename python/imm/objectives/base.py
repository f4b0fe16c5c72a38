"""What every loss of a flow map shares: times, noise, label dropout, precision, statistics."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imm.flow_map import FlowMap
from imm.ops.dtypes import accumulate_dtype
from imm.schedules import as_time

#: Loss is reported over this many equal bins of [t_min, t_max].
T_BINS = 4
TIMES = ("uniform", "logit_normal")
#: Mean and deviation of logit(t) where times are logit-normal (Geng et al. 2025, table 1).
_LOGIT_MEAN, _LOGIT_STD = -0.4, 1.0


@dataclass(frozen=True)
class Draws:
    """What one loss draws: t, s and r ``[G]`` float64, ``noise`` ``[N, ...]`` with N a multiple of G, ``labels`` ``[B]`` after
    dropout or None. ``jumps`` ``[G]`` bool on the CPU says where s < t, so that nothing waits for the device to know; None:
    read from t and s. ``latent`` ``[N, latent_dim]`` is the network's own noise, or None."""

    t: Tensor
    s: Tensor
    r: Tensor
    noise: Tensor
    labels: Tensor | None
    jumps: Tensor | None = None
    latent: Tensor | None = None

    def part(self, start: int, stop: int) -> Draws:
        """Those of the groups from ``start`` to before ``stop``."""

        def cut(values: Tensor) -> Tensor:
            each = len(values) // len(self.t)
            return values[start * each : stop * each]

        some = (None if value is None else cut(value) for value in (self.labels, self.jumps, self.latent))
        return Draws(cut(self.t), cut(self.s), cut(self.r), cut(self.noise), *some)


@dataclass(frozen=True)
class Batch:
    """What a loss is computed from.

    Attributes:
        x: data ``[B, ...]``. labels: ``[B]`` as given, or None. augment: ``[B, augment_dim]`` or None. draws: the loss's.
        scale: float 0-d, what the mean over groups is multiplied by (``grad_scale``). pairs: see :meth:`Objective.forward`.
        cond: ``[B, cond_dim]`` or None, what the network is conditioned on.
    """

    x: Tensor
    labels: Tensor | None
    augment: Tensor | None
    draws: Draws
    scale: Tensor
    pairs: bool = False
    cond: Tensor | None = None


class Objective(nn.Module, ABC):
    """The loss of a batch. Wrap this module, not the network, in DDP or FSDP: groups are cut from the local batch and never
    cross devices.

    Args:
        flow_map: what is trained.
        label_dropout: probability that an image's label is replaced by "none".
        share_dropout: the network's dropout masks are the same in all calls that a loss compares.

    Attributes:
        name: the value of ``imm train --loss``. particles: images a group; the batch is a multiple of it. step: the training
            step, from 0, which the trainer sets for losses that depend on it.
        recorded: names of the arguments that :attr:`settings` has.
        needs_second_time: whether the network must see s. forwards: the cost of an image in forwards of the network; a backward
            counts as two. compiles: whether the loss works with a compiled network (torch.compile has no tangents).
        least_part: the smallest micro-batch of a loss that treats two kinds of images differently (those that jump, those that
            do not). takes_latent: whether the network may have noise of its own (``latent_dim``).

    Raises:
        ValueError, TypeError: for any value other than these.
    """

    name: str
    particles = 1
    step = 0
    recorded: tuple[str, ...] = ()
    needs_second_time = True
    forwards = 4.0
    compiles = True
    least_part = 1
    takes_latent = False

    def __init__(self, flow_map: FlowMap, *, label_dropout: float = 0.1, share_dropout: bool = True) -> None:
        super().__init__()
        if not isinstance(flow_map, FlowMap):
            raise TypeError(f"flow_map: expected a FlowMap, got {type(flow_map).__name__}")
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout: expected a probability, got {label_dropout}")
        if self.needs_second_time and flow_map.second_time == "none":
            raise ValueError(f'second_time: expected "stride" or "identity" for {type(self).__name__}, got "none"')
        if flow_map.latent_dim and not self.takes_latent:
            raise ValueError(f"latent_dim: expected 0 for {type(self).__name__}, got {flow_map.latent_dim}")
        self.flow_map = flow_map
        self.label_dropout = float(label_dropout)
        self.share_dropout = share_dropout

    @property
    def settings(self) -> dict[str, Any]:
        """The loss's name and its arguments, as JSON has them."""
        values = {name: getattr(self, name) for name in ("label_dropout", "share_dropout", *self.recorded)}
        return {"loss": self.name} | {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @abstractmethod
    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and r of each group: three ``[G]`` float64 tensors, t >= r >= s."""

    @abstractmethod
    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each group ``[G]``, without ``batch.scale``, and further statistics."""

    def draw(self, x: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Draws:
        """Times, noise and label dropout for a batch, as :meth:`forward` draws them, whose arguments it takes."""
        batch = self._checked_batch(x)
        labels = self.flow_map.checked_labels(labels, batch, x.device)
        t, s, r = self.sample_times(batch // self.particles, x.device, generator)
        noise = (
            torch.randn(self._noise_shape(x), dtype=x.dtype, device=x.device, generator=generator) * self.flow_map.sigma_data
        )
        labels, jumps = self._drop_labels(labels, generator), self._jumps(batch // self.particles)
        return Draws(t, s, r, noise, labels, jumps, self._latent(x, generator))

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        augment: Tensor | None = None,
        generator: torch.Generator | None = None,
        grad_scale: Tensor | float | None = None,
        draws: Draws | None = None,
        pairs: bool = False,
        cond: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of data.

        Args:
            x: data with standard deviation near sigma_data, ``[B, ...]``, B a multiple of ``particles``.
            labels: ``[B]`` int64 classes, or None.
            augment: ``[B, augment_dim]``, how the data was augmented (:func:`imm.data.augment`), given to the network in
                all its calls; None for not at all.
            generator: of times, noise and label dropout; None for torch's default one.
            grad_scale: a number that multiplies the loss, such as a gradient scaler's factor. Given here, not after the
                call, it reaches small gradients before they are rounded to 16 bits. None for 1.
            draws: from :meth:`draw`, whose ``part`` makes the loss of a large batch one of its parts at a time; None to draw.
            cond: z that the network is conditioned on, ``[B, cond_dim]``, differentiable; None for a network without. A loss's
                targets give it no gradient. Without ``draws``, rows are shuffled before groups are cut from them: particles of
                a group may share what the network is conditioned on and nothing else (docs/learn/tokens.md).
            mask: ``[B]`` bool, rows that count; the others are left out before anything is drawn, and with them what then is
                no multiple of ``particles``. None for all.
            pairs: also the statistic ``pairs``, of a loss that compares sets; it costs two more calls of the loss.

        Returns:
            The loss (``grad_scale`` times the mean over groups, a scalar) and statistics, all tensors on the device without
            gradient: ``loss`` (without ``grad_scale``), ``gap`` (mean t - r), ``at_s`` (share of groups with r = s),
            ``t_bin_loss`` (mean loss over ``T_BINS`` equal bins of t, NaN for an empty one), ``t_bin_count``, ``nonfinite``
            (groups whose loss is not finite). ``pairs`` ``[2]``: the inner product of the gradient to the network's outputs
            with its part from matched pairs, y_t and y_r of one image and noise, and the gradient's squared norm. Their ratio
            is the matched pairs' share of the gradient: at 1 the loss is a consistency loss.

        Raises:
            ValueError: a batch that ``particles`` does not divide, labels out of range, augment for a network without or of
                another shape, cond or mask of another shape, a mask that leaves no group, NaN or infinite data (checked on
                the CPU only; on a GPU look at ``nonfinite``).
        """
        labels = self.flow_map.checked_labels(labels, len(x), x.device)
        cond = self.flow_map.checked_cond(cond, len(x), x.device, latent=False)
        shuffled = draws is None and cond is not None and self.particles > 1
        if mask is not None or shuffled:
            rows = self._kept(x, mask, shuffled, generator)
            x, labels, augment, cond = x[rows], *(None if v is None else v[rows] for v in (labels, augment, cond))
        if draws is None:
            draws = self.draw(x, labels, generator)
        else:
            self._checked_batch(x)
        groups, shape = len(x) // self.particles, self._noise_shape(x)
        if len(draws.t) != groups or draws.noise.shape != shape:
            got = list(draws.noise.shape)
            raise ValueError(f"draws: expected those of {groups} groups and noise {list(shape)}, got {got}")
        factor = torch.as_tensor(1.0 if grad_scale is None else grad_scale, dtype=accumulate_dtype(x.dtype), device=x.device)
        if factor.numel() != 1:
            raise ValueError(f"grad_scale: expected one number, got {list(factor.shape)}")
        factor = factor.reshape(())
        per_group, more = self.losses(Batch(x, labels, augment, draws, factor.detach(), pairs, cond))
        return per_group.mean() * factor, {**self._statistics(per_group.detach(), draws.t, draws.s, draws.r), **more}

    def _noise_shape(self, x: Tensor) -> torch.Size:
        return x.shape

    def _latent(self, x: Tensor, generator: torch.Generator | None) -> Tensor | None:
        return None

    def _jumps(self, groups: int) -> Tensor | None:
        """Which groups have s < t, ``[groups]`` bool on the CPU; None for a loss that does not tell them apart."""
        return None

    def _network(self, batch: Batch, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output for states of the batch's images, in whatever precision it has."""
        return self.flow_map.network_output(x, t, s, labels, augment=batch.augment, cond=batch.cond)[0]

    def _jump(self, batch: Batch, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """f_{s,t}(x) for states of the batch's images, in torch's own operations, which have tangents of any order."""
        parametrization = self.flow_map.parametrization
        g = self._network(batch, x, t, s, labels)
        return per_image(parametrization.c_skip(s, t), x) * x + per_image(parametrization.c_out(s, t), x) * g

    def _replayed(self, x: Tensor) -> AbstractContextManager[Any]:
        """Yields a context in which dropout masks are again those drawn from here on."""
        return _replayed_rng(x.device, self.share_dropout and self.training)

    def _pair(self, count: int, device: torch.device, generator: torch.Generator | None, times: str) -> tuple[Tensor, Tensor]:
        """Two independent times of each of ``count``, the later first: ``[count]`` float64."""
        two = self._random_times(2 * count, device, generator, times).reshape(2, count)
        return two.amax(0), two.amin(0)

    def _random_times(self, count: int, device: torch.device, generator: torch.Generator | None, times: str) -> Tensor:
        """Times in (t_min, t_max], uniform or logit-normal."""
        low, high = self.flow_map.t_min, self.flow_map.t_max
        if times == "uniform":
            return high - (high - low) * torch.rand(count, dtype=torch.float64, device=device, generator=generator)
        normal = torch.randn(count, dtype=torch.float64, device=device, generator=generator)
        return low + (high - low) * torch.sigmoid(_LOGIT_MEAN + _LOGIT_STD * normal)

    def _kept(self, x: Tensor, mask: Tensor | None, shuffled: bool, generator: torch.Generator | None) -> Tensor:
        """Indices of the rows that the loss is of, a multiple of ``particles``."""
        if mask is None:
            rows = torch.arange(len(x), device=x.device)
        elif not isinstance(mask, Tensor) or mask.shape != (len(x),) or mask.dtype != torch.bool:
            got = f"{list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask: expected [{len(x)}] bool, got {got}")
        else:
            rows = mask.nonzero().flatten()
            if len(rows) < self.particles:
                raise ValueError(f"mask: expected particles = {self.particles} rows or more that count, got {len(rows)}")
        if shuffled:
            rows = rows[torch.randperm(len(rows), device=x.device, generator=generator)]
        return rows if mask is None else rows[: len(rows) // self.particles * self.particles]

    def _checked_batch(self, x: Tensor) -> int:
        if x.dim() < 2 or not x.is_floating_point():
            raise ValueError(f"x: expected a floating [B, ...], got {list(x.shape)} of {x.dtype}")
        if x.shape[0] == 0 or x.shape[0] % self.particles:
            raise ValueError(f"x: expected a batch that is a multiple of particles = {self.particles}, got {x.shape[0]}")
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
            raise ValueError("x: expected finite data, got NaN or infinity")
        return x.shape[0]

    def _drop_labels(self, labels: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
        if labels is None or self.label_dropout == 0.0:
            return labels
        drop = torch.rand(labels.shape, device=labels.device, generator=generator) < self.label_dropout
        return torch.where(drop, self.flow_map.num_classes, labels)

    def _statistics(self, per_group: Tensor, t: Tensor, s: Tensor, r: Tensor) -> dict[str, Tensor]:
        low, high = self.flow_map.t_min, self.flow_map.t_max
        bins = ((t - low) / (high - low) * T_BINS).long().clamp(0, T_BINS - 1)
        one_hot = nn.functional.one_hot(bins, T_BINS).to(per_group.dtype)  # [G, T_BINS]
        count = one_hot.sum(0)
        return {
            "loss": per_group.mean(),
            "gap": (t - r).mean(),
            "at_s": (r == s).double().mean(),
            "t_bin_loss": torch.where(one_hot > 0, per_group[:, None], 0.0).sum(0) / count,
            "t_bin_count": count,
            "nonfinite": (~torch.isfinite(per_group)).sum(),
        }


def apart(batch: Batch, of_jumps: Callable[[Batch], Tensor], of_rest: Callable[[Batch], Tensor]) -> Tensor:
    """``[B]``: the losses of images that jump and of those whose s is t, each kind in calls of its own."""
    draws, device = batch.draws, batch.x.device
    jumps = (draws.s < draws.t).cpu() if draws.jumps is None else draws.jumps
    kinds = [(where.nonzero().flatten(), losses) for where, losses in ((~jumps, of_rest), (jumps, of_jumps))]
    back = without_wait(torch.cat([rows for rows, _ in kinds]).argsort(), device)
    values = [losses(_rows(batch, without_wait(rows, device))) for rows, losses in kinds if len(rows)]
    return torch.cat(values)[back]


def without_wait(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait for the device."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def _rows(batch: Batch, index: Tensor) -> Batch:
    """Some images of a batch whose groups are images."""
    draws = batch.draws
    take = lambda value: None if value is None else value[index]
    some = Draws(draws.t[index], draws.s[index], draws.r[index], draws.noise[index], take(draws.labels))
    labels, augment, cond = take(batch.labels), take(batch.augment), take(batch.cond)
    return replace(batch, x=batch.x[index], labels=labels, augment=augment, cond=cond, draws=some)


def evenly(groups: int, share: float) -> Tensor:
    """Which groups are of a share of the batch, ``[groups]`` bool: spread evenly, so that parts of a batch have it too."""
    place = torch.arange(groups, dtype=torch.float64)
    return ((place + 1) * share).floor() > (place * share).floor()


def least_part(share: float) -> int:
    """The least number of images in a row of which some are of the share (:func:`evenly`) and some are not."""
    rarer = min(share, 1.0 - share)
    return math.ceil(1.0 / rarer) if rarer else 1


def check_share(name: str, value: float) -> float:
    """A share of a batch as a number from 0 to 1. Raises ValueError for another."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")
    return float(value)


def check_times(times: str) -> str:
    """Raises ValueError for an unknown distribution of times."""
    if times not in TIMES:
        raise ValueError(f"unknown times {times!r}; expected one of {list(TIMES)}")
    return times


def per_image(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient of each image ``[B]``, to multiply x ``[B, ...]`` by: of x's accumulation dtype."""
    return as_time(coefficient).to(accumulate_dtype(x.dtype)).reshape(-1, *[1] * (x.dim() - 1))


def mean_square(difference: Tensor, unit: Tensor) -> Tensor:
    """The mean over features of the squared difference ``[B, ...]`` in units ``[B]`` float64: ``[B]``."""
    return (difference.flatten(1) / per_image(unit, difference).flatten(1)).square().mean(1)


@contextlib.contextmanager
def _replayed_rng(device: torch.device, enabled: bool) -> Iterator:
    """Yields a context in which torch's default generator of the device starts again from where this one began."""
    cuda = device.type == "cuda"
    state = None if not enabled else torch.cuda.get_rng_state(device) if cuda else torch.get_rng_state()

    @contextlib.contextmanager
    def replay() -> Iterator[None]:
        if state is not None:
            torch.cuda.set_rng_state(state, device) if cuda else torch.set_rng_state(state)
        yield

    yield replay
