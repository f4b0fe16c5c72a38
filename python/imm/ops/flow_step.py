"""imm::flow_step: one step of a flow map, x_s = c_skip x + c_out (g_u + w (g - g_u)) + c_noise n (paper eq. 14, section C.5).

x is the state, g the network's output (g_u without a label, for guidance w), n the Philox noise of (seed, step). The result has
the state's dtype; arithmetic is float64 for a float64 state and float32 otherwise. The coefficients are float64, one per image
or one for all. Reads x, g (and g_u) once, writes x_s once. imm::sampling_step also writes what the network takes next, c_in x_s
in g's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.noise import check as check_noise
from imm.ops.registry import check_out, no_second_derivative, refuse_gradients, register, register_autograd


def _check(
    x: Tensor,
    g: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    g_uncond: Tensor | None,
    guidance: Tensor | None,
    c_noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> None:
    if x.dim() < 1 or g.shape != x.shape:
        raise ValueError(f"x and g: expected the same shape [B, ...], got {list(x.shape)} and {list(g.shape)}")
    for name, value in (("x", x), ("g", g)):
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
    if (g_uncond is None) != (guidance is None):
        raise ValueError("g_uncond and guidance: expected both or neither")
    if (c_noise is None) != (seeds is None):
        raise ValueError("c_noise and seeds: expected both or neither")
    if g_uncond is not None and (g_uncond.shape != g.shape or g_uncond.dtype != g.dtype):
        raise ValueError(f"g_uncond: expected {list(g.shape)} of {g.dtype}, got {list(g_uncond.shape)} of {g_uncond.dtype}")
    for name, number in (("c_skip", c_skip), ("c_out", c_out), ("guidance", guidance), ("c_noise", c_noise)):
        if number is not None:
            _check_coefficient(name, number, x)
    if seeds is not None:
        if seeds.shape != x.shape[:1]:
            raise ValueError(f"seeds: expected one per image, [{x.shape[0]}], got {list(seeds.shape)}")
        check_noise(seeds, x.numel(), step)


def _check_coefficient(name: str, number: Tensor, x: Tensor) -> None:
    if number.dim() != 1 or number.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name}: expected [1] or [{x.shape[0]}], got {list(number.shape)}")
    if number.dtype != torch.float64:
        raise TypeError(f"{name}: expected float64, got {number.dtype}")


def _broadcast(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A [1] or [B] coefficient shaped to multiply a [B, ...] tensor."""
    return value.to(dtype).reshape(-1, *[1] * (like.dim() - 1))


def flow_step(
    x: Tensor,
    g: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    g_uncond: Tensor | None,
    guidance: Tensor | None,
    c_noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> Tensor:
    """Reference of imm::flow_step: [B, ...] state and network output(s), coefficients [1] or [B] -> [B, ...]."""
    _check(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step)
    dtype = accumulate_dtype(x.dtype)
    output = g.to(dtype)
    if g_uncond is not None and guidance is not None:
        base = g_uncond.to(dtype)
        output = base + _broadcast(guidance, x, dtype) * (output - base)
    result = _broadcast(c_skip, x, dtype) * x.to(dtype) + _broadcast(c_out, x, dtype) * output
    if c_noise is not None and seeds is not None:
        normal = torch.ops.imm.noise(seeds, x[0].numel() if len(x) else 0, step).reshape(x.shape)
        result = result + _broadcast(c_noise, x, dtype) * normal.to(dtype)
    return result.to(x.dtype).contiguous()


def flow_step_out(
    x: Tensor,
    g: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    g_uncond: Tensor | None,
    guidance: Tensor | None,
    c_noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
    *,
    out: Tensor,
) -> None:
    """Reference of imm::flow_step.out: :func:`flow_step` into ``out``, of the state's shape and dtype; ``out`` may be ``x``."""
    _check(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step)
    check_out("out", out, x.shape, x.dtype, x.device)
    refuse_gradients("flow_step", x, g, c_skip, c_out, g_uncond, guidance, c_noise, out)
    out.copy_(torch.ops.imm.flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step))


def flow_step_bwd(
    grad: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, g_uncond: Tensor | None, guidance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`flow_step` to x, g and g_uncond (empty where there is none)."""
    _check(grad, g, c_skip, c_out, g_uncond, guidance, None, None, 0)
    dtype = accumulate_dtype(grad.dtype)
    up = grad.to(dtype)
    grad_x = (_broadcast(c_skip, grad, dtype) * up).to(grad.dtype).contiguous()
    grad_g = _broadcast(c_out, grad, dtype) * up
    if g_uncond is None or guidance is None:
        return grad_x, grad_g.to(g.dtype).contiguous(), g.new_empty((0,))
    w = _broadcast(guidance, grad, dtype)
    return grad_x, (w * grad_g).to(g.dtype).contiguous(), ((1.0 - w) * grad_g).to(g.dtype).contiguous()


def _check_sampling(x: Tensor, *rest: Any) -> torch.Size:
    """Checks the arguments of :func:`sampling_step`; the shape of the network's input."""
    *step, c_in, copies = rest
    _check(x, *step)
    _check_coefficient("c_in", c_in, x)
    if copies < 1:
        raise ValueError(f"copies: expected a count >= 1, got {copies}")
    return torch.Size((copies * x.shape[0], *x.shape[1:]))


def sampling_step(
    x: Tensor,
    g: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    g_uncond: Tensor | None,
    guidance: Tensor | None,
    c_noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
    c_in: Tensor,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """Reference of imm::sampling_step: x_s of :func:`flow_step`; c_in x_s `copies` times over, [copies B, ...] in g's dtype."""
    shape = _check_sampling(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step, c_in, copies)
    x_s = torch.ops.imm.flow_step(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step)
    dtype = accumulate_dtype(x_s.dtype)
    scaled = (_broadcast(c_in, x_s, dtype) * x_s.to(dtype)).to(g.dtype)
    return x_s, scaled.expand(copies, *scaled.shape).reshape(shape).contiguous()


def sampling_step_out(*args: Any, out: Tensor, input: Tensor) -> None:
    """Reference of imm::sampling_step.out: :func:`sampling_step` into memory that the caller keeps; ``out`` may be ``x``."""
    _check_sampling_out(*args, out=out, input=input)
    refuse_gradients("sampling_step", *(a for a in args if isinstance(a, Tensor)), out, input)
    x_s, scaled = torch.ops.imm.sampling_step(*args)
    out.copy_(x_s)
    input.copy_(scaled)


def _check_sampling_out(*args: Any, out: Tensor, input: Tensor) -> None:
    shape = _check_sampling(*args)
    x, g = args[:2]
    check_out("out", out, x.shape, x.dtype, x.device)
    check_out("input", input, shape, g.dtype, x.device)


def _fake(
    x: Tensor,
    g: Tensor,
    c_skip: Tensor,
    c_out: Tensor,
    g_uncond: Tensor | None,
    guidance: Tensor | None,
    c_noise: Tensor | None,
    seeds: Tensor | None,
    step: int,
) -> Tensor:
    _check(x, g, c_skip, c_out, g_uncond, guidance, c_noise, seeds, step)
    return x.new_empty(x.shape)


def _fake_out(*args: Any, out: Tensor) -> None:
    _check(*args)
    check_out("out", out, args[0].shape, args[0].dtype, args[0].device)


def _fake_sampling(x: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), g.new_empty(_check_sampling(x, g, *rest))


def _fake_bwd(
    grad: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, g_uncond: Tensor | None, guidance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    uncond = g.new_empty((0,)) if g_uncond is None else g.new_empty(g.shape)
    return grad.new_empty(grad.shape), g.new_empty(g.shape), uncond


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, g, c_skip, c_out, g_uncond, guidance, *_ = inputs
    if any(ctx.needs_input_grad[i] for i in (2, 3, 5, 6)):
        raise RuntimeError("flow_step: the gradient goes to x and the network outputs only; detach the coefficients")
    ctx.save_for_backward(g, c_skip, c_out, g_uncond, guidance)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_g, grad_uncond = torch.ops.imm.flow_step_bwd(grad, *ctx.saved_tensors)
    no_guidance = ctx.saved_tensors[3] is None
    return grad_x, grad_g, None, None, None if no_guidance else grad_uncond, None, None, None, None


register("flow_step", reference=flow_step, fake=_fake, native=("cpu", "cuda"))
register("flow_step.out", reference=flow_step_out, fake=_fake_out, native=("cpu", "cuda"))
register("sampling_step", reference=sampling_step, fake=_fake_sampling, native=("cpu", "cuda"))
register("sampling_step.out", reference=sampling_step_out, fake=_check_sampling_out, native=("cpu", "cuda"))
register("flow_step_bwd", reference=flow_step_bwd, fake=_fake_bwd, native=("cpu", "cuda"))
register_autograd("flow_step", _backward, _setup)
no_second_derivative("flow_step_bwd")
no_second_derivative("sampling_step")
