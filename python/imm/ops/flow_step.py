"""imm::flow_step: one step of a flow map, x_s = c_skip x + c_out (g_u + w (g - g_u)) + c_noise n (paper eq. 14, section C.5).

x is the state, g the network's output (g_u without a label, for guidance w), n the Philox noise of (seed, step). The result has
the state's dtype; arithmetic is float64 for a float64 state and float32 otherwise. The coefficients are float64, one per image
or one for all. Reads x, g (and g_u) once, writes x_s once. imm::sampling_step also writes what the network takes next, c_in x_s
in g's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.noise import check as check_noise
from imm.ops.registry import (
    check_out,
    gradients,
    no_result,
    no_second_derivative,
    only,
    refuse_gradients,
    register,
    register_autograd,
)


class Step(NamedTuple):
    """Arguments of imm::flow_step."""

    x: Tensor  # state, [B, ...]
    g: Tensor  # output of the network, [B, ...]
    c_skip: Tensor  # [1] or [B] float64, as the other coefficients
    c_out: Tensor
    g_uncond: Tensor | None
    guidance: Tensor | None
    c_noise: Tensor | None
    seeds: Tensor | None  # [B] int64
    step: int


def _check(*args: Any) -> None:
    a = Step(*args)
    if a.x.dim() < 1 or a.g.shape != a.x.shape:
        raise ValueError(f"x and g: expected the same shape [B, ...], got {list(a.x.shape)} and {list(a.g.shape)}")
    for name, value in (("x", a.x), ("g", a.g)):
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
    if (a.g_uncond is None) != (a.guidance is None):
        raise ValueError("g_uncond and guidance: expected both or neither")
    if (a.c_noise is None) != (a.seeds is None):
        raise ValueError("c_noise and seeds: expected both or neither")
    if a.g_uncond is not None and (a.g_uncond.shape != a.g.shape or a.g_uncond.dtype != a.g.dtype):
        got = f"{list(a.g_uncond.shape)} of {a.g_uncond.dtype}"
        raise ValueError(f"g_uncond: expected {list(a.g.shape)} of {a.g.dtype}, got {got}")
    for name in ("c_skip", "c_out", "guidance", "c_noise"):
        if (number := getattr(a, name)) is not None:
            _check_coefficient(name, number, a.x)
    if a.seeds is not None:
        if a.seeds.shape != a.x.shape[:1]:
            raise ValueError(f"seeds: expected one per image, [{a.x.shape[0]}], got {list(a.seeds.shape)}")
        check_noise(a.seeds, a.x.numel(), a.step)


def _check_coefficient(name: str, number: Tensor, x: Tensor) -> None:
    if number.dim() != 1 or number.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name}: expected [1] or [{x.shape[0]}], got {list(number.shape)}")
    if number.dtype != torch.float64:
        raise TypeError(f"{name}: expected float64, got {number.dtype}")


def _broadcast(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A [1] or [B] coefficient shaped to multiply a [B, ...] tensor."""
    return value.to(dtype).reshape(-1, *[1] * (like.dim() - 1))


def flow_step(*args: Any) -> Tensor:
    """Reference of imm::flow_step: :class:`Step` -> [B, ...]."""
    a = Step(*args)
    dtype = accumulate_dtype(a.x.dtype)
    output = a.g.to(dtype)
    if a.g_uncond is not None and a.guidance is not None:
        base = a.g_uncond.to(dtype)
        output = base + _broadcast(a.guidance, a.x, dtype) * (output - base)
    result = _broadcast(a.c_skip, a.x, dtype) * a.x.to(dtype) + _broadcast(a.c_out, a.x, dtype) * output
    if a.c_noise is not None and a.seeds is not None:
        normal = torch.ops.imm.noise(a.seeds, a.x[0].numel() if len(a.x) else 0, a.step).reshape(a.x.shape)
        result = result + _broadcast(a.c_noise, a.x, dtype) * normal.to(dtype)
    return result.to(a.x.dtype).contiguous()


def flow_step_out(*args: Any, out: Tensor) -> None:
    """Reference of imm::flow_step.out: :func:`flow_step` into ``out``, of the state's shape and dtype; ``out`` may be ``x``."""
    refuse_gradients("flow_step", *(a for a in args if isinstance(a, Tensor)), out)
    out.copy_(torch.ops.imm.flow_step(*args))


def flow_step_bwd(
    grad: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, g_uncond: Tensor | None, guidance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`flow_step` to x, g and g_uncond (empty where there is none)."""
    dtype = accumulate_dtype(grad.dtype)
    up = grad.to(dtype)
    grad_x = (_broadcast(c_skip, grad, dtype) * up).to(grad.dtype).contiguous()
    grad_g = _broadcast(c_out, grad, dtype) * up
    if g_uncond is None or guidance is None:
        return grad_x, grad_g.to(g.dtype).contiguous(), g.new_empty((0,))
    w = _broadcast(guidance, grad, dtype)
    return grad_x, (w * grad_g).to(g.dtype).contiguous(), ((1.0 - w) * grad_g).to(g.dtype).contiguous()


def _check_bwd(
    grad: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, g_uncond: Tensor | None, guidance: Tensor | None
) -> None:
    _check(grad, g, c_skip, c_out, g_uncond, guidance, None, None, 0)


def _check_out(*args: Any, out: Tensor) -> None:
    _check(*args)
    check_out("out", out, args[0].shape, args[0].dtype, args[0].device)


def sampling_step(*args: Any) -> tuple[Tensor, Tensor]:
    """Reference of imm::sampling_step: :class:`Step`, c_in [1] or [B], copies -> x_s of :func:`flow_step`; c_in x_s ``copies``
    times over, [copies B, ...] in g's dtype."""
    *step, c_in, copies = args
    x_s = torch.ops.imm.flow_step(*step)
    dtype = accumulate_dtype(x_s.dtype)
    scaled = (_broadcast(c_in, x_s, dtype) * x_s.to(dtype)).to(Step(*step).g.dtype)
    return x_s, scaled.expand(copies, *scaled.shape).flatten(0, 1).contiguous()


def sampling_step_out(*args: Any, out: Tensor, input: Tensor) -> None:
    """Reference of imm::sampling_step.out: :func:`sampling_step` into memory that the caller keeps; ``out`` may be ``x``."""
    refuse_gradients("sampling_step", *(a for a in args if isinstance(a, Tensor)), out, input)
    x_s, scaled = torch.ops.imm.sampling_step(*args)
    out.copy_(x_s)
    input.copy_(scaled)


def _check_sampling(*args: Any) -> None:
    *step, c_in, copies = args
    _check(*step)
    _check_coefficient("c_in", c_in, Step(*step).x)
    if copies < 1:
        raise ValueError(f"copies: expected a count >= 1, got {copies}")


def _check_sampling_out(*args: Any, out: Tensor, input: Tensor) -> None:
    _check_sampling(*args)
    *step, _, copies = args
    a = Step(*step)
    check_out("out", out, a.x.shape, a.x.dtype, a.x.device)
    check_out("input", input, _input_shape(a, copies), a.g.dtype, a.x.device)


def _input_shape(a: Step, copies: int) -> torch.Size:
    return torch.Size((copies * a.x.shape[0], *a.x.shape[1:]))


def _fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_sampling(*args: Any) -> tuple[Tensor, Tensor]:
    *step, _, copies = args
    a = Step(*step)
    return a.x.new_empty(a.x.shape), a.g.new_empty(_input_shape(a, copies))


def _fake_bwd(
    grad: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, g_uncond: Tensor | None, guidance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    uncond = g.new_empty((0,)) if g_uncond is None else g.new_empty(g.shape)
    return grad.new_empty(grad.shape), g.new_empty(g.shape), uncond


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a = Step(*inputs)
    refusal = "flow_step: the gradient goes to x and the network outputs only; detach the coefficients"
    only(ctx, a, {"x", "g", "g_uncond"}, refusal)
    ctx.save_for_backward(a.g, a.c_skip, a.c_out, a.g_uncond, a.guidance)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_g, grad_uncond = torch.ops.imm.flow_step_bwd(grad, *ctx.saved_tensors)
    *_, guidance = ctx.saved_tensors
    return gradients(Step, x=grad_x, g=grad_g, g_uncond=None if guidance is None else grad_uncond)


_DEVICES = ("cpu", "cuda")
register("flow_step", check=_check, reference=flow_step, fake=_fake, native=_DEVICES)
register("flow_step.out", check=_check_out, reference=flow_step_out, fake=no_result, native=_DEVICES)
register("sampling_step", check=_check_sampling, reference=sampling_step, fake=_fake_sampling, native=_DEVICES)
register("sampling_step.out", check=_check_sampling_out, reference=sampling_step_out, fake=no_result, native=_DEVICES)
register("flow_step_bwd", check=_check_bwd, reference=flow_step_bwd, fake=_fake_bwd, native=_DEVICES)
register_autograd("flow_step", _backward, _setup)
no_second_derivative("flow_step_bwd")
no_second_derivative("sampling_step")
