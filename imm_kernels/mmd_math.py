"""What every MMD kernel takes, and computes from squared distances: kernel values, slopes and their places in the loss.

With d = max(||x - y||, eps), kappa = scale / D and a mean over the bandwidth factors b (k of scale b):
    laplace  k = exp(-kappa d)          slope = kappa k / d
    rbf      k = exp(-kappa d^2 / 2)    slope = kappa k
    imq      k = 1 / (1 + kappa d^2)    slope = 2 kappa k^2
    energy   k = -kappa d               slope = kappa / d
dk/dx = -slope (x - y), and slope = 0 where ||x - y|| <= eps. Values are k - 1 (k for energy), which keep their digits: the
ones of the three terms of the loss cancel exactly.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def expm1(x):
    """e^x - 1 to a few units in the last place: a Taylor polynomial near 0, where e^x - 1 would cancel."""
    near = tl.abs(x) < 0.5
    y = tl.where(near, x, 0.0)
    # x (1 + x/2 (1 + x/3 (1 + ...))); the first term left out is below 2e-9 of x.
    poly = 1.0 + y / 9.0
    for i in tl.static_range(8, 1, -1):
        poly = 1.0 + y * poly * (1.0 / i)
    return tl.where(near, y * poly, tl.exp(x) - 1.0)


@triton.jit
def value_and_slope(square, kappa, eps, KERNEL: tl.constexpr, BANDWIDTHS: tl.constexpr):
    """(k - 1, slope) of squared distances, in their dtype."""
    dist = tl.sqrt_rn(square)
    floored = tl.where(dist < eps, eps, dist)  # a NaN stays NaN
    value = tl.zeros_like(square)
    slope = tl.zeros_like(square)
    for i in tl.static_range(len(BANDWIDTHS)):
        rate = kappa * BANDWIDTHS[i]
        if KERNEL == "laplace":
            minus_one = expm1(-rate * floored)
            slope += rate * (minus_one + 1.0) / floored
        elif KERNEL == "rbf":
            minus_one = expm1(-0.5 * rate * floored * floored)
            slope += rate * (minus_one + 1.0)
        elif KERNEL == "imq":
            u = rate * floored * floored
            minus_one = -u / (1.0 + u)
            slope += 2.0 * rate / ((1.0 + u) * (1.0 + u))
        else:
            minus_one = -rate * floored
            slope += rate / floored
        value += minus_one
    share: tl.constexpr = 1.0 / len(BANDWIDTHS)
    return value * share, tl.where(dist <= eps, 0.0, slope * share)


@triton.constexpr_function
def share(M, UNBIASED):
    """What a pair's slope counts in the gradient: 2 over the number of ordered pairs."""
    return 2.0 / (M * (M - 1) if UNBIASED else M * M)


class Number(NamedTuple):
    """One number a group; a stride of 0 is one for all groups."""

    ptr: Any
    stride: Any


class Set(NamedTuple):
    """A set of particles, with strides of a group and a particle: y [G, M, D] or, of a flow map, network output y and state x
    with float64 coefficients [G], whose particles are c_skip x + c_out y. Features are neighbours in memory.
    """

    y: Any
    y_group: Any
    y_row: Any
    x: Any = None
    x_group: Any = None
    x_row: Any = None
    c_skip: Any = None
    c_out: Any = None


def set_of(y: Tensor, x: Tensor | None = None, c_skip: Tensor | None = None, c_out: Tensor | None = None) -> Set:
    """The :class:`Set` of y [G, M, D] and, of a flow map, x and its coefficients [G]; copied where features are apart."""
    y = y if y.stride(2) == 1 or y.shape[2] == 1 else y.contiguous()
    if x is None or c_skip is None or c_out is None:
        return Set(y, y.stride(0), y.stride(1))
    x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
    return Set(y, y.stride(0), y.stride(1), x, x.stride(0), x.stride(1), c_skip.contiguous(), c_out.contiguous())


def number_of(value: Tensor | None) -> Number | None:
    """The :class:`Number` of a tensor [G], or [1] for all groups. Triton compiles for each stride that it meets: 0 and 1."""
    if value is None:
        return None
    return Number(value, 0) if value.shape[0] == 1 or value.stride(0) == 0 else Number(value.contiguous(), 1)


class Rows(NamedTuple):
    """The particles of one group of a :class:`Set`; y_row is a 64-bit stride, state is empty but for a flow map."""

    y: Any
    y_row: Any
    state: Any


class State(NamedTuple):
    """Of a flow map: x with a 64-bit stride, and float32 coefficients."""

    x: Any
    x_row: Any
    c_skip: Any
    c_out: Any


@triton.jit
def load_number(number, g):
    """Group g's number in float32; 1 where there is none."""
    if number is None:
        return 1.0
    else:
        return tl.load(number.ptr + g * number.stride).to(tl.float32)


@triton.jit
def rows_of(of, g):
    """The :class:`Rows` of group g of a set."""
    y = of.y + g * of.y_group
    y_row = tl.cast(of.y_row, tl.int64)
    if of.x is None:
        return Rows(y, y_row, ())
    else:
        c_skip = tl.load(of.c_skip + g).to(tl.float32)
        c_out = tl.load(of.c_out + g).to(tl.float32)
        return Rows(y, y_row, State(of.x + g * of.x_group, tl.cast(of.x_row, tl.int64), c_skip, c_out))


@triton.jit
def c_out(of):
    """What a gradient to a group's particles is multiplied by."""
    if len(of.state) == 0:
        return 1.0
    else:
        return of.state.c_out


@triton.jit
def load_row(of, j, offs, mask):
    """Features offs of the particles at j, in the dtype of y or, of a flow map, float32; zeros outside the mask."""
    values = tl.load(of.y + j * of.y_row + offs, mask=mask, other=0.0)
    if len(of.state) > 0:
        x = tl.load(of.state.x + j * of.state.x_row + offs, mask=mask, other=0.0)
        values = of.state.c_skip * x.to(tl.float32) + of.state.c_out * values.to(tl.float32)
    return values
