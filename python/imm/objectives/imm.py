"""Inductive moment matching (Zhou, Ermon, Song 2025, sections 3 and 4, appendix C; algorithms 1 and 3):

w(t) MMD^2({f_{s,t}(x_t)}, sg {f_{s,r}(x_r)}) of the M particles of a group, r = r(s, t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from imm.flow_map import FlowMap
from imm.functional import ESTIMATORS, flow_map_mmd_loss
from imm.objectives.base import Batch, Objective
from imm.ops.mmd import check_kernel
from imm.schedules import Time, as_time

MAPPINGS = ("eta", "t", "log_snr", "inverse_eta")
TARGET_LABELS = ("kept", "dropped")
#: Lower bound of |c_out(s, t)|, so that the kernel scale stays finite in float32 as s approaches t.
_MIN_C_OUT = 1e-12


class IMM(Objective):
    """The IMM loss of a batch: groups of M particles, each group with its own t > r >= s, compared by MMD.

    ``y_t = f_{s,t}(x_t)`` learns, ``y_r = f_{s,r}(x_r)`` is the same live network without gradient; x_t and x_r share image and
    noise.

    Args:
        flow_map: what is trained.
        particles: M, particles per group; the batch must be a multiple. 1 gives a consistency model's loss.
        kernel, bandwidths, estimator: of :func:`imm.functional.mmd_loss`; the paper has "laplace", (1.0,), "v".
        mapping_kind: how r(s, t) is found (section C.6), r = max(s, .) of a constant step of (range) / 2^k in "eta" (decrement;
            the paper's), "t" (decrement), "log_snr" (increment) or "inverse_eta" (increment).
        k: step exponent, 1 to 30: 12 for ImageNet-256, 15 for CIFAR-10.
        a, b: of the weighting (eq. 13); the paper uses a = 1 or 2 and b = 4 or 5.
        min_gap: smallest t - r (unless s is closer), 1e-4 in half precision (section I.6); None: no minimum.
        label_dropout: probability that an image's label is replaced by "none".
        target_labels: labels of the target branch: "kept" as given (the null-label network then learns from conditional
            targets), or "dropped" like the other branch's.
        share_dropout: the network's dropout masks are the same in both branches.
        eps: lower bound of the norm in the kernel.

    Raises:
        ValueError: for any value other than these, or a mapping that the flow map's range of times does not allow.
    """

    name = "imm"
    recorded: tuple[str, ...] = (
        *("particles", "kernel", "bandwidths", "estimator", "mapping_kind", "k", "a", "b", "min_gap", "target_labels", "eps"),
    )

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
        super().__init__(flow_map, label_dropout=label_dropout, share_dropout=share_dropout)
        for name, value, known in (
            ("estimator", estimator, ESTIMATORS),
            ("mapping_kind", mapping_kind, MAPPINGS),
            ("target_labels", target_labels, TARGET_LABELS),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {list(known)}")
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
        if min_gap is not None and not 0.0 < min_gap < 1.0:
            raise ValueError(f"min_gap: expected a gap in (0, 1) or None, got {min_gap}")
        if mapping_kind in ("eta", "log_snr") and flow_map.t_max >= 1.0:
            raise ValueError(f"mapping_kind {mapping_kind!r}: expected t_max < 1, got {flow_map.t_max}")
        if mapping_kind in ("log_snr", "inverse_eta") and flow_map.t_min <= 0.0:
            raise ValueError(f"mapping_kind {mapping_kind!r}: expected t_min > 0, got {flow_map.t_min}")
        self.particles = particles
        self.kernel = kernel
        self.bandwidths = tuple(float(factor) for factor in bandwidths)
        self.estimator = estimator
        self.mapping_kind = mapping_kind
        self.k = k
        self.a = a
        self.b = float(b)
        self.min_gap = min_gap
        self.target_labels = target_labels
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
        """``1 / |c_out(s, t)|`` in float64: distances are measured in units of the network's output (section 4.2)."""
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

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`. The gradient is finished within the op that computes the loss: it knows ``batch.scale``."""
        flow_map, particles, draws, x = self.flow_map, self.particles, batch.draws, batch.x
        t, s, r, groups = draws.t, draws.s, draws.r, len(draws.t)

        def branch(time: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
            every_time, target = time.repeat_interleave(particles), s.repeat_interleave(particles)
            state = flow_map.add_noise(x, draws.noise, every_time)
            g = self._network(batch, state, every_time, target, labels)
            return state.reshape(groups, particles, -1), g.reshape(groups, particles, -1)

        with self._replayed(x) as replay:
            x_t, g_t = branch(t, draws.labels)
            # In the precision of the other branch: the rounding that both share cancels in y_t - y_r, and of unlike ones stays.
            with torch.no_grad(), replay():
                x_r, g_r = branch(r, draws.labels if self.target_labels == "dropped" else batch.labels)
        c_skip, c_out = flow_map.parametrization.c_skip, flow_map.parametrization.c_out
        particles_of = x_t, x_r, g_t, g_r
        of_group = c_skip(s, t), c_out(s, t), c_skip(s, r), c_out(s, r), self.kernel_scale(t, s), self.weight(t)
        per_group = self._loss(particles_of, of_group, self.estimator, upstream=(batch.scale / groups).reshape(1))
        return per_group, {"pairs": self._pairs(particles_of, of_group)} if batch.pairs else {}

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


def _check_order(t: Tensor, s: Tensor) -> None:
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((s < t).all()):
        raise ValueError(f"times: expected s < t, got t = {t.tolist()} and s = {s.tolist()}")
