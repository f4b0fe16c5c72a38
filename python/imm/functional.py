"""The public face of the op layer: pure functions of tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

import imm.ops  # noqa: F401  (registers torch.ops.imm)
from imm.ops.timestep_embedding import MAX_PERIOD
from imm.schedules import Time, as_time

#: "v": the paper's V-statistic, all pairs; "u": the unbiased U-statistic, pairs j != k (Gretton et al. 2012, eq. 4).
ESTIMATORS = ("v", "u")


def _unbiased(estimator: str) -> bool:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: expected one of {list(ESTIMATORS)}, got {estimator!r}")
    return estimator == "u"


def mmd_loss(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    kernel: str = "laplace",
    bandwidths: Sequence[float] = (1.0,),
    eps: float = 1e-8,
    estimator: str = "v",
) -> Tensor:
    """Squared maximum mean discrepancy between two sets of particles, group by group (paper eq. 67).

    ``loss_g = weight_g mean_jk [k(t_j, t_k) + k(r_j, r_k) - 2 k(t_j, r_k)]`` over all j, k ("v", the paper's) or over j != k
    ("u", unbiased, may be negative). With d = max(||x - y||_2, eps) over all D features of a particle, k is

    - ``laplace``: exp(-scale d / D)
    - ``rbf``: exp(-scale d^2 / (2 D))
    - ``imq``: 1 / (1 + scale d^2 / D)
    - ``energy``: -scale d / D (the loss is scale / D times the energy distance)

    Time O(G M^2 D), memory O(G M (M + D)).

    Args:
        y_t: particles that learn, ``[G, M, ...]``, floating.
        y_r: target particles, same shape and dtype; no gradient goes to them.
        scale: kernel scale per group, ``[G]``, >= 0 (1 / |c_out(s, t)| in IMM).
        weight: weight per group, ``[G]``, or None for 1.
        kernel: one of the above.
        bandwidths: k is the mean of the kernels of scale ``factor * scale`` over these positive factors; one for "energy".
        eps: floor on the norm, in the particles' units; closer pairs have zero gradient.
        estimator: "v" or "u"; "u" needs M >= 2.

    Returns:
        ``[G]``, float32 (float64 for float64 particles). Exactly 0 in float64 where ``y_r`` equals ``y_t``.

    Raises:
        ValueError, TypeError: shapes, dtypes or names other than these, a negative scale.
        RuntimeError: a gradient asked for ``y_r``, ``scale`` or ``weight``.

    Example:
        >>> y = torch.randn(2, 4, 3, 8, 8, requires_grad=True)
        >>> mmd_loss(y, torch.randn(2, 4, 3, 8, 8), torch.ones(2)).mean().backward()
    """
    if y_t.dim() < 3 or y_r.dim() < 3:
        raise ValueError(f"y_t and y_r: expected [G, M, ...], got {list(y_t.shape)} and {list(y_r.shape)}")
    arguments = scale, weight, kernel, list(bandwidths), float(eps), _unbiased(estimator)
    return torch.ops.imm.mmd_loss(y_t.flatten(2), y_r.flatten(2), *arguments)[0]


def flow_map_mmd_loss(
    x_t: Tensor,
    x_r: Tensor,
    g_t: Tensor,
    g_r: Tensor,
    c_skip_t: Time,
    c_out_t: Time,
    c_skip_r: Time,
    c_out_r: Time,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    upstream: Tensor | None = None,
    kernel: str = "laplace",
    bandwidths: Sequence[float] = (1.0,),
    eps: float = 1e-8,
    estimator: str = "v",
) -> Tensor:
    """:func:`mmd_loss` of a flow map's branches ``y = c_skip x + c_out g``, which are never written to memory.

    Args:
        x_t, x_r: states at times t and r, ``[G, M, ...]``, floating, one dtype.
        g_t, g_r: network outputs of the same shape, floating (any two dtypes); the gradient goes to ``g_t`` only.
        c_skip_t, c_out_t, c_skip_r, c_out_r: numbers or ``[G]`` tensors, taken as float64 (eq. 14, section C.5).
        upstream: what the loss of each group is about to be multiplied by on its way to the scalar that backward starts from,
            ``[G]`` or ``[1]``: 1 / G for a mean, times a gradient scaler's factor. The gradient is computed with the loss and
            multiplied by this factor before it is rounded; backward with another is right too. None for 1.
        scale, weight, kernel, bandwidths, eps, estimator: as in :func:`mmd_loss`.

    Returns:
        ``[G]``, float32 (float64 for float64 states), differentiable in ``g_t``.

    Raises:
        ValueError, TypeError: shapes, dtypes or names other than these, a negative scale.
        RuntimeError: a gradient asked for anything but ``g_t``.
    """
    branches = x_t, x_r, g_t, g_r
    if any(value.dim() < 3 for value in branches):
        raise ValueError(f"x_t, x_r, g_t and g_r: expected [G, M, ...], got {[list(v.shape) for v in branches]}")
    groups = len(x_t)
    coefficients = (_coefficient(c, x_t.device).expand(groups) for c in (c_skip_t, c_out_t, c_skip_r, c_out_r))
    arguments = scale, weight, upstream, kernel, list(bandwidths), float(eps), _unbiased(estimator)
    return torch.ops.imm.flow_map_mmd(*(v.flatten(2) for v in branches), *coefficients, *arguments)[0]


def mmd_gram(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    kernel: str = "laplace",
    bandwidths: Sequence[float] = (1.0,),
    eps: float = 1e-8,
) -> Tensor:
    """Kernel matrices ``k(x_j, y_k)`` group by group, with the kernels of :func:`mmd_loss`.

    Args:
        x: ``[G, Mx, ...]``, floating. y: ``[G, My, ...]``, same dtype and features.
        scale: ``[G]``, >= 0. kernel, bandwidths, eps: as in :func:`mmd_loss`.

    Returns:
        ``[G, Mx, My]``, float32 (float64 for float64 input), differentiable in x and y.

    Raises:
        ValueError, TypeError: shapes, dtypes or names other than these, a negative scale.
    """
    if x.dim() < 3 or y.dim() < 3:
        raise ValueError(f"x and y: expected [G, M, ...], got {list(x.shape)} and {list(y.shape)}")
    return torch.ops.imm.mmd_gram(x.flatten(2), y.flatten(2), scale, kernel, list(bandwidths), float(eps))


def timestep_attention(qkv: Tensor, heads: int) -> Tensor:
    """Attention of all tokens to all tokens, head by head: ``softmax(q k^T / sqrt(d)) v`` (paper section I.1, as in DiT).

    Without autocast: it computes in the dtype of ``qkv``, with sums in float32 (float64 for float64).

    Args:
        qkv: ``[B, T, 3 H d]``, floating: q, k and v of a token side by side, ``[H, d]`` each, as one projection writes them.
            T in 1..1024, d a multiple of 8 in 8..128. Any strides.
        heads: H, >= 1.

    Returns:
        ``[B, T, H d]``, contiguous, the dtype of ``qkv``; differentiable once.

    Raises:
        ValueError, TypeError: a shape or dtype other than these.
    """
    return torch.ops.imm.timestep_attention(qkv, heads)[0]


def _coefficient(value: Time, device: torch.device) -> Tensor:
    return as_time(value, device).reshape(-1)


def flow_step(
    x: Tensor,
    g: Tensor,
    c_skip: Time,
    c_out: Time,
    *,
    g_uncond: Tensor | None = None,
    guidance: Time | None = None,
    c_noise: Time | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """One step of a flow map: ``c_skip x + c_out (g_uncond + guidance (g - g_uncond)) + c_noise n(seed, step)``.

    Args:
        x: state, ``[B, ...]``, floating. g, g_uncond: network output with and without label, the state's shape, floating.
        c_skip, c_out, guidance, c_noise: numbers or ``[B]`` tensors, taken as float64.
        seeds: ``[B]`` int64 image seeds for the noise (see :func:`noise`); given with ``c_noise``.
        step: the sampling step that the noise belongs to.
        out: where to write, the state's shape and dtype; it may be ``x`` itself. Without gradients only.

    Returns:
        ``out``, or a new ``[B, ...]`` in the state's dtype, differentiable in x, g and g_uncond.

    Raises:
        ValueError, TypeError: shapes or dtypes other than these; g_uncond without guidance, c_noise without seeds.
    """
    arguments = (
        x,
        g,
        _coefficient(c_skip, x.device),
        _coefficient(c_out, x.device),
        g_uncond,
        None if guidance is None else _coefficient(guidance, x.device),
        None if c_noise is None else _coefficient(c_noise, x.device),
        seeds,
        step,
    )
    if out is None:
        return torch.ops.imm.flow_step(*arguments)
    torch.ops.imm.flow_step.out(*arguments, out=out)
    return out


def as_seeds(seeds: Tensor | Sequence[int] | range, device: torch.device | str | None = None) -> Tensor:
    """Image seeds as ``[B]`` int64. Raises ValueError for anything but integers in [0, 2^63)."""
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.dim() != 1:
            raise ValueError(f"seeds: expected a [B] int64 tensor, got {list(seeds.shape)} of {seeds.dtype}")
        if seeds.device.type == "cpu" and not torch.compiler.is_compiling() and bool((seeds < 0).any()):
            raise ValueError(f"seeds: expected integers in [0, 2^63), got {seeds.tolist()[:8]}")
        return seeds.to(device) if device is not None else seeds
    try:
        values = list(seeds)
    except TypeError as error:
        raise ValueError(f"seeds: expected a list or tensor of integers, one per image, got {seeds!r}") from error
    try:
        integers = [operator.index(v) for v in values]
    except TypeError as error:
        raise ValueError(f"seeds: expected integers in [0, 2^63), got {values[:8]}") from error
    if any(isinstance(v, bool) for v in values) or not all(0 <= v < 2**63 for v in integers):
        raise ValueError(f"seeds: expected integers in [0, 2^63), got {values[:8]}")
    return torch.tensor(integers, dtype=torch.int64, device=device)


def noise(
    seeds: Tensor | Sequence[int] | range,
    shape: Sequence[int],
    step: int = 0,
    *,
    scale: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Normal noise of each image's own: Philox4x32-10 with key = seed and counter = (step, element).

    Args:
        seeds: one integer in [0, 2^63) per image: a sequence or a ``[B]`` int64 tensor.
        shape: of one image, such as ``(3, 32, 32)``.
        step: sampling step >= 0; step 0 is the initial state.
        scale: standard deviation.
        device: where to; by default where ``seeds`` is.

    Returns:
        ``[B, *shape]`` float32, N(0, scale^2). An image's numbers do not depend on the other seeds, the batch or the device.

    Raises:
        ValueError, TypeError: seeds, shape or step other than these.
    """
    if any(n < 0 for n in shape):
        raise ValueError(f"shape: expected sizes >= 0, got {list(shape)}")
    tensor = as_seeds(seeds, device)
    return torch.ops.imm.noise(tensor, math.prod(shape), step, scale).reshape(len(tensor), *shape)


def timestep_embedding(
    t: Tensor, s: Tensor, dim: int, *, max_period: float = MAX_PERIOD, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The sinusoids of both times of a flow map: cos then sin of dim / 2 frequencies max_period^(-i / (dim / 2)).

    Args:
        t, s: scaled times, ``[B]``, floating; float64 keeps neighbouring times apart. The phase is float64 in any case.
        dim: even.
        max_period: > 1, in units of the scaled times.
        dtype: of the result.

    Returns:
        ``[2, B, dim]``, t's embedding first.

    Raises:
        ValueError, TypeError: arguments other than these.
    """
    return torch.ops.imm.timestep_embedding(t, s, dim, max_period, dtype)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6) -> Tensor:
    """LayerNorm over features, times 1 + scale, plus shift: ``(x - mean) / sqrt(var + eps) (1 + scale) + shift``.

    Args:
        x: tokens, ``[B, T, C]``, floating.
        shift, scale: ``[B, C]``, or ``[1, C]`` for all images alike; one dtype, which need not be x's.
        eps: > 0, added to the variance.

    Returns:
        ``[B, T, C]`` of x's dtype; arithmetic is float32 (float64 for float64 tokens). Gradients go to all three.

    Raises:
        ValueError, TypeError: arguments other than these.
    """
    return torch.ops.imm.adaln_modulate(x, shift, scale, eps)


def gated_residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """A gated residual and the modulated norm of what it gives, in one pass: ``z = x + gate y``, ``h = adaln_modulate(z)``.

    Args:
        x: the tokens of the residual stream, ``[B, T, C]``, floating.
        y: what attention or MLP adds, of x's shape; its dtype, which need not be x's, is that of the next layer's input.
        gate, shift, scale: ``[B, C]``, or ``[1, C]`` for all images alike; one dtype.
        eps: > 0, added to the variance.

    Returns:
        z of x's dtype and h of y's, ``[B, T, C]``; arithmetic is float32 (float64 for float64 tokens). Gradients go to all.

    Raises:
        ValueError, TypeError: arguments other than these.
    """
    return torch.ops.imm.gated_residual_adaln(x, y, gate, shift, scale, eps)
