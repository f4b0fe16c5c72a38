"""imm::adaln_modulate and imm::gated_residual_adaln: what surrounds attention and MLP in a transformer block with adaLN.

    adaln_modulate        h = (x - mean) / sqrt(var + eps) (1 + scale) + shift
    gated_residual_adaln  z = x + gate y, h = adaln_modulate(z)

    their tangents        dz = dx + dgate y + gate dy, dh = dn (1 + scale) + n dscale + dshift, with n the normalised z,
                          dn = (c - n mean(n c)) / sqrt(var + eps), c = dz - mean(dz)

mean and var are over the C features of a token (LayerNorm without weights; Peebles and Xie 2022, "adaLN-Zero"). Tokens are
[B, T, C]; gate, shift and scale are [B, C], or [1, C] for all images alike. Arithmetic is float32, float64 for float64 tokens;
z has x's dtype, and h the dtype in which the network computes: y's, x's where there is no y. One pass over the tokens each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from imm.ops import triton_kernels
from imm.ops.dispatch import Request
from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.registry import no_second_derivative, register, register_autograd, register_tangents


def _check(x: Tensor, y: Tensor | None, modulations: dict[str, Tensor], eps: float) -> None:
    if x.dim() != 3 or x.shape[2] < 1:
        raise ValueError(f"x: expected tokens [B, T, C] with C > 0, got {list(x.shape)}")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y: expected {list(x.shape)} as x has, got {list(y.shape)}")
    for name, value in (("x", x), ("y", y), *modulations.items()):
        if value is None:
            continue
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected the device {x.device}, got {value.device}")
    (_, first), *others = modulations.items()
    for name, value in modulations.items():
        if value.dim() != 2 or value.shape[0] not in (1, x.shape[0]) or value.shape[1] != x.shape[2]:
            raise ValueError(f"{name}: expected [{x.shape[0]}, {x.shape[2]}] or [1, {x.shape[2]}], got {list(value.shape)}")
    for name, value in others:
        if value.shape != first.shape or value.dtype != first.dtype:
            raise ValueError(
                f"{name}: expected {list(first.shape)} of {first.dtype} as the other modulations, "
                f"got {list(value.shape)} of {value.dtype}"
            )
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


def _check_plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _check(x, None, {"shift": shift, "scale": scale}, eps)


def _check_plain_bwd(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> None:
    _check(x, grad, {"scale": scale}, eps)


def _check_gated(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _check(x, y, {"gate": gate, "shift": shift, "scale": scale}, eps)


def _normalised(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(z - mean) / std and 1 / std, [B, T, C] and [B, T, 1]."""
    centred = z - z.mean(2, keepdim=True)
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _modulated(z: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(z, z.shape[2:], eps=eps) * (1.0 + scale[:, None]) + shift[:, None]


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Reference of imm::adaln_modulate: tokens [B, T, C], modulations [B, C] or [1, C] -> [B, T, C]."""
    dtype = accumulate_dtype(x.dtype)
    return _modulated(x.to(dtype), shift.to(dtype), scale.to(dtype), eps).to(x.dtype).contiguous()


def _over_tokens(value: Tensor, like: Tensor) -> Tensor:
    """The gradient of a modulation: summed over tokens, and over images where one modulation is for all."""
    total = value.sum(1)
    return (total.sum(0, keepdim=True) if like.shape[0] == 1 else total).to(like.dtype)


def _norm_bwd(grad: Tensor, z: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradient of the modulated norm to z, and the normalised z, in z's dtype."""
    normalised, rstd = _normalised(z, eps)
    up = grad * (1.0 + scale[:, None])
    return rstd * (up - up.mean(2, keepdim=True) - normalised * (up * normalised).mean(2, keepdim=True)), normalised


def adaln_modulate_bwd(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`adaln_modulate` to x, shift and scale."""
    dtype = accumulate_dtype(x.dtype)
    up = grad.to(dtype)
    grad_x, normalised = _norm_bwd(up, x.to(dtype), scale.to(dtype), eps)
    return grad_x.to(x.dtype).contiguous(), _over_tokens(up, scale), _over_tokens(up * normalised, scale)


def gated_residual_adaln(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Reference of imm::gated_residual_adaln: tokens x, y [B, T, C], modulations [B, C] or [1, C] -> z, h [B, T, C]."""
    dtype = accumulate_dtype(x.dtype)
    z = x.to(dtype) + gate.to(dtype)[:, None] * y.to(dtype)
    h = _modulated(z, shift.to(dtype), scale.to(dtype), eps)
    return z.to(x.dtype).contiguous(), h.to(y.dtype).contiguous()


def gated_residual_adaln_bwd(
    grad_z: Tensor, grad_h: Tensor, z: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_residual_adaln` to x, y, gate, shift and scale; z is its first result."""
    dtype = accumulate_dtype(z.dtype)
    up = grad_h.to(dtype)
    grad_norm, normalised = _norm_bwd(up, z.to(dtype), scale.to(dtype), eps)
    total = grad_z.to(dtype) + grad_norm
    return (
        total.to(z.dtype).contiguous(),
        (gate.to(dtype)[:, None] * total).to(y.dtype).contiguous(),
        _over_tokens(total * y.to(dtype), gate),
        _over_tokens(up, gate),
        _over_tokens(up * normalised, gate),
    )


def _modulated_jvp(
    z: Tensor, shift: Tensor, scale: Tensor, dz: Tensor, dshift: Tensor, dscale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The modulated norm of z and its tangent."""
    normalised, rstd = _normalised(z, eps)
    centred = dz - dz.mean(2, keepdim=True)
    slope = rstd * (centred - normalised * (normalised * centred).mean(2, keepdim=True))
    factor = 1.0 + scale[:, None]
    return normalised * factor + shift[:, None], slope * factor + normalised * dscale[:, None] + dshift[:, None]


def adaln_modulate_jvp(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dx: Tensor, dshift: Tensor, dscale: Tensor
) -> tuple[Tensor, ...]:
    """Reference of imm::adaln_modulate_jvp: h and its tangent, [B, T, C]."""
    x_, shift_, scale_, dx_, dshift_, dscale_ = (v.to(accumulate_dtype(x.dtype)) for v in (x, shift, scale, dx, dshift, dscale))
    return tuple(v.to(x.dtype).contiguous() for v in _modulated_jvp(x_, shift_, scale_, dx_, dshift_, dscale_, eps))


def gated_residual_adaln_jvp(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, *tangents: Tensor
) -> tuple[Tensor, ...]:
    """Reference of imm::gated_residual_adaln_jvp: z, h and their tangents along dx, dy, dgate, dshift and dscale, [B, T, C]."""
    dtype = accumulate_dtype(x.dtype)
    wide_y, wide_gate = y.to(dtype), gate.to(dtype)[:, None]
    dx, dy, dgate, dshift, dscale = (v.to(dtype) for v in tangents)
    z, dz = x.to(dtype) + wide_gate * wide_y, dx + dgate[:, None] * wide_y + wide_gate * dy
    h, dh = _modulated_jvp(z, shift.to(dtype), scale.to(dtype), dz, dshift, dscale, eps)
    return tuple(v.to(like.dtype).contiguous() for v, like in ((z, x), (h, y), (dz, x), (dh, y)))


def _check_bwd(grad_z: Tensor, grad_h: Tensor, z: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float) -> None:
    _check(z, y, {"gate": gate, "scale": scale}, eps)
    for name, value, like in (("grad_z", grad_z, z), ("grad_h", grad_h, y)):
        if value.shape != z.shape or value.dtype != like.dtype or value.device != z.device:
            raise ValueError(
                f"{name}: expected {list(z.shape)} of {like.dtype} on {z.device}, "
                f"got {list(value.shape)} of {value.dtype} on {value.device}"
            )


def _fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _fake_gated(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _fake_gated_bwd(
    grad_z: Tensor, grad_h: Tensor, z: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_gate, grad_shift, grad_scale = (gate.new_empty(gate.shape) for _ in range(3))
    return z.new_empty(z.shape), y.new_empty(y.shape), grad_gate, grad_shift, grad_scale


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.eps = eps


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    return *torch.ops.imm.adaln_modulate_bwd(grad, x, scale, ctx.eps), None


def _setup_gated(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, y, gate, _, scale, eps = inputs
    ctx.save_for_backward(output[0], y, gate, scale)
    ctx.eps = eps


def _backward_gated(ctx: Any, grad_z: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.imm.gated_residual_adaln_bwd(grad_z, grad_h, *ctx.saved_tensors, ctx.eps), None


def _too_wide(request: Request) -> str | None:
    from imm_kernels.adaln import LARGEST

    return f"holds up to {LARGEST} features, got {request.shape[2]}" if request.shape[2:] > (LARGEST,) else None


def _triton_bwd(grad: Tensor, x: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from imm_kernels import adaln

    grad_x, _, (grad_shift, grad_scale) = adaln.backward(None, grad, x, None, None, scale, eps)
    return grad_x, grad_shift, grad_scale


def _triton_gated_bwd(
    grad_z: Tensor, grad_h: Tensor, z: Tensor, y: Tensor, gate: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from imm_kernels import adaln

    grad_x, grad_y, (grad_shift, grad_scale, grad_gate) = adaln.backward(grad_z, grad_h, z, y, gate, scale, eps)
    assert grad_y is not None
    return grad_x, grad_y, grad_gate, grad_shift, grad_scale


for _op, _check_of, _reference, _fake_of, _launch in (
    ("adaln_modulate", _check_plain, adaln_modulate, _fake, "adaln.adaln_modulate"),
    ("adaln_modulate_bwd", _check_plain_bwd, adaln_modulate_bwd, _fake_bwd, _triton_bwd),
    ("gated_residual_adaln", _check_gated, gated_residual_adaln, _fake_gated, "adaln.gated_residual_adaln"),
    ("gated_residual_adaln_bwd", _check_bwd, gated_residual_adaln_bwd, _fake_gated_bwd, _triton_gated_bwd),
):
    register(
        _op,
        check=_check_of,
        reference=_reference,
        fake=_fake_of,
        native=("cpu",),
        triton=triton_kernels.implementation(_launch, *DTYPES, also=_too_wide),
    )
for _op, _jvp, _check_of, _fake_of, _backward_of, _setup_of in (
    ("adaln_modulate", adaln_modulate_jvp, _check_plain, _fake, _backward, _setup),
    ("gated_residual_adaln", gated_residual_adaln_jvp, _check_gated, _fake_gated, _backward_gated, _setup_gated),
):
    register_autograd(_op, _backward_of, _setup_of, tangents=True)
    register_tangents(
        _op,
        _jvp,
        check=_check_of,
        fake=_fake_of,
        backward=_backward_of,
        setup_context=_setup_of,
        native=("cpu",),
        triton=triton_kernels.implementation(f"adaln.{_op}_jvp", *DTYPES, also=_too_wide),
    )
no_second_derivative("adaln_modulate_bwd")
no_second_derivative("gated_residual_adaln_bwd")
