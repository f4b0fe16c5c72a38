"""The public face of the op layer: pure functions of tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral

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
        scale: kernel scale per group, ``[G]``, >= 0 (``1 / |c_out(s, t)|`` in IMM).
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


def energy_score(
    x: Tensor,
    y: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    draws: int | None = None,
    seed: Tensor | int | None = None,
    alpha: float = 1.0,
    pair_weight: float | None = None,
    weight: Tensor | float | None = None,
    scale: Tensor | float | None = None,
    kernel: str = "energy",
    bandwidths: Sequence[float] = (1.0,),
) -> Tensor:
    """Energy score of an ensemble x against targets y, group by group: a proper scoring rule, to be minimised.

    ``loss_g = weight_g (2 mean_jm d(x_j, y_m) - a sum_{j != k} d(x_j, x_k))`` with ``a = (N - 1 + alpha) / (N^2 (N - 1))`` and
    d the Euclidean distance times scale; for the other kernels k of :func:`mmd_loss`, d is 1 - k. The term of the targets among
    themselves, which x does not move, is left out. ``docs/howto/ensembles.md`` compares the conventions of others.

    Targets are given, as ``y``, or drawn: ``mean + exp(log_std) n`` with n the :func:`noise` of seed + g, element m D + d, step
    0, to 4e-6. The kernels draw them where they use them, and never write them.

    Args:
        x: members that learn, ``[G, N, D]``, floating, of any strides.
        y: targets, ``[G, M, D]`` of x's dtype.
        mean, log_std: ``[G, D]`` of x's dtype, in place of y; D divisible by 4.
        draws: M, the number of targets that are drawn, >= 1.
        seed: of the draws, an integer in [0, 2^63) or a ``[1]`` int64 tensor on x's device; another one for each step.
        alpha: in [0, 1]: 0 weighs pairs as the V-statistic, 1 as the fair score (unbiased; Ferro 2014), between them almost
            fair (Lang et al. 2024: eps = (1 - alpha) / N). 0 where N = 1.
        pair_weight: a itself, where another convention sets it; it takes alpha's place.
        weight: per group, ``[G]``, or one number. Weight 0 is a mask: the group's loss and gradient are exactly 0, whatever its
            numbers, NaN too.
        scale: of the kernel, ``[G]`` or one number >= 0; None for 1.
        kernel, bandwidths: as in :func:`mmd_loss`.

    Returns:
        ``[G]``, float32 (float64 for float64 x), differentiable in x once. A pair at distance 0 has no gradient.

    Raises:
        ValueError, TypeError: arguments other than these.
        RuntimeError: a gradient asked for anything but x.

    Example:
        >>> x = torch.randn(5, 8, 16, requires_grad=True)
        >>> energy_score(x, torch.randn(5, 1, 16)).mean().backward()
    """
    drawn = {"mean": mean, "log_std": log_std, "draws": draws, "seed": seed}
    missing = [name for name, value in drawn.items() if value is None]
    if (y is None) == (len(missing) == len(drawn)) or (y is None and missing):
        given = [name for name, value in (("y", y), *drawn.items()) if value is not None]
        raise ValueError(f"y: expected y, or all of mean, log_std, draws and seed, got {given}")
    factor = 1.0
    if weight is not None and not isinstance(weight, Tensor):
        factor, weight = float(weight), None
    if scale is not None and not isinstance(scale, Tensor):
        if not scale >= 0:
            raise ValueError(f"scale: expected a number >= 0, got {scale}")
        if kernel == "energy":
            factor, scale = factor * scale, None
        else:
            scale = torch.full((1,), float(scale), device=x.device)
    if seed is not None and not isinstance(seed, Tensor):
        if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an integer in [0, 2^63) or a [1] int64 tensor, got {seed!r}")
        seed = torch.full((1,), int(seed), dtype=torch.int64, device=x.device)
    targets = (y, None, None, 0) if y is not None else (mean, log_std, seed, draws)
    numbers = scale, weight, factor, float(alpha), pair_weight, kernel, list(bandwidths)
    return torch.ops.imm.energy_score(x, *targets, *numbers)[0]


def crps(ensemble: Tensor, observation: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Continuous ranked probability score of an ensemble: ``mean_j |x_j - y| - (a / 2) sum_{j != k} |x_j - x_k|``.

    It is half the :func:`energy_score` of D = 1, with the same ``a = (N - 1 + alpha) / (N^2 (N - 1))``, number by number.

    Args:
        ensemble: N members, ``[N, ...]``, floating; copied where its numbers are not one after the other in memory.
        observation: ``[...]`` of the same dtype.
        alpha: as in :func:`energy_score`: 0 for the CRPS of the members' distribution, 1 fair, 0.95 as Lang et al. train.

    Returns:
        ``[...]``, float32 (float64 for float64 members), differentiable in the ensemble once. Of one member (alpha 0) it is the
        absolute error.

    Raises:
        ValueError, TypeError: arguments other than these.
        RuntimeError: a gradient asked for the observation.

    Example:
        >>> members = torch.randn(8, 2, 32, 64, requires_grad=True)
        >>> crps(members, torch.randn(2, 32, 64)).mean().backward()
    """
    if ensemble.dim() == 0 or len(ensemble) == 0 or ensemble.shape[1:] != observation.shape:
        expected = ["N", *observation.shape]
        raise ValueError(f"ensemble: expected {expected} with N > 0 for this observation, got {list(ensemble.shape)}")
    members, targets = ensemble.reshape(len(ensemble), -1).t().unsqueeze(2), observation.reshape(-1, 1, 1)
    numbers = None, None, 0.5, float(alpha), None, "energy", [1.0]
    return torch.ops.imm.energy_score(members, targets, None, None, 0, *numbers)[0].reshape(observation.shape)


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
