"""imm::mmd_loss and imm::mmd_gram: the batched MMD loss and Gram matrix (paper eq. 67, sections 4.2, C.8).

With d = max(||x - y||, eps), kappa = scale / D per group, and a mean over the bandwidth factors b (k of scale b, no mixture of
energy kernels):
    laplace  k = exp(-kappa d)          slope = kappa k / d
    rbf      k = exp(-kappa d^2 / 2)    slope = kappa k
    imq      k = 1 / (1 + kappa d^2)    slope = 2 kappa k^2
    energy   k = -kappa d               slope = kappa / d
dk/dx = -slope (x - y), and slope = 0 for ||x - y|| <= eps. The V-statistic has all pairs, diagonals included; the U-statistic
(``unbiased``; Gretton et al. 2012, eq. 4) none with j = k, so that it is unbiased for particles that are coupled in pairs too:
    V  loss_g = weight_g / M^2       sum_jk   [k(t_j, t_k) + k(r_j, r_k) - 2 k(t_j, r_k)]
    U  loss_g = weight_g / (M (M-1)) sum_j!=k [k(t_j, t_k) + k(r_j, r_k) - 2 k(t_j, r_k)]

mmd_loss also returns the slopes of the pairs that its gradient needs, [G, M, 2 M]: (t_j, t_k), then (t_j, r_k), 0 for a pair
without gradient. Their sign is free, and an implementation may mark pairs with it; a backward takes the absolute value.

The reference sums k - 1 = expm1(...) (the ones cancel exactly), subtracts particles directly (a Gram product loses the
matched pairs, which are close), and carries the M x M part in float64. Time O(G M^2 D), memory O(G M (M + D)).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imm.ops import dispatch, triton_kernels
from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.registry import gradients, no_second_derivative, only, register, register_autograd

KERNELS = ("laplace", "rbf", "imq", "energy")


def check_groups(name: str, value: Tensor, x: Tensor, *, or_one: bool = False) -> None:
    """Raises ValueError or TypeError unless value is one number for each group of x or, ``or_one``, one for all."""
    one = or_one and value.shape == (1,)
    if not one and (value.dim() != 1 or value.shape[0] != x.shape[0]):
        raise ValueError(f"{name}: expected one number per group, [{x.shape[0]}], got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the particles' device {x.device}, got {value.device}")


def check_kernel(kernel: str, bandwidths: Sequence[float], eps: float) -> None:
    """Raises ValueError for a kernel that there is not."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {list(KERNELS)}, got {kernel!r}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive floor on the norm, got {eps}")
    if not bandwidths or not all(0 < factor < float("inf") for factor in bandwidths):
        raise ValueError(f"bandwidths: expected one or more positive factors, got {list(bandwidths)}")
    if kernel == "energy" and len(bandwidths) > 1:
        raise ValueError(f"bandwidths: expected one for the energy kernel, which is linear in it, got {list(bandwidths)}")


def _check_particles(names: tuple[str, str], x: Tensor, y: Tensor, scale: Tensor, scale_name: str = "scale") -> None:
    for name, value in zip(names, (x, y), strict=True):
        if value.dim() != 3 or value.shape[1] == 0 or value.shape[2] == 0:
            raise ValueError(f"{name}: expected [G, M, D] with M, D > 0, got {list(value.shape)}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"{names[0]} and {names[1]}: expected the same G and D, got {list(x.shape)} and {list(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device:
        raise TypeError(
            f"{names[0]} and {names[1]}: expected one dtype and device, got {x.dtype} on {x.device} and {y.dtype} on {y.device}"
        )
    check_groups(scale_name, scale, x)


def check_loss(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    kernel: str,
    bandwidths: Sequence[float],
    eps: float,
    unbiased: bool,
    *,
    names: tuple[str, str] = ("y_t", "y_r"),
) -> None:
    """Raises ValueError or TypeError unless these are the arguments of a loss."""
    check_kernel(kernel, bandwidths, eps)
    _check_particles(names, y_t, y_r, scale)
    _check_sets(y_t, y_r, weight, unbiased, names)
    if upstream is not None:
        check_groups("upstream", upstream, y_t, or_one=True)


def _check_sets(
    y_t: Tensor, y_r: Tensor, weight: Tensor | None, unbiased: bool, names: tuple[str, str] = ("y_t", "y_r")
) -> None:
    if y_t.shape != y_r.shape:
        raise ValueError(f"{names[0]} and {names[1]}: expected the same shape, got {list(y_t.shape)} and {list(y_r.shape)}")
    if unbiased and y_t.shape[1] < 2:
        raise ValueError(f"unbiased: expected M >= 2 particles, got {y_t.shape[1]}")
    if weight is not None:
        check_groups("weight", weight, y_t)


def check_scale(scale: Tensor) -> None:
    """Refuse a negative or NaN scale where looking at it costs no device synchronisation."""
    if scale.device.type == "cpu" and not bool((scale.double() >= 0).all()):
        raise ValueError(f"scale: expected numbers >= 0, got {scale.tolist()[:8]}")


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """||x_j - y_k|| by direct differences, as float64 [G, Mx, My]."""
    dtype = accumulate_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").double()


def _value_and_slope(
    dist: Tensor, scale: Tensor, features: int, kernel: str, bandwidths: Sequence[float], eps: float
) -> tuple[Tensor, Tensor]:
    """(k - 1 (k for energy), slope) of distances [G, Mx, My] in float64."""
    kappa = (scale.double() / features)[:, None, None]
    floored = dist.clamp_min(eps)
    values, slopes = torch.zeros_like(dist), torch.zeros_like(dist)
    for factor in bandwidths:
        rate = factor * kappa
        if kernel == "laplace":
            value = torch.expm1(-rate * floored)
            slopes += rate * (value + 1.0) / floored
        elif kernel == "rbf":
            value = torch.expm1(-0.5 * rate * floored.square())
            slopes += rate * (value + 1.0)
        elif kernel == "imq":
            u = rate * floored.square()
            value = -u / (1.0 + u)
            slopes += 2.0 * rate / (1.0 + u).square()
        else:
            value = -rate * floored
            slopes += rate / floored
        values += value
    share = 1.0 / len(bandwidths)
    return share * values, torch.where(dist <= eps, 0.0, share * slopes)  # a NaN distance stays NaN


def _accumulate(grad: Tensor, coefficient: Tensor, x: Tensor, y: Tensor) -> None:
    """grad_j += sum_k coefficient_jk (x_j - y_k), one k at a time: O(G M D) memory."""
    coefficient = coefficient.to(grad.dtype)
    for k in range(y.shape[1]):
        grad.addcmul_(coefficient[:, :, k, None], x - y[:, k, None])


def _pairs(particles: int, unbiased: bool) -> int:
    return particles * (particles - 1) if unbiased else particles**2


def mmd_loss(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    kernel: str,
    bandwidths: Sequence[float],
    eps: float,
    unbiased: bool,
) -> tuple[Tensor, Tensor]:
    """Reference of imm::mmd_loss: [G, M, D] twice, scale [G], weight [G] or None -> loss [G], slopes [G, M, 2 M].

    Both in float32 (float64 for float64).
    """
    check_scale(scale)
    particles = y_t.shape[1]
    count = torch.ones(particles, particles, dtype=torch.float64, device=y_t.device)
    if unbiased:
        count.fill_diagonal_(0.0)

    def terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = _value_and_slope(_distance(x, y), scale, x.shape[2], kernel, bandwidths, eps)
        keep = count > 0
        return torch.where(keep, values, 0.0).sum((1, 2)), torch.where(keep, slopes, 0.0)

    (tt, slopes_tt), (rr, _), (tr, slopes_tr) = terms(y_t, y_t), terms(y_r, y_r), terms(y_t, y_r)
    loss = (tt + rr - 2.0 * tr) / _pairs(particles, unbiased)
    if weight is not None:
        loss = loss * weight.double()
    dtype = accumulate_dtype(y_t.dtype)
    return loss.to(dtype), torch.cat([slopes_tt, slopes_tr], 2).to(dtype)


def mmd_loss_bwd(grad: Tensor, slopes: Tensor, y_t: Tensor, y_r: Tensor, weight: Tensor | None, unbiased: bool) -> Tensor:
    """Gradient of :func:`mmd_loss` to y_t from its slopes: [G, M, D] in y_t's dtype."""
    particles = y_t.shape[1]
    upstream = (grad.double() if weight is None else grad.double() * weight.double())[:, None, None]
    coefficient = slopes.abs().double() * (upstream * (2.0 / _pairs(particles, unbiased)))
    dtype = accumulate_dtype(y_t.dtype)
    x, target = y_t.to(dtype), y_r.to(dtype)
    grad_y = torch.zeros(y_t.shape, dtype=dtype, device=y_t.device)
    _accumulate(grad_y, -coefficient[:, :, :particles], x, x)
    _accumulate(grad_y, coefficient[:, :, particles:], x, target)
    return grad_y.to(y_t.dtype)


def _check_bwd(grad: Tensor, slopes: Tensor, y_t: Tensor, y_r: Tensor, weight: Tensor | None, unbiased: bool) -> None:
    _check_particles(("y_t", "y_r"), y_t, y_r, grad, "grad")
    _check_sets(y_t, y_r, weight, unbiased)
    expected = (y_t.shape[0], y_t.shape[1], 2 * y_t.shape[1])
    dtype = accumulate_dtype(y_t.dtype)
    if slopes.shape != expected or slopes.dtype != dtype or slopes.device != y_t.device:
        got = f"{list(slopes.shape)} of {slopes.dtype} on {slopes.device}"
        raise ValueError(f"slopes: expected {list(expected)} of {dtype} on {y_t.device}, got {got}")


def _check_gram(x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float], eps: float) -> None:
    check_kernel(kernel, bandwidths, eps)
    _check_particles(("x", "y"), x, y, scale)


def mmd_gram(x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float], eps: float) -> Tensor:
    """Reference of imm::mmd_gram: [G, Mx, D], [G, My, D], scale [G] -> [G, Mx, My] in float32 (float64 for float64)."""
    check_scale(scale)
    values, _ = _value_and_slope(_distance(x, y), scale, x.shape[2], kernel, bandwidths, eps)
    return (values if kernel == "energy" else values + 1.0).to(accumulate_dtype(x.dtype))


def mmd_gram_bwd(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float], eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mmd_gram` to x and y."""
    dtype = accumulate_dtype(x.dtype)
    xs, ys = x.to(dtype), y.to(dtype)
    _, slopes = _value_and_slope(_distance(xs, ys), scale, x.shape[2], kernel, bandwidths, eps)
    coefficient = -grad.double() * slopes
    grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
    grad_y = torch.zeros(y.shape, dtype=dtype, device=y.device)
    _accumulate(grad_x, coefficient, xs, ys)
    _accumulate(grad_y, coefficient.transpose(1, 2), ys, xs)
    return grad_x.to(x.dtype), grad_y.to(y.dtype)


def _check_gram_bwd(
    grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, kernel: str, bandwidths: Sequence[float], eps: float
) -> None:
    _check_gram(x, y, scale, kernel, bandwidths, eps)
    expected = (x.shape[0], x.shape[1], y.shape[1])
    if grad.shape != expected:
        raise ValueError(f"grad: expected {list(expected)}, got {list(grad.shape)}")
    if not grad.is_floating_point():
        raise TypeError(f"grad: expected a floating dtype, got {grad.dtype}")
    if grad.device != x.device:
        raise ValueError(f"grad: expected the device {x.device}, got {grad.device}")


def _fake_loss(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    groups, particles, _ = y_t.shape
    dtype = accumulate_dtype(y_t.dtype)
    return y_t.new_empty((groups,), dtype=dtype), y_t.new_empty((groups, particles, 2 * particles), dtype=dtype)


def _fake_loss_bwd(grad: Tensor, slopes: Tensor, y_t: Tensor, *rest: Any) -> Tensor:
    return y_t.new_empty(y_t.shape)


def _fake_gram(x: Tensor, y: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], y.shape[1]), dtype=accumulate_dtype(x.dtype))


def _fake_gram_bwd(grad: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


class _Loss(NamedTuple):
    """Arguments of imm::mmd_loss."""

    y_t: Tensor
    y_r: Tensor
    scale: Tensor
    weight: Tensor | None
    kernel: str
    bandwidths: Sequence[float]
    eps: float
    unbiased: bool


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, (_, slopes) = _Loss(*inputs), output
    only(ctx, a, {"y_t"}, "mmd_loss: the gradient goes to y_t only; detach y_r, scale and weight")
    ctx.mark_non_differentiable(slopes)
    ctx.save_for_backward(slopes, a.y_t, a.y_r, a.weight)
    ctx.unbiased = a.unbiased


def _backward_loss(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return gradients(_Loss, y_t=torch.ops.imm.mmd_loss_bwd(grad, *ctx.saved_tensors, ctx.unbiased))


class _Gram(NamedTuple):
    """Arguments of imm::mmd_gram."""

    x: Tensor
    y: Tensor
    scale: Tensor
    kernel: str
    bandwidths: Sequence[float]
    eps: float


def _setup_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a = _Gram(*inputs)
    only(ctx, a, {"x", "y"}, "mmd_gram: the gradient goes to x and y only; detach scale")
    ctx.save_for_backward(a.x, a.y, a.scale)
    ctx.kernel = a.kernel, a.bandwidths, a.eps


def _backward_gram(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_y = torch.ops.imm.mmd_gram_bwd(grad, *ctx.saved_tensors, *ctx.kernel)
    return gradients(_Gram, x=grad_x, y=grad_y)


#: What the Triton kernels take.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def too_many_particles(request: dispatch.Request) -> str | None:
    """The reason of the Triton losses against [G, M, D] of this M."""
    from imm_kernels import LARGEST_SET

    particles = request.shape[1] if len(request.shape) == 3 else 0
    return f"supports up to {LARGEST_SET} particles, got {particles}" if particles > LARGEST_SET else None


def _check_loss(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, *rest: Any) -> None:
    check_loss(y_t, y_r, scale, weight, None, *rest)


register(
    "mmd_loss",
    check=_check_loss,
    reference=mmd_loss,
    fake=_fake_loss,
    native=("cpu",),
    triton=triton_kernels.implementation("mmd.loss", *TRITON_DTYPES, also=too_many_particles),
)
register(
    "mmd_loss_bwd",
    check=_check_bwd,
    reference=mmd_loss_bwd,
    fake=_fake_loss_bwd,
    native=("cpu",),
    triton=triton_kernels.implementation("mmd.gradient", torch.float32),
)
register(
    "mmd_gram",
    check=_check_gram,
    reference=mmd_gram,
    fake=_fake_gram,
    native=("cpu",),
    triton=triton_kernels.implementation("mmd_gram.gram", *TRITON_DTYPES),
)
register(
    "mmd_gram_bwd",
    check=_check_gram_bwd,
    reference=mmd_gram_bwd,
    fake=_fake_gram_bwd,
    native=("cpu",),
    triton=triton_kernels.implementation("mmd_gram.gram_gradients", torch.float32),
)
register_autograd("mmd_loss", _backward_loss, _setup_loss)
register_autograd("mmd_gram", _backward_gram, _setup_gram)
for _op in ("mmd_loss_bwd", "mmd_gram_bwd"):
    no_second_derivative(_op)
for _op in ("imm::mmd_loss", "imm::mmd_gram"):
    for _device in ("cpu", "cuda"):
        # Distances between close particles need float32 whatever precision the network runs in.
        torch.library.register_autocast(_op, _device, torch.float32)
