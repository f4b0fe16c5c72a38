"""What every MMD kernel computes from squared distances: kernel values, slopes and their places in the loss.

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

import triton
import triton.language as tl


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


@triton.jit
def number(ptr, g, stride, HAS: tl.constexpr):
    """Group g's number in float32; 1 where absent."""
    if HAS:
        return tl.load(ptr + g * stride).to(tl.float32)
    else:
        return 1.0


@triton.jit
def source(ptr, group_stride, stride, x_ptr, x_group_stride, x_stride, c_skip_ptr, c_out_ptr, g, HAS_MIX: tl.constexpr):
    """Where a group's set is: pointer and row stride of y (or of g), of x, and the coefficients of y = c_skip x + c_out g."""
    if HAS_MIX:
        c_skip = tl.load(c_skip_ptr + g).to(tl.float32)
        c_out = tl.load(c_out_ptr + g).to(tl.float32)
        x_ptr += g * x_group_stride
        return (ptr + g * group_stride, tl.cast(stride, tl.int64), x_ptr, tl.cast(x_stride, tl.int64), c_skip, c_out)
    else:
        return (ptr + g * group_stride, tl.cast(stride, tl.int64), ptr, tl.cast(stride, tl.int64), 0.0, 1.0)
