"""imm::mmd_loss, imm::mmd_loss_grad, imm::mmd_gram: the batched MMD loss and Gram matrix (paper eq. 67, sections 4.2, C.8).

With d = max(||x - y||, eps) and kappa = scale / D per group:
    laplace  k = exp(-kappa d)            dk/dx = -kappa k (x - y) / d
    rbf      k = exp(-kappa d^2 / 2)      dk/dx = -kappa k (x - y)
and dk/dx = 0 for ||x - y|| <= eps. The loss is a V-statistic, diagonals included:
    loss_g = weight_g / M^2 sum_jk [k(t_j, t_k) + k(r_j, r_k) - 2 k(t_j, r_k)]

The reference sums k - 1 = expm1(...) (the ones cancel exactly), subtracts particles directly (a Gram product loses the
matched pairs, which are close), and carries the M x M part in float64. Time O(G M^2 D), memory O(G M D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.registry import check_out, no_second_derivative, refuse_gradients, register

KERNELS = ("laplace", "rbf")


def _check_groups(name: str, value: Tensor, x: Tensor) -> None:
    if value.dim() != 1 or value.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: expected one number per group, [{x.shape[0]}], got {list(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the particles' device {x.device}, got {value.device}")


def _check_particles(names: tuple[str, str], x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel: expected one of {list(KERNELS)}, got {kernel!r}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive floor on the norm, got {eps}")
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
    _check_groups("scale", scale, x)


def _check_loss(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float) -> None:
    _check_particles(("y_t", "y_r"), y_t, y_r, scale, kernel, eps)
    if y_t.shape != y_r.shape:
        raise ValueError(f"y_t and y_r: expected the same shape, got {list(y_t.shape)} and {list(y_r.shape)}")
    if weight is not None:
        _check_groups("weight", weight, y_t)


def _check_gram(x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float) -> None:
    _check_particles(("x", "y"), x, y, scale, kernel, eps)


def check_scale(scale: Tensor) -> None:
    """Refuse a negative or NaN scale where looking at it costs no device synchronisation."""
    if scale.device.type == "cpu" and not bool((scale.double() >= 0).all()):
        raise ValueError(f"scale: expected numbers >= 0, got {scale.tolist()[:8]}")


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """||x_j - y_k|| by direct differences, as float64 [G, Mx, My]."""
    dtype = accumulate_dtype(x.dtype)
    x, y = x.to(dtype), y.to(dtype)
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").double()


def _kappa(scale: Tensor, features: int) -> Tensor:
    return (scale.double() / features)[:, None, None]  # [G, 1, 1]


def _kernel_minus_one(dist: Tensor, kappa: Tensor, kernel: str, eps: float) -> Tensor:
    dist = dist.clamp_min(eps)
    return torch.expm1(-kappa * dist if kernel == "laplace" else -0.5 * kappa * dist.square())


def _slope(dist: Tensor, kappa: Tensor, kernel: str, eps: float) -> Tensor:
    """c with dk/dx = c (x - y)."""
    k = _kernel_minus_one(dist, kappa, kernel, eps) + 1.0
    slope = -kappa * k / dist.clamp_min(eps) if kernel == "laplace" else -kappa * k
    return torch.where(dist <= eps, 0.0, slope)  # a NaN distance stays NaN


def _accumulate(grad: Tensor, coefficient: Tensor, x: Tensor, y: Tensor) -> None:
    """grad_j += sum_k coefficient_jk (x_j - y_k), one k at a time: O(G M D) memory."""
    coefficient = coefficient.to(grad.dtype)
    for k in range(y.shape[1]):
        grad.addcmul_(coefficient[:, :, k, None], x - y[:, k, None])


def mmd_loss(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float) -> Tensor:
    """Reference of imm::mmd_loss: [G, M, D] twice, scale [G], weight [G] or None -> [G] in float32 (float64 for float64)."""
    _check_loss(y_t, y_r, scale, weight, kernel, eps)
    check_scale(scale)
    kappa = _kappa(scale, y_t.shape[2])
    tt, rr, tr = (
        _kernel_minus_one(_distance(a, b), kappa, kernel, eps).mean((1, 2)) for a, b in ((y_t, y_t), (y_r, y_r), (y_t, y_r))
    )
    loss = tt + rr - 2.0 * tr
    if weight is not None:
        loss = loss * weight.double()
    return loss.to(accumulate_dtype(y_t.dtype))


def mmd_loss_bwd(
    grad: Tensor, y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float
) -> Tensor:
    """Gradient of :func:`mmd_loss` to y_t: [G, M, D] in y_t's dtype."""
    _check_loss(y_t, y_r, scale, weight, kernel, eps)
    _check_groups("grad", grad, y_t)
    particles = y_t.shape[1]
    upstream = (grad.double() if weight is None else grad.double() * weight.double())[:, None, None]
    upstream = upstream * (2.0 / particles**2)
    kappa = _kappa(scale, y_t.shape[2])
    dtype = accumulate_dtype(y_t.dtype)
    x, target = y_t.to(dtype), y_r.to(dtype)
    grad_y = torch.zeros(y_t.shape, dtype=dtype, device=y_t.device)
    _accumulate(grad_y, upstream * _slope(_distance(x, x), kappa, kernel, eps), x, x)
    _accumulate(grad_y, -upstream * _slope(_distance(x, target), kappa, kernel, eps), x, target)
    return grad_y.to(y_t.dtype)


def mmd_loss_grad(
    y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Reference of imm::mmd_loss_grad: the loss [G] and the finished gradient of its sum to y_t, [G, M, D] in y_t's dtype."""
    loss = mmd_loss(y_t, y_r, scale, weight, kernel, eps)
    return loss, mmd_loss_bwd(torch.ones_like(loss), y_t, y_r, scale, weight, kernel, eps)


def mmd_loss_grad_out(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    kernel: str,
    eps: float,
    *,
    loss: Tensor,
    grad: Tensor,
) -> None:
    """Reference of imm::mmd_loss_grad.out: :func:`mmd_loss_grad` into tensors that the caller keeps across steps."""
    _check_loss(y_t, y_r, scale, weight, kernel, eps)
    _check_loss_out(y_t, loss, grad)
    refuse_gradients("mmd_loss_grad", y_t, y_r, scale, weight, loss, grad)
    values = torch.ops.imm.mmd_loss_grad(y_t, y_r, scale, weight, kernel, eps)
    loss.copy_(values[0])
    grad.copy_(values[1])


def _check_loss_out(y_t: Tensor, loss: Tensor, grad: Tensor) -> None:
    check_out("loss", loss, y_t.shape[:1], accumulate_dtype(y_t.dtype), y_t.device)
    check_out("grad", grad, y_t.shape, y_t.dtype, y_t.device)


def mmd_gram(x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float) -> Tensor:
    """Reference of imm::mmd_gram: [G, Mx, D], [G, My, D], scale [G] -> [G, Mx, My] in float32 (float64 for float64)."""
    _check_gram(x, y, scale, kernel, eps)
    check_scale(scale)
    gram = _kernel_minus_one(_distance(x, y), _kappa(scale, x.shape[2]), kernel, eps) + 1.0
    return gram.to(accumulate_dtype(x.dtype))


def mmd_gram_bwd(grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`mmd_gram` to x and y."""
    _check_gram(x, y, scale, kernel, eps)
    expected = (x.shape[0], x.shape[1], y.shape[1])
    if grad.shape != expected:
        raise ValueError(f"grad: expected {list(expected)}, got {list(grad.shape)}")
    if not grad.is_floating_point():
        raise TypeError(f"grad: expected a floating dtype, got {grad.dtype}")
    dtype = accumulate_dtype(x.dtype)
    xs, ys = x.to(dtype), y.to(dtype)
    coefficient = grad.double() * _slope(_distance(xs, ys), _kappa(scale, x.shape[2]), kernel, eps)
    grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
    grad_y = torch.zeros(y.shape, dtype=dtype, device=y.device)
    _accumulate(grad_x, coefficient, xs, ys)
    _accumulate(grad_y, coefficient.transpose(1, 2), ys, xs)
    return grad_x.to(x.dtype), grad_y.to(y.dtype)


def _fake_loss(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float) -> Tensor:
    _check_loss(y_t, y_r, scale, weight, kernel, eps)
    return y_t.new_empty((y_t.shape[0],), dtype=accumulate_dtype(y_t.dtype))


def _fake_loss_bwd(
    grad: Tensor, y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float
) -> Tensor:
    return y_t.new_empty(y_t.shape)


def _fake_loss_grad(
    y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float
) -> tuple[Tensor, Tensor]:
    return _fake_loss(y_t, y_r, scale, weight, kernel, eps), y_t.new_empty(y_t.shape)


def _fake_loss_grad_out(*args: Any, loss: Tensor, grad: Tensor) -> None:
    _check_loss(*args)
    _check_loss_out(args[0], loss, grad)


def _fake_gram(x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float) -> Tensor:
    _check_gram(x, y, scale, kernel, eps)
    return x.new_empty((x.shape[0], x.shape[1], y.shape[1]), dtype=accumulate_dtype(x.dtype))


def _fake_gram_bwd(grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y_t, y_r, scale, weight, ctx.kernel, ctx.eps = inputs
    if any(ctx.needs_input_grad[1:4]):
        raise RuntimeError("mmd_loss: the gradient goes to y_t only; detach y_r, scale and weight")
    ctx.save_for_backward(y_t, y_r, scale, weight)


def _backward_loss(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.imm.mmd_loss_bwd(grad, *ctx.saved_tensors, ctx.kernel, ctx.eps), None, None, None, None, None


def _setup_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, scale, ctx.kernel, ctx.eps = inputs
    if ctx.needs_input_grad[2]:
        raise RuntimeError("mmd_gram: the gradient goes to x and y only; detach scale")
    ctx.save_for_backward(x, y, scale)


def _backward_gram(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.imm.mmd_gram_bwd(grad, *ctx.saved_tensors, ctx.kernel, ctx.eps), None, None, None


register("mmd_loss", reference=mmd_loss, fake=_fake_loss, native=("cpu",))
register("mmd_loss_bwd", reference=mmd_loss_bwd, fake=_fake_loss_bwd, native=("cpu",))
register("mmd_loss_grad", reference=mmd_loss_grad, fake=_fake_loss_grad, native=("cpu",))
register("mmd_loss_grad.out", reference=mmd_loss_grad_out, fake=_fake_loss_grad_out, native=("cpu",))
register("mmd_gram", reference=mmd_gram, fake=_fake_gram, native=("cpu",))
register("mmd_gram_bwd", reference=mmd_gram_bwd, fake=_fake_gram_bwd, native=("cpu",))
torch.library.register_autograd("imm::mmd_loss", _backward_loss, setup_context=_setup_loss)
torch.library.register_autograd("imm::mmd_gram", _backward_gram, setup_context=_setup_gram)
for _op in ("mmd_loss_bwd", "mmd_loss_grad", "mmd_gram_bwd"):
    no_second_derivative(_op)
for _op in ("imm::mmd_loss", "imm::mmd_gram"):
    for _device in ("cpu", "cuda"):
        # Distances between close particles need float32 whatever precision the network runs in.
        torch.library.register_autocast(_op, _device, torch.float32)
