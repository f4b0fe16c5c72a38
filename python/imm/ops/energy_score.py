"""imm::energy_score: how far an ensemble is from its targets, and its finished gradient, in one op.

x [G, N, D] learns, y [G, M, D] are targets; d is the Euclidean distance times ``scale`` (kernel "energy") or 1 - k with a
kernel of imm::mmd_loss (``ops/mmd.py`` has them):
    loss_g     = f_g [2 / (N M) sum_jm d(x_j, y_m) - a sum_{j != k} d(x_j, x_k)]
    dloss/dx_j = f_g [2 / (N M) sum_m s_jm (x_j - y_m) - 2 a sum_k s_jk (x_j - x_k)],  s = d'(r) / r, 0 at distance 0
f = factor weight, and a = (N - 1 + alpha) / (N^2 (N - 1)): alpha = 0 the V-statistic, 1 the fair score (Ferro 2014), between
them almost fair (Lang et al. 2024, eps = (1 - alpha) / N); ``pair_weight`` is a itself. With ``log_std``, y is the mean
[G, D] of targets y_gm = mean_g + exp(log_std_g) n, n the imm::noise of key seed + g, elements m D + d at step 0.

Half of it at D = 1 is the CRPS (Gneiting and Raftery 2007). The targets' own term of the energy distance has no gradient and is
left out. A group of f = 0 is masked: its loss and gradient are exactly 0, whatever its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imm.ops import dispatch, triton_kernels
from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.mmd import TRITON_DTYPES, _accumulate, _distance, _value_and_slope, check_groups, check_kernel, check_scale
from imm.ops.registry import gradients, no_second_derivative, only, register, register_autograd

#: Floor on a distance: there to keep 1 / 0 out, and far below what float32 tells from 0.
_FLOOR = 1e-300


class Arguments(NamedTuple):
    """Of imm::energy_score, in the order of its schema."""

    x: Tensor  # [G, N, D]
    y: Tensor  # [G, M, D] or, with log_std, the mean [G, D]
    log_std: Tensor | None  # [G, D]
    seed: Tensor | None  # [1] int64, with log_std
    draws: int  # M, with log_std
    scale: Tensor | None  # [G] or [1]
    weight: Tensor | None  # [G] or [1]
    factor: float
    alpha: float
    pair_weight: float | None
    kernel: str
    bandwidths: Sequence[float]

    @property
    def pair(self) -> float:
        """a, the weight of an ordered pair within x."""
        N = self.x.shape[1]
        if self.pair_weight is not None:
            return self.pair_weight
        return (N - 1 + self.alpha) / (N**2 * (N - 1)) if N > 1 else 0.0


def _check_like(name: str, value: Tensor, x: Tensor, shape: list[Any]) -> None:
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {list(value.shape)}")
    if value.dtype != x.dtype:
        raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device {x.device}, got {value.device}")


def _check_targets(a: Arguments) -> None:
    G, _, D = a.x.shape
    if (a.log_std is None) != (a.seed is None):
        raise ValueError("log_std and seed: expected both or neither")
    if a.log_std is None or a.seed is None:
        if a.y.dim() != 3 or a.y.shape[1] == 0:
            raise ValueError(f"y: expected [G, M, D] with M > 0, got {list(a.y.shape)}")
        return _check_like("y", a.y, a.x, [G, a.y.shape[1], D])
    _check_like("mean", a.y, a.x, [G, D])
    _check_like("log_std", a.log_std, a.x, [G, D])
    if a.draws < 1:
        raise ValueError(f"draws: expected a count >= 1, got {a.draws}")
    if D % 4:
        raise ValueError(f"x: expected D divisible by 4 with drawn targets, got {D}")
    if a.seed.dtype != torch.int64 or a.seed.shape != (1,):
        raise ValueError(f"seed: expected one int64, [1], got {list(a.seed.shape)} of {a.seed.dtype}")
    if a.seed.device != a.x.device:
        raise ValueError(f"seed: expected the device {a.x.device}, got {a.seed.device}")
    return None


def _check(*args: Any) -> None:
    a = Arguments(*args)
    check_kernel(a.kernel, a.bandwidths, 1.0)
    if a.x.dim() != 3 or a.x.shape[1] == 0 or a.x.shape[2] == 0:
        raise ValueError(f"x: expected [G, N, D] with N, D > 0, got {list(a.x.shape)}")
    if a.x.dtype not in DTYPES:
        raise TypeError(f"x: expected a floating dtype of 16, 32 or 64 bits, got {a.x.dtype}")
    _check_targets(a)
    for name, value in (("scale", a.scale), ("weight", a.weight)):
        if value is not None:
            check_groups(name, value, a.x, or_one=True)
    if not 0 <= a.alpha <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {a.alpha}")
    if a.pair_weight is None and a.alpha > 0 and a.x.shape[1] == 1:
        raise ValueError(f"alpha: expected 0 for a single member, N = 1, got {a.alpha}")


def _targets(a: Arguments, dtype: torch.dtype) -> Tensor:
    if a.log_std is None or a.seed is None:
        return a.y.to(dtype)
    G, D = a.y.shape
    normal = torch.ops.imm.noise(a.seed + torch.arange(G, device=a.y.device), a.draws * D, 0).view(G, a.draws, D)
    return a.y.to(dtype)[:, None] + a.log_std.to(dtype).exp()[:, None] * normal.to(dtype)


def energy_score(*args: Any) -> tuple[Tensor, Tensor]:
    """Reference of imm::energy_score: :class:`Arguments` -> loss [G], gradient [G, N, D].

    The loss is float32 (float64 for float64 x); the gradient of its sum has x's dtype and, where x is dense, its layout.
    """
    a = Arguments(*args)
    if a.scale is not None:
        check_scale(a.scale)
    dtype = accumulate_dtype(a.x.dtype)
    x, y = a.x.to(dtype), _targets(a, dtype)
    G, N, D = x.shape
    scale = torch.ones(1, device=x.device) if a.scale is None else a.scale
    kernel = 1 if a.kernel == "energy" else D, a.kernel, a.bandwidths, _FLOOR
    across, slopes_across = _value_and_slope(_distance(x, y), scale.expand(G), *kernel)
    within, slopes_within = _value_and_slope(_distance(x, x), scale.expand(G), *kernel)
    share = 2.0 / (N * y.shape[1])
    factor = torch.full((G,), a.factor, dtype=torch.float64, device=x.device)
    if a.weight is not None:
        factor = factor * a.weight.double()
    loss = factor * (a.pair * within.sum((1, 2)) - share * across.sum((1, 2)))
    grad = torch.zeros_like(x)
    _accumulate(grad, factor[:, None, None] * share * slopes_across, x, y)
    _accumulate(grad, factor[:, None, None] * -2.0 * a.pair * slopes_within, x, x)
    masked = factor == 0
    grad = torch.where(masked[:, None, None], 0.0, grad)
    return torch.where(masked, 0.0, loss).to(dtype), torch.empty_like(a.x).copy_(grad)


def energy_score_bwd(grad: Tensor, finished: Tensor, x: Tensor) -> Tensor:
    """Reference of imm::energy_score_bwd: the finished gradient times ``grad`` [G] of its group.

    x is not read; it ties the result to the network, so that a second derivative is an error and not zero.
    """
    return torch.mul(finished, grad.to(accumulate_dtype(finished.dtype))[:, None, None], out=torch.empty_like(finished))


def _check_bwd(grad: Tensor, finished: Tensor, x: Tensor) -> None:
    if finished.dim() != 3 or finished.shape != x.shape or finished.dtype != x.dtype or finished.dtype not in DTYPES:
        raise ValueError(
            f"finished and x: expected [G, N, D] of one floating dtype, got {list(finished.shape)} of {finished.dtype} and "
            f"{list(x.shape)} of {x.dtype}"
        )
    check_groups("grad", grad, finished)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    x = Arguments(*args).x
    return x.new_empty((x.shape[0],), dtype=accumulate_dtype(x.dtype)), torch.empty_like(x)


def _fake_bwd(grad: Tensor, finished: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(finished)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, (_, finished) = Arguments(*inputs), output
    only(ctx, a, {"x"}, "energy_score: the gradient goes to x only; detach y, mean, log_std, scale and weight")
    ctx.mark_non_differentiable(finished)
    ctx.save_for_backward(finished, a.x)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return gradients(Arguments, x=torch.ops.imm.energy_score_bwd(grad, *ctx.saved_tensors))


def _too_large(request: dispatch.Request) -> str | None:
    from imm_kernels.energy_score import too_large

    return too_large(request.shape)


register(
    "energy_score",
    check=_check,
    reference=energy_score,
    fake=_fake,
    native=("cpu",),
    triton=triton_kernels.implementation("energy_score.energy_score", *TRITON_DTYPES, also=_too_large),
)
register("energy_score_bwd", check=_check_bwd, reference=energy_score_bwd, fake=_fake_bwd)
register_autograd("energy_score", _backward, _setup)
no_second_derivative("energy_score_bwd")
for _device in ("cpu", "cuda"):
    # As the losses of ops/mmd.py.
    torch.library.register_autocast("imm::energy_score", _device, torch.float32)
