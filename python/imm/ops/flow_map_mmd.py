"""imm::flow_map_mmd: the MMD loss of a flow map's two branches and its gradient to the network's output, in one op.

Each branch's particles y = c_skip x + c_out g are formed from state x and network output g (paper section 4.2), compared by
imm::mmd_loss, and the gradient is carried on to g_t: c_out_t dloss/dy_t. Particles stay in registers in float32 (float64 for a
float64 state), so that a network in 16 bits loses no digits of their differences; x, g and the gradient are all that moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imm.ops import dispatch, triton_kernels
from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.mmd import TRITON_DTYPES, check_groups, check_loss, mmd_loss_grad, too_many_particles
from imm.ops.registry import check_out, no_second_derivative, refuse_gradients, register, register_autograd


def _check(
    x_t: Tensor,
    x_r: Tensor,
    g_t: Tensor,
    g_r: Tensor,
    c_skip_t: Tensor,
    c_out_t: Tensor,
    c_skip_r: Tensor,
    c_out_r: Tensor,
    *loss_arguments: Any,
) -> None:
    check_loss(x_t, x_r, *loss_arguments, names=("x_t", "x_r"))
    for name, value in (("g_t", g_t), ("g_r", g_r)):
        if value.shape != x_t.shape:
            raise ValueError(f"{name}: expected the states' shape {list(x_t.shape)}, got {list(value.shape)}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
        if value.device != x_t.device:
            raise ValueError(f"{name}: expected the device {x_t.device}, got {value.device}")
    for name, value in (("c_skip_t", c_skip_t), ("c_out_t", c_out_t), ("c_skip_r", c_skip_r), ("c_out_r", c_out_r)):
        if value.shape != x_t.shape[:1]:
            raise ValueError(f"{name}: expected one number per group, [{x_t.shape[0]}], got {list(value.shape)}")
        if value.dtype != torch.float64:
            raise TypeError(f"{name}: expected float64, got {value.dtype}")
        if value.device != x_t.device:
            raise ValueError(f"{name}: expected the device {x_t.device}, got {value.device}")


def _particles(x: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, dtype: torch.dtype) -> Tensor:
    c_skip, c_out = (c.to(dtype)[:, None, None] for c in (c_skip, c_out))
    return c_skip * x.to(dtype) + c_out * g.to(dtype)


def flow_map_mmd(
    x_t: Tensor,
    x_r: Tensor,
    g_t: Tensor,
    g_r: Tensor,
    c_skip_t: Tensor,
    c_out_t: Tensor,
    c_skip_r: Tensor,
    c_out_r: Tensor,
    *loss_arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Reference of imm::flow_map_mmd: states and outputs [G, M, D], float64 coefficients [G] -> loss [G], gradient [G, M, D].

    The loss is float32 (float64 for float64 states); the gradient of sum(upstream loss) to g_t has g_t's dtype.
    """
    _check(x_t, x_r, g_t, g_r, c_skip_t, c_out_t, c_skip_r, c_out_r, *loss_arguments)
    dtype = accumulate_dtype(x_t.dtype)
    y_t, y_r = _particles(x_t, g_t, c_skip_t, c_out_t, dtype), _particles(x_r, g_r, c_skip_r, c_out_r, dtype)
    loss, grad = mmd_loss_grad(y_t, y_r, *loss_arguments)
    return loss, (c_out_t.to(dtype)[:, None, None] * grad).to(g_t.dtype)


def flow_map_mmd_out(*args: Any, loss: Tensor, grad: Tensor) -> None:
    """Reference of imm::flow_map_mmd.out: :func:`flow_map_mmd` into tensors that the caller keeps across steps."""
    _check(*args)
    _check_out(args[0], args[2], loss, grad)
    refuse_gradients("flow_map_mmd", *args[:11], loss, grad)
    values = torch.ops.imm.flow_map_mmd(*args)
    loss.copy_(values[0])
    grad.copy_(values[1])


def flow_map_mmd_bwd(grad: Tensor, finished: Tensor, g_t: Tensor, upstream: Tensor | None) -> Tensor:
    """Reference of imm::flow_map_mmd_bwd: the gradient to g_t that was finished for ``upstream``, for ``grad`` [G] instead.

    g_t is not read; it ties the result to the network, so that a second derivative is an error and not zero.
    """
    _check_bwd(grad, finished, g_t, upstream)
    ratio = grad.double()
    if upstream is not None:  # a group that is left out has 0 for both
        ratio = torch.where(ratio == upstream.double(), 1.0, ratio / upstream.double())
    return (ratio[:, None, None].to(accumulate_dtype(finished.dtype)) * finished).to(finished.dtype).contiguous()


def _check_bwd(grad: Tensor, finished: Tensor, g_t: Tensor, upstream: Tensor | None) -> None:
    if finished.dim() != 3 or finished.shape != g_t.shape or finished.dtype != g_t.dtype or finished.dtype not in DTYPES:
        raise ValueError(
            f"finished and g_t: expected [G, M, D] of one floating dtype, got {list(finished.shape)} of {finished.dtype} and "
            f"{list(g_t.shape)} of {g_t.dtype}"
        )
    check_groups("grad", grad, finished)
    if upstream is not None:
        check_groups("upstream", upstream, finished, or_one=True)


def _fake_bwd(grad: Tensor, finished: Tensor, g_t: Tensor, upstream: Tensor | None) -> Tensor:
    _check_bwd(grad, finished, g_t, upstream)
    return finished.new_empty(finished.shape)


def _check_out(x_t: Tensor, g_t: Tensor, loss: Tensor, grad: Tensor) -> None:
    check_out("loss", loss, x_t.shape[:1], accumulate_dtype(x_t.dtype), x_t.device)
    check_out("grad", grad, g_t.shape, g_t.dtype, g_t.device)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    _check(*args)
    x_t, g_t = args[0], args[2]
    return x_t.new_empty((x_t.shape[0],), dtype=accumulate_dtype(x_t.dtype)), g_t.new_empty(g_t.shape)


def _fake_out(*args: Any, loss: Tensor, grad: Tensor) -> None:
    _check(*args)
    _check_out(args[0], args[2], loss, grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    if any(need for i, need in enumerate(ctx.needs_input_grad) if i != 2):
        raise RuntimeError("flow_map_mmd: the gradient goes to g_t only; detach the other arguments")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[2], inputs[10])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return None, None, torch.ops.imm.flow_map_mmd_bwd(grad, *ctx.saved_tensors), *[None] * 12


def _triton(*args: Any, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    _check(*args)
    from imm_kernels import mmd as kernels

    x_t, x_r, g_t, g_r, *numbers = args[:8]
    scale, weight, upstream, kernel, bandwidths, eps, unbiased = args[8:]
    what = kernels.Kernel(kernel, tuple(bandwidths), eps, unbiased)
    mix = kernels.Mix(x_t, x_r, *numbers)
    return kernels.loss_and_gradient(g_t, g_r, scale, weight, upstream, what, mix, out)


def _triton_out(*args: Any, loss: Tensor, grad: Tensor) -> None:
    _check(*args)
    _check_out(args[0], args[2], loss, grad)
    refuse_gradients("flow_map_mmd", *args[:11], loss, grad)
    triton_kernels.write(_triton, args, loss, grad)


def _row(run: Any) -> dispatch.Implementation:
    return triton_kernels.implementation(run, *TRITON_DTYPES, also=too_many_particles)


register("flow_map_mmd", reference=flow_map_mmd, fake=_fake, native=("cpu",), triton=_row(_triton))
register("flow_map_mmd.out", reference=flow_map_mmd_out, fake=_fake_out, native=("cpu",), triton=_row(_triton_out))
register("flow_map_mmd_bwd", reference=flow_map_mmd_bwd, fake=_fake_bwd)
register_autograd("flow_map_mmd", _backward, _setup)
no_second_derivative("flow_map_mmd_bwd")
