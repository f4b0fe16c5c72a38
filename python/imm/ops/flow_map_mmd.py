"""imm::flow_map_mmd: the MMD loss of a flow map's two branches and its gradient to the network's output, in one op.

Each branch's particles y = c_skip x + c_out g are formed from state x and network output g (paper section 4.2), compared by
imm::mmd_loss, and the gradient is carried on to g_t: c_out_t dloss/dy_t. Particles stay in registers in float32 (float64 for a
float64 state), so that a network in 16 bits loses no digits of their differences; x, g and the gradient are all that moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imm.ops import triton_kernels
from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.mmd import TRITON_DTYPES, check_groups, check_loss, mmd_loss, mmd_loss_bwd, too_many_particles
from imm.ops.registry import gradients, no_second_derivative, only, register, register_autograd


class Arguments(NamedTuple):
    """Of imm::flow_map_mmd, in the order of its schema."""

    x_t: Tensor  # states, [G, M, D]
    x_r: Tensor
    g_t: Tensor  # outputs of the network, [G, M, D]
    g_r: Tensor
    c_skip_t: Tensor  # [G] float64, as the next three
    c_out_t: Tensor
    c_skip_r: Tensor
    c_out_r: Tensor
    scale: Tensor  # [G]
    weight: Tensor | None  # [G]
    upstream: Tensor | None  # [G] or [1]
    kernel: str
    bandwidths: Sequence[float]
    eps: float
    unbiased: bool

    @property
    def loss(self) -> tuple[Any, ...]:
        """What the loss takes beside particles."""
        return self[self._fields.index("scale") :]


def _check(*args: Any) -> None:
    a = Arguments(*args)
    check_loss(a.x_t, a.x_r, *a.loss, names=("x_t", "x_r"))
    for name, value in (("g_t", a.g_t), ("g_r", a.g_r)):
        if value.shape != a.x_t.shape:
            raise ValueError(f"{name}: expected the states' shape {list(a.x_t.shape)}, got {list(value.shape)}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a floating dtype of 16, 32 or 64 bits, got {value.dtype}")
        if value.device != a.x_t.device:
            raise ValueError(f"{name}: expected the device {a.x_t.device}, got {value.device}")
    for name in ("c_skip_t", "c_out_t", "c_skip_r", "c_out_r"):
        value = getattr(a, name)
        if value.shape != a.x_t.shape[:1]:
            raise ValueError(f"{name}: expected one number per group, [{a.x_t.shape[0]}], got {list(value.shape)}")
        if value.dtype != torch.float64:
            raise TypeError(f"{name}: expected float64, got {value.dtype}")
        if value.device != a.x_t.device:
            raise ValueError(f"{name}: expected the device {a.x_t.device}, got {value.device}")


def _particles(x: Tensor, g: Tensor, c_skip: Tensor, c_out: Tensor, dtype: torch.dtype) -> Tensor:
    c_skip, c_out = (c.to(dtype)[:, None, None] for c in (c_skip, c_out))
    return c_skip * x.to(dtype) + c_out * g.to(dtype)


def flow_map_mmd(*args: Any) -> tuple[Tensor, Tensor]:
    """Reference of imm::flow_map_mmd: :class:`Arguments` -> loss [G], gradient [G, M, D].

    The loss is float32 (float64 for float64 states); the gradient of sum(upstream loss) to g_t has g_t's dtype.
    """
    a = Arguments(*args)
    dtype = accumulate_dtype(a.x_t.dtype)
    y_t = _particles(a.x_t, a.g_t, a.c_skip_t, a.c_out_t, dtype)
    y_r = _particles(a.x_r, a.g_r, a.c_skip_r, a.c_out_r, dtype)
    loss, slopes = mmd_loss(y_t, y_r, a.scale, a.weight, a.kernel, a.bandwidths, a.eps, a.unbiased)
    upstream = torch.ones_like(loss) if a.upstream is None else a.upstream.expand(len(loss))
    grad = mmd_loss_bwd(upstream, slopes, y_t, y_r, a.weight, a.unbiased)
    return loss, (a.c_out_t.to(dtype)[:, None, None] * grad).to(a.g_t.dtype)


def flow_map_mmd_bwd(grad: Tensor, finished: Tensor, g_t: Tensor, upstream: Tensor | None) -> Tensor:
    """Reference of imm::flow_map_mmd_bwd: the gradient to g_t that was finished for ``upstream``, for ``grad`` [G] instead.

    g_t is not read; it ties the result to the network, so that a second derivative is an error and not zero.
    """
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
    return finished.new_empty(finished.shape)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    a = Arguments(*args)
    return a.x_t.new_empty((a.x_t.shape[0],), dtype=accumulate_dtype(a.x_t.dtype)), a.g_t.new_empty(a.g_t.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, (_, finished) = Arguments(*inputs), output
    only(ctx, a, {"g_t"}, "flow_map_mmd: the gradient goes to g_t only; detach the other arguments")
    ctx.mark_non_differentiable(finished)
    ctx.save_for_backward(finished, a.g_t, a.upstream)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return gradients(Arguments, g_t=torch.ops.imm.flow_map_mmd_bwd(grad, *ctx.saved_tensors))


register(
    "flow_map_mmd",
    check=_check,
    reference=flow_map_mmd,
    fake=_fake,
    native=("cpu",),
    triton=triton_kernels.implementation("mmd.flow_map_loss", *TRITON_DTYPES, also=too_many_particles),
)
register(
    "flow_map_mmd_bwd",
    check=_check_bwd,
    reference=flow_map_mmd_bwd,
    fake=_fake_bwd,
    triton=triton_kernels.implementation("mmd.rescaled", torch.float32),
)
register_autograd("flow_map_mmd", _backward, _setup)
no_second_derivative("flow_map_mmd_bwd")
