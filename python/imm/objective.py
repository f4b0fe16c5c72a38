"""The IMM training objective (paper sections 3 and 4, appendix C; algorithms 1 and 3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imm.flow_map import FlowMap
from imm.functional import ESTIMATORS, flow_map_mmd_loss
from imm.ops.dtypes import accumulate_dtype
from imm.ops.mmd import check_kernel
from imm.schedules import Time, as_time

MAPPINGS = ("eta", "t", "log_snr", "inverse_eta")
TARGET_LABELS = ("kept", "dropped")
#: Loss is reported over this many equal bins of [t_min, t_max].
T_BINS = 4
#: Floor on |c_out(s, t)|, so that the kernel scale stays finite in float32 as s approaches t.
_MIN_C_OUT = 1e-12


@dataclass(frozen=True)
class Draws:
    """What one loss draws: t, s and r ``[G]`` float64, ``noise`` like the data, ``labels`` ``[B]`` after dropout or None."""

    t: Tensor
    s: Tensor
    r: Tensor
    noise: Tensor
    labels: Tensor | None

    def part(self, start: int, stop: int) -> Draws:
        """Those of the groups from ``start`` to before ``stop``."""
        particles = len(self.noise) // len(self.t)
        groups, images = slice(start, stop), slice(start * particles, stop * particles)
        labels = None if self.labels is None else self.labels[images]
        return Draws(self.t[groups], self.s[groups], self.r[groups], self.noise[images], labels)


class IMMObjective(nn.Module):
    """The IMM loss of a batch: groups of M particles, each group with its own t > r >= s, compared by MMD.

    ``y_t = f_{s,t}(x_t)`` learns, ``y_r = f_{s,r}(x_r)`` is the same live network without gradient; x_t and x_r share image and
    noise. Wrap this module, not the network, in DDP or FSDP: groups are cut from the local batch and never cross devices.

    Args:
        flow_map: what is trained.
        particles: M, particles per group; the batch must be a multiple. 1 gives a consistency model's loss.
        kernel, bandwidths, estimator: of :func:`imm.functional.mmd_loss`; the paper has "laplace", (1.0,), "v".
        mapping_kind: how r(s, t) is found (section C.6), r = max(s, .) of a constant step of (range) / 2^k in "eta" (decrement;
            the paper's), "t" (decrement), "log_snr" (increment) or "inverse_eta" (increment).
        k: step exponent, 1 to 30: 12 for ImageNet-256, 15 for CIFAR-10.
        a, b: of the weighting (eq. 13); the paper uses a = 1 or 2 and b = 4 or 5.
        min_gap: smallest t - r (unless s is nearer), 1e-4 in half precision (section I.6); None for none.
        label_dropout: probability that an image's label is replaced by "none".
        target_labels: labels of the target branch: "kept" as given (the null-label network then learns from conditional
            targets), or "dropped" like the other branch's.
        share_dropout: the network's dropout masks are the same in both branches.
        eps: floor on the norm in the kernel.

    Raises:
        ValueError: for any value other than these, or a mapping that the flow map's range of times does not allow.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        particles: int = 4,
        kernel: str = "laplace",
        bandwidths: Sequence[float] = (1.0,),
        estimator: str = "v",
        mapping_kind: str = "eta",
        k: int = 12,
        a: int = 2,
        b: float = 4.0,
        min_gap: float | None = None,
        label_dropout: float = 0.1,
        target_labels: str = "kept",
        share_dropout: bool = True,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("mapping_kind", mapping_kind, MAPPINGS),
            ("target_labels", target_labels, TARGET_LABELS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {list(known)}")
        if not isinstance(flow_map, FlowMap):
            raise TypeError(f"flow_map: expected a FlowMap, got {type(flow_map).__name__}")
        if not isinstance(particles, int) or particles < 1:
            raise ValueError(f"particles: expected a whole number >= 1, got {particles}")
        if estimator == "u" and particles < 2:
            raise ValueError(f"particles: expected 2 or more for the unbiased estimator, got {particles}")
        check_kernel(kernel, bandwidths, eps)
        if not isinstance(a, int) or a < 0:
            raise ValueError(f"a: expected a whole exponent >= 0, got {a}")
        if not isinstance(k, int) or not 1 <= k <= 30:
            raise ValueError(f"k: expected a whole number from 1 to 30, got {k}")
        if not abs(b) <= 100:
            raise ValueError(f"b: expected a number from -100 to 100, got {b}")
        if not 0.0 <= label_dropout <= 1.0:
            raise ValueError(f"label_dropout: expected a probability, got {label_dropout}")
        if min_gap is not None and not 0.0 < min_gap < 1.0:
            raise ValueError(f"min_gap: expected a gap in (0, 1) or None, got {min_gap}")
        if mapping_kind in ("eta", "log_snr") and flow_map.t_max >= 1.0:
            raise ValueError(f"mapping_kind {mapping_kind!r}: expected t_max < 1, got {flow_map.t_max}")
        if mapping_kind in ("log_snr", "inverse_eta") and flow_map.t_min <= 0.0:
            raise ValueError(f"mapping_kind {mapping_kind!r}: expected t_min > 0, got {flow_map.t_min}")
        self.flow_map = flow_map
        self.particles = particles
        self.kernel = kernel
        self.bandwidths = tuple(float(factor) for factor in bandwidths)
        self.estimator = estimator
        self.mapping_kind = mapping_kind
        self.k = k
        self.a = a
        self.b = float(b)
        self.min_gap = min_gap
        self.label_dropout = float(label_dropout)
        self.target_labels = target_labels
        self.share_dropout = share_dropout
        self.eps = float(eps)

    def mapping(self, t: Time, s: Time) -> Tensor:
        """r(s, t) in float64 (section C.6): s <= r < t. Raises ValueError unless s < t (tensors off the CPU are not read)."""
        t, s = as_time(t), as_time(s)
        _check_order(t, s)
        schedule, low, high = self.flow_map.schedule, self.flow_map.t_min, self.flow_map.t_max
        if self.mapping_kind == "t":
            r = t - (high - low) / 2.0**self.k
        else:
            of, inverse = {
                "eta": (schedule.eta, schedule.t_from_eta),
                "log_snr": (schedule.log_snr, schedule.t_from_log_snr),
                "inverse_eta": (lambda u: 1.0 / schedule.eta(u), lambda v: schedule.t_from_eta(1.0 / as_time(v))),
            }[self.mapping_kind]
            start, end = float(of(low)), float(of(high))
            # eta shrinks towards the data, log_snr and 1/eta grow: the signed step is one expression.
            moved = of(t) + (start - end) / 2.0**self.k
            r = inverse(moved.clamp(min(start, end), max(start, end)))
        if self.min_gap is not None:
            r = torch.minimum(r, (t - self.min_gap).clamp_min(low))
        return torch.maximum(r, s).clamp_min(low)

    def weight(self, t: Time) -> Tensor:
        """w(t) = 1/2 sigmoid(b - log_snr) (-d log_snr/dt) alpha^a / (alpha^2 + sigma^2) in float64 (eq. 13); e^b t as t -> 0.

        Written without the infinities that log_snr and its derivative have at t = 0.
        """
        schedule = self.flow_map.schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        odds = math.exp(self.b)
        # sigmoid(b - log_snr) = e^b sigma^2 / (e^b sigma^2 + alpha^2);  -d log_snr/dt = speed / (alpha sigma)
        numerator = 0.5 * schedule.speed * odds * sigma * alpha ** (self.a - 1)
        return numerator / ((odds * sigma.square() + alpha.square()) * (alpha.square() + sigma.square()))

    def kernel_scale(self, t: Time, s: Time) -> Tensor:
        """1 / |c_out(s, t)| in float64: distances are measured in units of the network's output (section 4.2)."""
        t, s = as_time(t), as_time(s)
        _check_order(t, s)
        return 1.0 / self.flow_map.parametrization.c_out(s, t).abs().clamp_min(_MIN_C_OUT)

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t ~ U(t_min, t_max), s ~ U(t_min, t) and r(s, t) of each group: three ``[G]`` float64 tensors (section C.7)."""
        u = torch.rand((2, groups), dtype=torch.float64, device=device, generator=generator)
        low, high = self.flow_map.t_min, self.flow_map.t_max
        t = high - (high - low) * u[0]  # in (t_min, t_max]
        s = low + (t - low) * u[1]
        s = torch.minimum(s, torch.nextafter(t, torch.zeros_like(t)))  # rounding may not make s = t
        return t, s, self.mapping(t, s)

    def draw(self, x: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Draws:
        """Times, noise and label dropout for a batch, drawn as :meth:`forward` draws them; the arguments are its."""
        batch = self._checked_batch(x)
        labels = self.flow_map.checked_labels(labels, batch, x.device)
        t, s, r = self.sample_times(batch // self.particles, x.device, generator)
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator) * self.flow_map.sigma_data
        return Draws(t, s, r, noise, self._drop_labels(labels, generator))

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of data.

        Args:
            x: data with standard deviation near sigma_data, ``[B, ...]``, B a multiple of ``particles``.
            labels: ``[B]`` int64 classes, or None.
            augment: ``[B, augment_dim]``, how the data was augmented (:func:`imm.data.augment`), which the network is told in
                both branches; None for not at all.
            generator: of times, noise and label dropout; None for torch's default one.
            grad_scale: a number that multiplies the loss, such as a gradient scaler's factor. Given here, not after the
                call, it reaches small gradients before they are rounded to 16 bits. None for 1.
            draws: from :meth:`draw`, whose ``part`` makes the loss of a large batch one of its parts at a time; None to draw.
            pairs: also the statistic ``pairs``, which costs two more calls of the loss.

        Returns:
            The loss (``grad_scale`` times the mean over groups, a scalar) and statistics, all tensors on the device without
            gradient: ``loss`` (without ``grad_scale``), ``gap`` (mean t - r), ``at_s`` (share of groups with r = s),
            ``t_bin_loss`` (mean loss over ``T_BINS`` equal bins of t, NaN for an empty one), ``t_bin_count``, ``nonfinite``
            (groups whose loss is not finite). ``pairs`` ``[2]``: the inner product of the gradient to the network's outputs
            with its part from matched pairs, y_t and y_r of one image and noise, and the gradient's squared norm. Their ratio
            is the matched pairs' share of the gradient: at 1 the loss is a consistency loss.

        Raises:
            ValueError: a batch that ``particles`` does not divide, labels out of range, augment for a network that is not told
                or of another shape, NaN or infinite data (checked on the CPU only; on a GPU look at ``nonfinite``).
        """
        flow_map, particles = self.flow_map, self.particles
        if draws is None:
            draws = self.draw(x, labels, generator)
        else:
            self._checked_batch(x)
        batch = x.shape[0]
        labels = flow_map.checked_labels(labels, batch, x.device)
        groups = batch // particles
        t, s, r, eps, dropped = draws.t, draws.s, draws.r, draws.noise, draws.labels
        if len(t) != groups or eps.shape != x.shape:
            raise ValueError(f"draws: expected those of {groups} groups and noise {list(x.shape)}, got {list(eps.shape)}")

        def branch(time: Tensor, branch_labels: Tensor | None) -> tuple[Tensor, Tensor]:
            every_time, target = time.repeat_interleave(particles), s.repeat_interleave(particles)
            state = flow_map.add_noise(x, eps, every_time)
            g, _ = flow_map.network_output(state, every_time, target, branch_labels, augment=augment)
            return state.reshape(groups, particles, -1), g.reshape(groups, particles, -1)

        with _replayed_rng(x.device, self.share_dropout and self.training) as replay:
            x_t, g_t = branch(t, dropped)
            # In the precision of the other branch: the rounding that both share cancels in y_t - y_r, and of unlike ones stays.
            with torch.no_grad(), replay():
                x_r, g_r = branch(r, dropped if self.target_labels == "dropped" else labels)
        given = 1.0 if grad_scale is None else grad_scale
        factor = torch.as_tensor(given, dtype=accumulate_dtype(x.dtype), device=x.device)
        if factor.numel() != 1:
            raise ValueError(f"grad_scale: expected one number, got {list(factor.shape)}")
        factor = factor.reshape(())
        c_skip, c_out = flow_map.parametrization.c_skip, flow_map.parametrization.c_out
        particles_of = x_t, x_r, g_t, g_r
        of_group = c_skip(s, t), c_out(s, t), c_skip(s, r), c_out(s, r), self.kernel_scale(t, s), self.weight(t)
        per_group = self._loss(particles_of, of_group, self.estimator, upstream=(factor.detach() / groups).reshape(1))
        loss = per_group.mean() * factor
        stats = self._statistics(per_group.detach(), t, s, r)
        if pairs:
            stats["pairs"] = self._pairs(particles_of, of_group)
        return loss, stats

    def _loss(
        self,
        particles: tuple[Tensor, Tensor, Tensor, Tensor],
        of_group: tuple[Tensor, ...],
        estimator: str,
        upstream: Tensor | None = None,
    ) -> Tensor:
        """``[G]``, of x_t, x_r, g_t, g_r and each group's coefficients, kernel scale and weight."""
        *coefficients, weight = of_group
        return flow_map_mmd_loss(
            *particles,
            *coefficients,
            weight=weight,
            upstream=upstream,
            kernel=self.kernel,
            bandwidths=self.bandwidths,
            eps=self.eps,
            estimator=estimator,
        )

    def _pairs(self, particles: tuple[Tensor, ...], of_group: tuple[Tensor, ...]) -> Tensor:
        """The statistic ``pairs``: matched pairs alone are groups of one particle, each 1 / M^2 of its group's sum."""
        count = self.particles
        x_t, x_r, g_t, g_r = (one.detach().to(particles[0].dtype) for one in particles)  # 16 bits would round small ones to 0
        with torch.enable_grad():
            whole, single = g_t.clone().requires_grad_(), g_t.flatten(0, 1)[:, None].clone().requires_grad_()
            alone = (x_t.flatten(0, 1)[:, None], x_r.flatten(0, 1)[:, None], single, g_r.flatten(0, 1)[:, None])
            *coefficients, weight = (value.repeat_interleave(count) for value in of_group)
            (total,) = torch.autograd.grad(self._loss((x_t, x_r, whole, g_r), of_group, self.estimator).sum(), whole)
            matched = self._loss(alone, (*coefficients, weight / count**2), "v")
            (part,) = torch.autograd.grad(matched.sum(), single)
        total, part = total.double(), part.reshape(total.shape).double()
        return torch.stack([(part * total).sum(), total.square().sum()])

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


def _check_order(t: Tensor, s: Tensor) -> None:
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((s < t).all()):
        raise ValueError(f"times: expected s < t, got t = {t.tolist()} and s = {s.tolist()}")


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
