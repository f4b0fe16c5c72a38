"""The flow map f_{s,t}: a network that sees the time it is at and the time it jumps to (paper section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imm import functional
from imm.ops.dtypes import DTYPES
from imm.parametrizations import get_parametrization
from imm.schedules import Time, as_time, get_schedule

SECOND_TIMES = ("stride", "identity", "none")


class FlowMap(nn.Module):
    """``f_{s,t}(x_t) = c_skip(s,t) x_t + c_out(s,t) G(c_in(t) x_t, t, s)`` around any network G.

    Args:
        network: called as ``network(x, t, s, labels)`` with ``x`` ``[B, ...]`` scaled to unit variance, ``t`` and ``s`` ``[B]``
            float64, both already scaled, ``labels`` ``[B]`` int64 or None; returns ``x``'s shape. Its attribute ``num_classes``
            (0: unconditional) says which labels it takes; label ``num_classes`` means "none". Trained on augmented images
            (``augment_dim`` numbers of each), it is given these as a fifth argument, and otherwise only four. With an attribute
            ``cond_dim`` > 0 it is conditioned on as many numbers z besides, and called with ``cond=`` ``[B, cond_dim +
            latent_dim]``; the last ``latent_dim`` (0 without the attribute) are the network's own noise.
        schedule: "fm" or "vp_cosine".
        parametrization: "identity", "simple_edm" or "euler_fm" (with "fm" only).
        second_time: what the network is given beside ``time_scale * t``: "stride" ``time_scale * (t - s)``, "identity"
            ``time_scale * s``, or "none", 0 whatever s is: the network is a velocity, which DDIM samples.
        sigma_data: standard deviation of the data, and of the prior.
        time_scale: factor on both times.
        t_min, t_max: the range of times, ``0 <= t_min < t_max <= 1``.

    Raises:
        ValueError, TypeError: for any value other than these.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        schedule: str = "fm",
        parametrization: str = "euler_fm",
        second_time: str = "stride",
        sigma_data: float = 0.5,
        time_scale: float = 1000.0,
        t_min: float = 0.0,
        t_max: float = 0.994,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected an nn.Module, got {type(network).__name__}")
        num_classes = getattr(network, "num_classes", None)
        if not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"network: expected an integer attribute num_classes >= 0 (0: unconditional), got {num_classes!r}")
        if second_time not in SECOND_TIMES:
            raise ValueError(f"unknown second_time {second_time!r}; expected one of {list(SECOND_TIMES)}")
        if not 0.0 <= t_min < t_max <= 1.0:
            raise ValueError(f"t_min and t_max: expected 0 <= t_min < t_max <= 1, got {t_min} and {t_max}")
        if not 0 < time_scale < float("inf"):
            raise ValueError(f"time_scale: expected a positive number, got {time_scale}")
        self.network = network
        self.schedule = get_schedule(schedule)
        self.parametrization = get_parametrization(parametrization, self.schedule, sigma_data)
        self.second_time = second_time
        self.sigma_data = float(sigma_data)
        self.time_scale = float(time_scale)
        self.t_min = float(t_min)
        self.t_max = float(t_max)
        self.num_classes: int = num_classes
        self.cond_dim: int = getattr(network, "cond_dim", 0)
        self.latent_dim: int = getattr(network, "latent_dim", 0)
        if self.latent_dim and not self.cond_dim:
            raise ValueError(f"network: expected cond_dim > 0 beside latent_dim = {self.latent_dim}, got {self.cond_dim}")

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make this flow map again around the same network."""
        return {
            "schedule": self.schedule.name,
            "parametrization": self.parametrization.name,
            "second_time": self.second_time,
            "sigma_data": self.sigma_data,
            "time_scale": self.time_scale,
            "t_min": self.t_min,
            "t_max": self.t_max,
        }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) that the network takes. Raises ValueError where it does not say."""
        channels, resolution = getattr(self.network, "channels", None), getattr(self.network, "resolution", None)
        if not isinstance(channels, int) or not isinstance(resolution, int):
            raise ValueError("network: expected attributes channels and resolution")
        return channels, resolution, resolution

    @property
    def network_dtype(self) -> torch.dtype:
        """The dtype of the network's input, that of its parameters; float32 where it has none."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def forward(
        self,
        x: Tensor,
        t: Time,
        s: Time,
        labels: Tensor | None = None,
        guidance: Time | None = None,
        *,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Jump from time t to time s.

        Args:
            x: state x_t, ``[B, ...]``, floating; the result has its dtype.
            t, s: times with ``t_min <= s <= t <= t_max`` (numbers or ``[B]``, taken as float64). s = t is the identity.
            labels: ``[B]`` int64 classes in ``[0, num_classes]``, ``num_classes`` meaning "none"; None: all "none".
            guidance: classifier-free guidance w (number or ``[B]``): G = G_none + w (G_label - G_none), eq. 14, for twice the
                work. None: the labelled output alone.
            cond: z that the network is conditioned on, ``[B, cond_dim + latent_dim]``, floating, differentiable; None for a
                network without.

        Returns:
            x_s, the shape and dtype of ``x``.

        Raises:
            ValueError, TypeError: shapes, dtypes, times or labels other than these.
        """
        return self.jump(x, t, s, labels, guidance, cond=cond)

    def jump(
        self,
        x: Tensor,
        t: Time,
        s: Time,
        labels: Tensor | None = None,
        guidance: Time | None = None,
        out: Tensor | None = None,
        renoise: tuple[float, float, Tensor, int] | None = None,
        *,
        cond: Tensor | None = None,
    ) -> Tensor:
        """:meth:`forward` into ``out``, which may be ``x`` itself; without gradients where ``out`` is given.

        ``renoise``, (alpha, sigma, seeds, step), gives alpha x_s + sigma n(seeds, step) in the same pass.
        """
        x, t, s, labels = self._checked(x, t, s, labels, guidance)
        cond = self.checked_cond(cond, x.shape[0], x.device, latent=True)
        g, g_uncond = self.network_output(x, t, s, labels, with_uncond=guidance is not None, cond=cond)
        alpha, sigma, seeds, step = (1.0, None, None, 0) if renoise is None else renoise
        return functional.flow_step(
            x,
            g,
            alpha * self.parametrization.c_skip(s, t),
            alpha * self.parametrization.c_out(s, t),
            g_uncond=g_uncond,
            guidance=guidance,
            c_noise=sigma,
            seeds=seeds,
            step=step,
            out=out,
        )

    def velocity(
        self, x: Tensor, t: Time, labels: Tensor | None = None, guidance: Time | None = None, *, cond: Tensor | None = None
    ) -> Tensor:
        """d/ds f_{s,t}(x) at s = t: the instantaneous velocity ``c'_skip(t) x + c'_out(t) G(c_in(t) x, t, t)``.

        Args:
            x, t, labels, guidance, cond: as in :meth:`forward`.

        Returns:
            dx/dt at t, the shape and dtype of ``x``.

        Raises:
            ValueError, TypeError: as :meth:`forward`; t = 0 with the parametrization "identity", which has none there.
        """
        x, t, _, labels = self._checked(x, t, t, labels, guidance)
        if self.parametrization.name == "identity" and _readable(t) and not bool((t > 0).all()):
            raise ValueError(f't: expected times above 0 for the velocity of "identity", got {t.tolist()}')
        cond = self.checked_cond(cond, x.shape[0], x.device, latent=True)
        g, g_uncond = self.network_output(x, t, t, labels, with_uncond=guidance is not None, cond=cond)
        c_skip, c_out = self.parametrization.d_c_skip(t), self.parametrization.d_c_out(t)
        return functional.flow_step(x, g, c_skip, c_out, g_uncond=g_uncond, guidance=guidance)

    def network_times(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The two times as the network takes them: scaled, the second one t - s, s or 0."""
        second = {"stride": t - s, "identity": s, "none": torch.zeros_like(s)}[self.second_time]
        return self.time_scale * t, self.time_scale * second

    def network_output(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        *,
        with_uncond: bool = False,
        augment: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """G(c_in(t) x, t, s, labels, cond) and, ``with_uncond``, the same without labels, in one call of the network.

        ``augment`` ``[B, augment_dim]`` goes to the network beside the labels, in training (not ``with_uncond``); so does
        ``cond``, as :meth:`forward` has it.

        Raises:
            ValueError: ``augment`` ``with_uncond``, of another shape, or for a network that does not take it.
        """
        batch = x.shape[0]
        if augment is not None:
            told = getattr(self.network, "augment_dim", 0)
            if with_uncond or not told or augment.shape != (batch, told):
                wanted = f"[{batch}, {told}]" if told and not with_uncond else "none"
                raise ValueError(f"augment: expected {wanted} for this network and call, got {list(augment.shape)}")
        c_in = self.parametrization.c_in(t).reshape(-1, *[1] * (x.dim() - 1))
        wide = torch.promote_types(x.dtype, torch.float32)
        scaled = (x.to(wide) * c_in.to(wide)).to(self.network_dtype)
        first, second = (value.expand(batch) for value in self.network_times(t, s))
        if not with_uncond:
            return self._call(scaled, first, second, labels, augment, cond), None
        assert labels is not None
        none = torch.full_like(labels, self.num_classes)
        twice = None if cond is None else torch.cat([cond, cond])
        both = self._call(torch.cat([scaled, scaled]), first.repeat(2), second.repeat(2), torch.cat([none, labels]), cond=twice)
        return both[batch:], both[:batch]  # chunk(2) would fix the batch in torch.export

    def _call(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        augment: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        more = {} if cond is None else {"cond": cond.to(x.dtype)}
        g = self.network(x, t, s, labels, **more) if augment is None else self.network(x, t, s, labels, augment, **more)
        if not isinstance(g, Tensor) or g.shape != x.shape:
            got = list(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(f"network: expected an output of its input's shape {list(x.shape)}, got {got}")
        return g

    def _checked(
        self, x: Tensor, t: Time, s: Time, labels: Tensor | None, guidance: Time | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if not isinstance(x, Tensor) or x.dim() < 2 or x.dtype not in DTYPES:
            got = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected a floating tensor [B, ...] of 16, 32 or 64 bits, got {got}")
        t, s = (self.checked_times(name, _one_or_each(name, value, x)) for name, value in (("t", t), ("s", s)))
        if _readable(t, s) and not bool((s <= t).all()):
            raise ValueError(f"times: expected s <= t, got t = {t.tolist()} and s = {s.tolist()}")
        labels = self.checked_labels(labels, x.shape[0], x.device)
        if guidance is not None:
            if labels is None:
                raise ValueError("guidance: expected a class-conditional network, got one with num_classes = 0")
            w = _one_or_each("guidance", guidance, x)
            if _readable(w) and not bool(torch.isfinite(w).all()):
                raise ValueError(f"guidance: expected finite numbers, got {w.tolist()}")
        return x, t, s, labels

    def checked_times(self, name: str, times: Tensor) -> Tensor:
        """Times in [t_min, t_max] as float64; what a float32 time is off at the ends is taken off."""
        if _readable(times) and not bool(((times >= self.t_min - 1e-6) & (times <= self.t_max + 1e-6)).all()):
            raise ValueError(f"{name}: expected times from {self.t_min} to {self.t_max}, got {times.tolist()}")
        return times.clamp(self.t_min, self.t_max)

    def checked_labels(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Labels as the network takes them: ``[B]`` int64, all "none" for None, None for an unconditional network."""
        if self.num_classes == 0:
            if labels is not None:
                raise ValueError("labels: expected None for an unconditional network (num_classes = 0)")
            return None
        if labels is None:
            return torch.full((batch,), self.num_classes, dtype=torch.int64, device=device)
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
        if labels.dtype != torch.int64 or labels.shape != (batch,) or labels.device != device:
            raise ValueError(
                f"labels: expected [{batch}] int64 on {device}, got {list(labels.shape)} of {labels.dtype} on {labels.device}"
            )
        if _readable(labels) and not bool(((labels >= 0) & (labels <= self.num_classes)).all()):
            raise ValueError(
                f"labels: expected classes 0..{self.num_classes - 1} or {self.num_classes} for none, "
                f"got {labels.min().item()}..{labels.max().item()}"
            )
        return labels

    def checked_cond(
        self, cond: Tensor | None, rows: int, device: torch.device | None = None, *, latent: bool
    ) -> Tensor | None:
        """``cond`` as it is: floating ``[rows, cond_dim]``, with ``latent_dim`` more columns where ``latent``; None for a
        network without ``cond_dim``.

        Raises:
            ValueError: anything else; another device than ``device``, where one is given.
        """
        width = self.cond_dim + (self.latent_dim if latent else 0)
        if cond is None and not width:
            return None
        if isinstance(cond, Tensor) and width and cond.is_floating_point() and device in (None, cond.device):
            fits = cond.dim() == 2 and cond.shape[0] == rows and cond.shape[1] == width
            if fits:
                return cond
        wanted = f"floating {[rows, width]}{'' if device is None else f' on {device}'}" if width else "None"
        got = f"{list(cond.shape)} of {cond.dtype} on {cond.device}" if isinstance(cond, Tensor) else repr(cond)
        raise ValueError(f"cond: expected {wanted} for this network, got {got}")

    def add_noise(self, x: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = alpha_t x + sigma_t eps for ``eps`` of standard deviation sigma_data (paper section 4.1)."""
        return functional.flow_step(x, eps, self.schedule.alpha(t), self.schedule.sigma(t))


def _one_or_each(name: str, value: Time, x: Tensor) -> Tensor:
    """A number, [1] or [B] as float64 on x's device."""
    tensor = as_time(value, x.device)
    if tensor.dim() > 1 or (tensor.dim() == 1 and tensor.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"{name}: expected a number or [{x.shape[0]}], got {list(tensor.shape)}")
    return tensor


def _readable(*tensors: Tensor) -> bool:
    """Whether looking at the values costs no device synchronisation and no graph break."""
    return not torch.compiler.is_compiling() and all(v.device.type == "cpu" for v in tensors)
