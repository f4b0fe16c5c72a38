"""The native library: every CPU kernel against the float64 reference, equal bits over threads, bad input, loading, switches.

Sizes: M on both sides of the tiles of 4 and 8 rows, of packing (8) and of a block of 32 rows; D around the vectors (4 to 32
numbers) and the blocks of features. Left out: sizes whose M x M part does not fit memory; the fuzz test has them, as errors.
"""

import functools
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerance import assert_close, bound
from torch import Tensor

from imm.ops import adaln as adaln_ops
from imm.ops import dispatch, native
from imm.ops import flow_map_mmd as flow_map_ops
from imm.ops import flow_step as flow_step_ops
from imm.ops import mmd as mmd_ops
from imm.ops import noise as noise_ops
from imm.ops import timestep_embedding as timestep_ops

pytestmark = pytest.mark.skipif(native.status() is not None, reason=f"native library: {native.status()}")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.imm
EPS = 1e-8
LAPLACE = ("laplace", [1.0], EPS)
KERNELS = (LAPLACE, ("rbf", [0.5, 2.0], EPS), ("imq", [0.25, 1.0, 3.0], EPS), ("energy", [1.0], EPS))
kernels = pytest.mark.parametrize("kernel", KERNELS, ids=[name for name, *_ in KERNELS])


def particles(M: int, D: int, dtype: torch.dtype, G: int = 3, seed: int = 0, apart: float = 0.3) -> tuple[Tensor, ...]:
    """y_t, y_r (matched pairs close, as in training), scale, weight."""
    gen = torch.Generator().manual_seed(seed)
    y_t = torch.randn(G, M, D, generator=gen, dtype=torch.float64)
    y_r = y_t + apart * torch.randn(G, M, D, generator=gen, dtype=torch.float64)
    return y_t.to(dtype), y_r.to(dtype), 0.5 + torch.rand(G, generator=gen), 0.5 + torch.rand(G, generator=gen)


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value


def results(*found: Any) -> Any:
    """Pairs of the tensors that two forms of an op give, of one or of several."""
    return zip(*((v,) if isinstance(v, Tensor) else v for v in found), strict=True)


def assert_sum(got: Tensor, exact: Tensor, coefficient: Tensor, x: Tensor, y: Tensor) -> None:
    """got within the rounding of exact_j = sum_k coefficient_jk (x_j - y_k): what cancels counts with its size."""
    size = torch.zeros_like(exact)
    for k in range(y.shape[1]):
        size += coefficient[:, :, k, None].abs() * (x - y[:, k, None]).abs()
    assert got.shape == exact.shape
    error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
    limit = bound(got.dtype, size, x.shape[2] + y.shape[1])
    assert error <= limit, (error, limit)


def loss_and_gradient(of: Any, y_t: Tensor, y_r: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of its sum, by the native ops or by the references."""
    loss, slopes = of.mmd_loss(y_t, y_r, scale, None, *options)
    return loss, of.mmd_loss_bwd(torch.ones_like(loss), slopes, y_t, y_r, None, options[-1])


def check_mmd(
    y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: tuple[Any, ...], unbiased: bool = False
) -> None:
    """All MMD ops on one input, against the references in float64 on the same rounded numbers."""
    G, M, D = y_t.shape
    options = *kernel, unbiased and M > 1
    t, r, wide_scale, wide_weight = map(double, (y_t, y_r, scale, weight))
    exact, exact_slopes = mmd_ops.mmd_loss(t, r, wide_scale, wide_weight, *options)
    loss, slopes = OPS.mmd_loss(y_t, y_r, scale, weight, *options)
    # The loss is a difference of kernel means of size up to 1 - exp(...), so it is measured against those, not against itself.
    means, _ = mmd_ops._value_and_slope(mmd_ops._distance(t, r), wide_scale, D, *kernel)
    if G:
        assert (loss - exact).abs().max() <= bound(loss.dtype, means * (1.0 if weight is None else weight.max()), 4 * D)
    assert loss.dtype == slopes.dtype == torch.promote_types(y_t.dtype, torch.float32)
    assert slopes.shape == exact_slopes.shape
    # What is in the exponent, 16 and less here, multiplies the error of a squared distance.
    assert ((slopes.abs() - exact_slopes).abs() <= bound(slopes.dtype, torch.ones(1), 64 * D) * exact_slopes).all()
    # Gradients of size 1, so that 16 bits hold them.
    for upstream in (D**1.5 * torch.linspace(0.5, 1.5, G), torch.full((1,), D**1.5), None):
        up = torch.ones(1) if upstream is None else upstream
        factor = (up * (1.0 if weight is None else weight)).double().expand(G)[:, None, None]
        coefficient = factor * exact_slopes / mmd_ops._pairs(M, options[-1])
        grad = mmd_ops.mmd_loss_bwd(up.double().expand(G), exact_slopes, t, r, wide_weight, options[-1])
        # The signs of slopes are marks: those of others are none, or mean nothing.
        backward = [OPS.mmd_loss_bwd(up.expand(G), v, y_t, y_r, weight, options[-1]) for v in (slopes, slopes.abs(), -slopes)]
        if upstream is not None or y_t.dtype != torch.float16:
            for result in backward:
                assert_sum(result, grad, 2 * coefficient, t, torch.cat([t, r], 1))
    check_gram(y_t, y_r[:, : max(1, M - 1)], scale, kernel)


def check_gram(x: Tensor, y: Tensor, scale: Tensor, kernel: tuple[Any, ...]) -> None:
    wide = x.double(), y.double(), scale.double()
    gram = mmd_ops.mmd_gram(*wide, *kernel)
    assert_close(OPS.mmd_gram(x, y, scale, *kernel), gram, x.shape[2])
    up = x.shape[2] ** 1.5 * torch.sin(torch.arange(gram.numel())).reshape(gram.shape)
    _, slopes = mmd_ops._value_and_slope(mmd_ops._distance(*wide[:2]), wide[2], x.shape[2], *kernel)
    c = slopes * up
    got, exact = OPS.mmd_gram_bwd(up, x, y, scale, *kernel), mmd_ops.mmd_gram_bwd(up.double(), *wide, *kernel)
    assert_sum(got[0], exact[0], c, wide[0], wide[1])
    assert_sum(got[1], exact[1], c.transpose(1, 2), wide[1], wide[0])


@pytest.mark.every(5)
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 64])
def test_mmd_against_float64(M: int, dtype: torch.dtype, kernel: tuple[Any, ...]) -> None:
    sizes = (1, False), (3, True), (16, False), (37, False), (300, True), (3072, M % 2 == 0)
    for D, unbiased in sizes if M <= 16 or kernel is LAPLACE else sizes[:-1]:
        y_t, y_r, scale, weight = particles(M, D, dtype)
        check_mmd(y_t, y_r, scale, weight if D != 37 else None, kernel, unbiased)


@pytest.mark.every(5)
@kernels
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("M", [4, 16, 40])
def test_close_pairs_keep_their_digits(M: int, apart: float, kernel: tuple[Any, ...]) -> None:
    """Matched pairs, and others within and across the sets, far from the origin and close to each other."""
    for dtype in (torch.float32, torch.float64):
        y_t, y_r, scale, weight = particles(M, 515, dtype, apart=apart)
        y_t[:, 1], y_r[:, 0] = y_t[:, 0] + apart * y_t[:, 1], y_r[:, 1] + apart * y_r[:, 0]
        check_mmd(y_t, y_r, scale, weight, kernel)
        check_mmd(y_t + 3, y_r + 3, scale, weight, kernel, unbiased=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [6, 11])
def test_mmd_strides_and_empty(M: int, dtype: torch.dtype) -> None:
    y_t, y_r, scale, weight = particles(M, 40, dtype, G=4)
    permuted = y_t.transpose(0, 2).contiguous().transpose(0, 2)
    swapped = y_r.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([y_t, y_t], 2)[:, ::2, 3:40], torch.cat([y_r, y_r], 2)[:, 1::2, 3:40]
    check_mmd(permuted, swapped, scale, weight, LAPLACE)
    check_mmd(*(v[:, : M // 2] for v in sliced), scale, weight, KERNELS[1])
    check_mmd(y_t[..., ::2], y_r[..., 1::2], scale, weight, LAPLACE)
    expanded = y_t[:1].expand(4, M, 40), y_r[:, :1].expand(4, M, 40), scale[:1].expand(4), weight[:1].expand(4)
    check_mmd(*expanded, LAPLACE)
    check_mmd(y_t[..., :1].expand(4, M, 40), y_r, scale, None, LAPLACE)
    check_mmd(y_t[:0], y_r[:0], scale[:0], weight[:0], LAPLACE)


@kernels
@pytest.mark.parametrize("M", [5, 19])
def test_mmd_special_values(M: int, kernel: tuple[Any, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        y_t, y_r, scale, _ = particles(M, 37, dtype)
        for unbiased in (False, True):
            assert not OPS.mmd_loss(y_t, y_t.clone(), scale, None, *kernel, unbiased)[0].any()
            for value in (float("nan"), float("inf")):
                bad = y_t.clone()
                bad[1, 2, 3] = value
                loss, grad = loss_and_gradient(OPS, bad, y_r, scale, *kernel, unbiased)
                exact = loss_and_gradient(mmd_ops, *map(double, (bad, y_r, scale)), *kernel, unbiased)
                for got, want in zip((loss, grad), exact, strict=True):
                    torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-5)
                assert grad.isnan().any(2).any(1).tolist() == [False, True, False]
                assert loss[1].isnan() or value == float("inf")
        # Below the floor on the norm there is no gradient.
        _, grad = loss_and_gradient(OPS, y_r, y_r + 1e-6, scale, *kernel[:2], 1e3, False)
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.every(3)
@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 8, 9, 33])
def test_flow_map_mmd_against_float64(M: int, dtype: torch.dtype, kernel: tuple[Any, ...]) -> None:
    """The loss of the particles formed in the arithmetic dtype, for any dtypes of the two outputs."""
    for (t_dtype, r_dtype), D in zip(itertools.product(DTYPES, repeat=2), itertools.cycle((3, 37, 300)), strict=False):
        x_t, x_r, scale, weight = particles(M, D, dtype)
        g_t, g_r, *_ = particles(M, D, torch.float64, seed=1)
        g_t, g_r = g_t.to(t_dtype), g_r.to(r_dtype).transpose(0, 1).contiguous().transpose(0, 1)
        c = [torch.rand(3, generator=torch.manual_seed(i), dtype=torch.float64) + 0.2 for i in range(4)]
        upstream = torch.full((1,), D**1.5)
        options = weight, upstream, *kernel, D == 37 and M > 1
        loss, grad = OPS.flow_map_mmd(x_t, x_r, g_t, g_r, *c, scale, *options)
        assert (loss.dtype, grad.dtype) == (torch.promote_types(dtype, torch.float32), t_dtype)
        y_t = flow_map_ops._particles(x_t, g_t, c[0], c[1], loss.dtype)
        y_r = flow_map_ops._particles(x_r, g_r, c[2], c[3], loss.dtype)
        assert torch.equal(loss, OPS.mmd_loss(y_t, y_r, scale, weight, *options[2:])[0])
        t, r = y_t.double(), y_r.double()
        _, slopes = mmd_ops.mmd_loss(t, r, scale, weight, *options[2:])
        exact = mmd_ops.mmd_loss_bwd((upstream * c[1]).double(), slopes, t, r, weight, options[-1])
        size = 2 * slopes * (D**1.5 * c[1] * weight / mmd_ops._pairs(M, options[-1]))[:, None, None]
        # Numbers that are float64 for g_t's sake are no better than the arithmetic.
        result = grad.to(loss.dtype) if t_dtype == torch.float64 else grad
        assert_sum(result, exact, size, t, torch.cat([t, r], 1))
        up = torch.rand(3)
        for given in (upstream, None, up):
            assert torch.equal(OPS.flow_map_mmd_bwd(up, grad, g_t, given), flow_map_ops.flow_map_mmd_bwd(up, grad, g_t, given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
def test_flow_step_has_the_bits_of_the_reference(dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    for shape in ((3, 5), (2, 3, 16, 16), (1, 2077), (4, 0), (0, 7)):
        B = shape[0]
        x, g, u = (torch.randn(shape, generator=gen).to(d) for d in (dtype, g_dtype, g_dtype))
        c = [torch.rand(n, generator=gen, dtype=torch.float64) for n in (1, B, B, 1)]
        seeds = torch.arange(B) + 2**40
        for uncond, noisy in itertools.product((False, True), repeat=2):
            args = (x, g, c[0], c[1], u if uncond else None, c[2] if uncond else None)
            rest = (c[3] if noisy else None, seeds if noisy else None, 3)
            want = flow_step_ops.flow_step(*args, *rest)
            assert torch.equal(OPS.flow_step(*args, *rest), want)
            in_place = x.clone()
            OPS.flow_step(in_place, *args[1:], *rest, out=in_place)
            assert torch.equal(in_place, want)
            for a, b in zip(OPS.flow_step_bwd(*args), flow_step_ops.flow_step_bwd(*args), strict=True):
                assert torch.equal(a, b)


def adaln_calls(
    B: int, T: int, C: int, dtypes: tuple[torch.dtype, ...], shared: bool = False
) -> list[tuple[str, tuple[Any, ...]]]:
    """The six ops of adaLN and their arguments; dtypes of x, y and the modulations, which are chunks of one tensor."""
    eps = 1e-6 if C > 3 else 0.1  # few numbers may lie close together, and 1 / std multiplies the rounding of their mean
    gen = torch.Generator().manual_seed(B + T + C)
    x, grad_z, y, grad_h = (torch.randn(B, T, C, generator=gen).to(d) for d in (dtypes[0], dtypes[0], dtypes[1], dtypes[1]))
    modulations = torch.randn(1 if shared else B, 3 * C, generator=gen).to(dtypes[2])
    gate, shift, scale = (modulations[:, i * C : (i + 1) * C] for i in range(3))
    along = torch.randn(len(modulations), 3 * C, generator=gen).to(dtypes[2]).chunk(3, dim=1)  # of gate, shift, scale
    return [
        ("adaln_modulate", (x, shift, scale, eps)),
        ("adaln_modulate_bwd", (grad_h, x, scale, eps)),
        ("gated_residual_adaln", (x, y, gate, shift, scale, eps)),
        ("gated_residual_adaln_bwd", (grad_z, grad_h, x, y, gate, scale, eps)),
        ("adaln_modulate_jvp", (x, shift, scale, eps, grad_z, *along[1:])),
        ("gated_residual_adaln_jvp", (x, y, gate, shift, scale, eps, grad_z, grad_h, *along)),
    ]


def check_adaln(name: str, args: tuple[Any, ...]) -> None:
    got, exact = getattr(OPS, name)(*args), getattr(adaln_ops, name)(*map(double, args))
    x = args[{"adaln_modulate_bwd": 1, "gated_residual_adaln_bwd": 2}.get(name, 0)]
    for value, truth in results(got, exact):
        assert value.shape == truth.shape
        assert value.is_contiguous()
        # Numbers that are float64 for a modulation's sake are no better than the arithmetic.
        wide = value.dtype == torch.float64 and x.dtype != torch.float64
        terms = x.shape[2] if value.shape == x.shape else x.shape[0] * x.shape[1]
        assert_close(value, truth, terms, torch.float32 if wide else None)


@pytest.mark.parametrize("C", [1, 3, 17, 64, 384, 1152])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaln_against_float64(dtype: torch.dtype, C: int) -> None:
    for y_dtype, modulation_dtype in itertools.product(DTYPES, repeat=2):
        for B, T, shared in ((2, 5, False), (3, 2, True), (1, 70, False)):
            for name, args in adaln_calls(B, T, C, (dtype, y_dtype, modulation_dtype), shared):
                check_adaln(name, args)
    for name, args in adaln_calls(3, 200, C, (dtype, dtype, dtype)):
        check_adaln(name, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adaln_strides_and_empty(dtype: torch.dtype) -> None:
    layouts = (
        lambda v: v.transpose(0, -1).contiguous().transpose(0, -1),
        lambda v: torch.cat([v, v], -1)[..., ::2],
        lambda v: torch.cat([v, v], 0)[::2],
        lambda v: v[:1].expand(v.shape),
    )
    for layout in layouts:
        for name, args in adaln_calls(4, 6, 17, (dtype,) * 3):
            check_adaln(name, tuple(layout(a) if isinstance(a, Tensor) else a for a in args))
    for B, T, shared in ((0, 3, False), (0, 3, True), (2, 0, False), (2, 0, True), (1, 0, False)):
        for name, args in adaln_calls(B, T, 17, (dtype,) * 3, shared):
            check_adaln(name, args)
    (_, (x, y, gate, *_)), *_ = adaln_calls(2, 3, 5, (dtype,) * 3)[2:]
    z, _ = OPS.gated_residual_adaln(x, y, gate, gate, gate, 1e-6)
    assert torch.equal(z, adaln_ops.gated_residual_adaln(x, y, gate, gate, gate, 1e-6)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adaln_special_values_stay_in_their_token(value: float) -> None:
    for name, args in adaln_calls(3, 70, 17, (torch.float32,) * 3):
        for i, argument in enumerate(args):
            if not isinstance(argument, Tensor):
                continue
            bad = [a.clone() if isinstance(a, Tensor) else a for a in args]
            # A lane after the last whole vector, or an image's modulation.
            bad[i][(1, 66, 16) if argument.dim() == 3 else (1, 16)] = value
            got, want = getattr(OPS, name)(*bad), getattr(adaln_ops, name)(*bad)
            for a, b in results(got, want):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timestep_embedding_against_the_reference(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)
    for B, dim, s_dtype in itertools.product((0, 1, 5), (2, 6, 34, 256), DTYPES):
        t = (1000 * torch.rand(B, generator=gen, dtype=torch.float64)).to(dtype)
        s = torch.rand(2 * B, generator=gen).to(s_dtype)[::2]
        for out_dtype in DTYPES:
            got, want = (run.timestep_embedding(t, s, dim, 1e4, out_dtype) for run in (OPS, timestep_ops))
            assert got.dtype == out_dtype
            torch.testing.assert_close(got, want, rtol=torch.finfo(out_dtype).eps, atol=1e-12)
            along = t, s, dim, 1e4, out_dtype, torch.randn_like(t), torch.randn(B, generator=gen).to(s_dtype)
            for a, b in zip(*(run.timestep_embedding_jvp(*along) for run in (OPS, timestep_ops)), strict=True):
                torch.testing.assert_close(a, b, rtol=torch.finfo(out_dtype).eps, atol=1e-12)
            up = torch.randn(2, dim, B, generator=gen).to(out_dtype).transpose(1, 2)
            for a, b in zip(*(run.timestep_embedding_bwd(up, t, s, 1e4) for run in (OPS, timestep_ops)), strict=True):
                torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=1e-10)


def test_adaln_and_timestep_embedding_refuse_in_the_words_of_the_references() -> None:
    x, y, m, t = torch.ones(2, 3, 4), torch.ones(2, 3, 4).half(), torch.ones(2, 4), torch.ones(3)
    gated, modulate, gated_bwd = "gated_residual_adaln", "adaln_modulate", "gated_residual_adaln_bwd"
    embed, embed_bwd = "timestep_embedding", "timestep_embedding_bwd"
    for name, args in (
        (modulate, (x[0], m, m, 1e-6)),
        (modulate, (x[..., :0], m[:, :0], m[:, :0], 1e-6)),
        (modulate, (x.int(), m, m, 1e-6)),
        (modulate, (x, m.int(), m, 1e-6)),
        (modulate, (x, m, m[:, :3], 1e-6)),
        (modulate, (x, m[0], m, 1e-6)),
        (modulate, (x, m, m[:1], 1e-6)),
        (modulate, (x, m, m.double(), 1e-6)),
        (modulate, (x, m, m, -1.5)),
        (modulate, (x, m, m, float("nan"))),
        ("adaln_modulate_bwd", (x[:1], x, m, 1e-6)),
        ("adaln_modulate_jvp", (x, m, m, 1e-6, x, m[:1], m)),
        ("gated_residual_adaln_jvp", (x, y, m, m, m, 1e-6, x, x, m, m, m)),
        (gated, (x, y[:, :2], m, m, m, 1e-6)),
        (gated, (x, y.bool(), m, m, m, 1e-6)),
        (gated, (x, y, m, m, m.half(), 1e-6)),
        (gated_bwd, (x, y, x, y, m, m[:1], 1e-6)),
        (gated_bwd, (x[:1], y, x, y, m, m, 1e-6)),
        (gated_bwd, (x, x, x, y, m, m, 1e-6)),
        (embed, (x, x, 4, 100.0, torch.float32)),
        (embed, (t, t[:2], 4, 100.0, torch.float32)),
        (embed, (t, t.int(), 4, 100.0, torch.float32)),
        (embed, (t, t, 3, 100.0, torch.float32)),
        (embed, (t, t, 0, 100.0, torch.float32)),
        (embed, (t, t, 4, 0.5, torch.float32)),
        (embed, (t, t, 4, float("inf"), torch.float32)),
        (embed, (t, t, 4, 100.0, torch.int32)),
        ("timestep_embedding_jvp", (t, t, 4, 100.0, torch.float32, t, t.double())),
        (embed_bwd, (x[:1], t, t, 100.0)),
        (embed_bwd, (x, t[0], t[0], 100.0)),
        (embed_bwd, (torch.ones(2, 3, 5), t, t, 100.0)),
        (embed_bwd, (x.int(), t, t, 100.0)),
    ):
        want, got = _outcome(functools.partial(dispatch.run, name, "reference"), args), _outcome(getattr(OPS, name), args)
        assert isinstance(want, (ValueError, TypeError)), (name, args)
        assert (type(got), str(got)) == (type(want), str(want))


def test_noise_has_the_bits_of_the_reference() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, 123456789012345])
    for numel, step in ((0, 0), (1, 0), (5, 1), (1023, 2), (3072, 2**40), (100_003, 7)):
        want = noise_ops.noise(seeds, numel, step)
        assert torch.equal(OPS.noise(seeds, numel, step), want)
        assert torch.equal(OPS.noise(seeds, numel, step, 0.3), want * 0.3)
        for out in (torch.empty(5, numel), torch.zeros(5, 2 * numel)[:, ::2]):
            OPS.noise(seeds, numel, step, out=out)
            assert torch.equal(out, want)


def test_bits_do_not_depend_on_the_threads() -> None:
    def everything() -> list[Tensor]:
        results = []
        for dtype, M in itertools.product(DTYPES, (4, 7, 12, 40)):
            y_t, y_r, scale, weight = particles(M, 700, dtype, G=17)
            loss = scale, weight, None, *LAPLACE, False
            results += [*OPS.mmd_loss(y_t, y_r, scale, weight, *KERNELS[1], True)]
            results += [OPS.mmd_loss_bwd(scale.float(), results[-1].to(results[-2].dtype), y_t, y_r, weight, True)]
            one = torch.ones(17, dtype=torch.float64)
            results += [*OPS.flow_map_mmd(y_t, y_r, y_r, y_t, *[one] * 4, *loss)]
            gram = OPS.mmd_gram(y_t, y_r, scale, *LAPLACE)
            results += [gram, *OPS.mmd_gram_bwd(gram, y_t, y_r, scale, *LAPLACE)]
        for dtype, (B, T, C), shared in itertools.product(DTYPES, ((5, 130, 384), (1, 300, 17)), (False, True)):
            for name, args in adaln_calls(B, T, C, (dtype,) * 3, shared):
                result = getattr(OPS, name)(*args)
                results += [result] if isinstance(result, Tensor) else result
        times = torch.linspace(0, 1000, 50), torch.linspace(1, 0, 50)
        embedding = OPS.timestep_embedding(*times, 256, 1e4, torch.float32)
        results += [embedding, *OPS.timestep_embedding_bwd(embedding, *times, 1e4)]
        one, seeds = torch.ones(1, dtype=torch.float64), torch.arange(9)
        x = torch.randn(9, 9000, generator=torch.manual_seed(0))
        return [*results, OPS.noise(seeds, 9000, 1), OPS.flow_step(x, x, one, one, None, None, one, seeds, 1)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "D"), [(4, 1024), (4, 1029), (8, 1024), (32, 1024)])
def test_a_gradient_beyond_the_caches_has_the_bits_of_a_small_one(M: int, D: int, dtype: torch.dtype) -> None:
    """It is stored with non-temporal stores if it is aligned."""
    groups, small = 9_000_000 // (M * D * 4), 5
    y_t, y_r = (torch.randn(groups, M, D).to(dtype) for _ in range(2))
    slopes = OPS.mmd_loss(y_t, y_r, torch.ones(groups), None, *LAPLACE, False)[1]
    up = torch.ones(groups, dtype=slopes.dtype)
    parts = [slice(i, i + small) for i in range(0, groups, small)]
    wanted = [OPS.mmd_loss_bwd(up[part], slopes[part], y_t[part], y_r[part], None, False) for part in parts]
    assert torch.equal(OPS.mmd_loss_bwd(up, slopes, y_t, y_r, None, False), torch.cat(wanted))


def test_out_may_share_memory_with_inputs() -> None:
    memory, one = torch.arange(101, dtype=torch.float32), torch.ones(1, dtype=torch.float64)
    want = memory[None, :100] * 2
    out = memory[None, 1:]
    OPS.flow_step(memory[None, :100], memory[None, :100].clone(), one, one, None, None, None, None, 0, out=out)
    assert torch.equal(out, want)
    x = torch.randn(1, 100, requires_grad=True)
    with pytest.raises(RuntimeError, match="out= form has no derivative"):
        OPS.flow_step(x, x.detach(), one, one, None, None, None, None, 0, out=torch.empty(1, 100))


def _pick(rng: random.Random, tensor: Tensor) -> Tensor:
    """The tensor, or a variation: other strides, sizes, dtype, or huge by expansion."""
    kind = rng.randrange(12)
    if kind == 0 and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1 and tensor.dim() > 0:
        return tensor.narrow(rng.randrange(tensor.dim()), 0, 0) if tensor.numel() else tensor
    if kind == 2:
        return tensor.to(rng.choice([*DTYPES, torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn]))
    if kind == 3 and tensor.dim() > 0 and tensor.numel():
        return tensor[..., :1].expand(*tensor.shape[:-1], rng.choice([1, 5, 2**50]))
    if kind == 4 and tensor.dim() > 1 and tensor.numel():
        return tensor[:, :1].expand(tensor.shape[0], rng.choice([1, 4, 2**50]), *tensor.shape[2:])
    if kind == 5:
        return tensor[None]
    if kind == 6 and tensor.dim() > 0 and tensor.numel():
        return tensor[0]
    return tensor


def _outcome(run, args):
    try:
        return run(*[a.clone() if isinstance(a, Tensor) and a.numel() < 10**6 else a for a in args])
    except (ValueError, TypeError, RuntimeError) as error:
        return error


@pytest.mark.parametrize("seed", range(6))
def test_fuzz_raises_or_agrees(seed: int) -> None:
    rng, agreed, refused = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    for _ in range(100):
        G, M, D = rng.choice([0, 1, 2, 3]), rng.choice([0, 1, 2, 5]), rng.choice([0, 1, 3, 17])
        dtype = rng.choice(DTYPES)
        y_t, y_r, g1, g2 = torch.randn(G, M, D).to(dtype), torch.randn(G, M, D).to(dtype), torch.rand(G), torch.rand(G)
        scale, weight = _pick(rng, g1 - 0.02), rng.choice([None, _pick(rng, g2)])
        kernel = (
            rng.choice([*mmd_ops.KERNELS, *mmd_ops.KERNELS, "gauss"]),
            rng.choice([[1.0], [1.0], [0.5, 2.0], rng.choice([[], [-1.0], [float("nan")], [float("inf")]])]),
            rng.choice([1e-8, 1e-8, 0.5, 0.0, float("nan")]),
        )
        x, y = _pick(rng, y_t), _pick(rng, y_r)
        factors = [_pick(rng, torch.rand(G)), _pick(rng, torch.rand(1))]
        upstream = rng.choice([None, *(v for v in factors if v.shape != (1,) or v.is_floating_point())])
        loss = scale, weight, upstream, *kernel, rng.random() < 0.3
        slopes = _pick(rng, torch.randn(G, M, 2 * M).to(torch.promote_types(dtype, torch.float32)))
        c = [_pick(rng, torch.rand(rng.choice([1, G]), dtype=torch.float64)) for _ in range(4)]
        numbers = [rng.choice([v, torch.rand(G, dtype=torch.float64)]) for v in c]
        seeds, numel, step = _pick(rng, torch.arange(G)), rng.choice([-1, 0, 1, 9, 2**60]), rng.choice([-1, 0, 5, 2**62])
        g, u = y_r.to(rng.choice(DTYPES)), y_t.to(rng.choice(DTYPES))
        base, extra = rng.choice([(None, None), (u.to(g.dtype), c[2]), (u, None)]), rng.choice([(None, None), (c[3], seeds)])
        gram_up = _pick(rng, torch.randn(G, M, M))
        rows, rate = rng.choice([G, 1]), rng.choice([0.5, 0.5, 1.0, 1.0, 0.0, float("nan")])
        chunks = torch.randn(rows, 3 * D).to(rng.choice(DTYPES))
        gate, shift, factor = (_pick(rng, chunks[:, i * D : (i + 1) * D]) for i in range(3))
        up_x, up_y = _pick(rng, torch.randn(G, M, D).to(dtype)), _pick(rng, torch.randn(G, M, D).to(g.dtype))
        t, s = (_pick(rng, 100 * torch.rand(G).to(rng.choice(DTYPES))) for _ in range(2))
        dim, period = rng.choice([-2, 0, 2, 2, 3, 34, 2**60]), rng.choice([1e4, 1e4, 50.0, 1.0, float("inf")])
        embedding = _pick(rng, torch.randn(2, G, 6).to(dtype))
        for name, args in (
            ("mmd_loss", (x, y, scale, weight, *loss[3:])),
            ("mmd_loss_bwd", (_pick(rng, g2), slopes, x, y, weight, loss[-1])),
            ("flow_map_mmd", (x, y, g, _pick(rng, u), *numbers, *loss)),
            ("flow_map_mmd_bwd", (_pick(rng, g2), x, y, upstream)),
            ("mmd_gram", (x, y, scale, *kernel)),
            ("mmd_gram_bwd", (gram_up, x, y, scale, *kernel)),
            ("flow_step", (x, g, c[0], c[1], *base, *extra, step)),
            ("flow_step_bwd", (x, g, c[0], c[1], *base)),
            ("noise", (seeds, numel, step)),
            ("adaln_modulate", (x, shift, factor, rate)),
            ("adaln_modulate_bwd", (up_x, x, factor, rate)),
            ("gated_residual_adaln", (x, g, gate, shift, factor, rate)),
            ("gated_residual_adaln_bwd", (up_x, up_y, x, g, gate, factor, rate)),
            ("timestep_embedding", (t, s, dim, period, rng.choice([*DTYPES, torch.int64]))),
            ("timestep_embedding_bwd", (embedding, t, s, period)),
        ):
            want, got = _outcome(functools.partial(dispatch.run, name, "reference"), args), _outcome(getattr(OPS, name), args)
            described = name, [(a.shape, a.dtype, a.stride()) if isinstance(a, Tensor) else a for a in args], want, got
            if isinstance(want, Exception):
                out_of_memory = "alloc" in str(want)  # the kernel may need none where the result is empty
                assert isinstance(got, Exception) or (out_of_memory and got.numel() == 0), described
                if isinstance(want, (ValueError, TypeError)):
                    assert isinstance(got, type(want)), described
                refused += 1
                continue
            assert not isinstance(got, Exception), described
            agreed += 1
            if name == "mmd_loss":
                got = got[0], got[1].abs()  # the signs of slopes are the kernel's own notes
            for a, b in results(got, want):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), described
                eps_of = 4 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0
                torch.testing.assert_close(
                    a, b, rtol=max(eps_of, 1e-5), atol=max(eps_of, 1e-5), equal_nan=True, msg=str(described)
                )
    assert agreed > 30
    assert refused > 30


def _python(code: str, **environment: str) -> str:
    env = {**os.environ, **environment, "PYTHONWARNINGS": "error"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


REPORT = """
import torch
from imm.ops import dispatch, mmd, native
request = dispatch.Request(torch.device("cpu"), torch.float32)
y = torch.randn(2, 4, 37, generator=torch.manual_seed(0))
args = y, y.flip(0), torch.ones(2), None, "laplace", [1.0], 1e-8, False
slopes = torch.ops.imm.mmd_loss(*args)[1]
print(dispatch.select("mmd_loss", request).name, dispatch.select("noise", request).name, native.status(), sep="|")
print(*(g.item().hex() for g in slopes.flatten()[:8]))
distance, asked = mmd._distance, []
mmd._distance = lambda x, y: (asked.append(1), distance(x, y))[1]
torch.ops.imm.mmd_loss(*args)
print(len(asked) > 0)
"""


def test_imm_impl_switches_the_kernel() -> None:
    ours = _python(REPORT, IMM_IMPL="").splitlines()
    forced = _python(REPORT, IMM_IMPL="mmd_loss:reference").splitlines()
    assert ours[0] == "cpu|cpu|None"
    assert forced[0] == "reference|cpu|None"
    assert (ours[2], forced[2]) == ("False", "True")
    assert _python(REPORT, IMM_IMPL="mmd_loss:cpu").splitlines() == ours
    none = _python(REPORT, IMM_NATIVE="0").splitlines()
    assert none[0] == "reference|reference|IMM_NATIVE=0 asks for none"
    assert none[1:] == forced[1:]


@pytest.mark.parametrize("marks", ["not full", pytest.param("full", marks=pytest.mark.full)])
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str, marks: str) -> None:
    """The choice at run time follows torch's, and every instruction set passes the same checks."""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    selection = "special or empty or flow_step or noise or threads or adaln or timestep or tangent"
    selection += " or against_float64[4- or against_float64[9-"
    files = __file__, str(Path(__file__).with_name("test_attention.py"))
    command = [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider", "-k", f"({selection}) and not other"]
    command += ["-o", "addopts=-q", "-m", marks]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_a_library_for_another_torch_is_refused(tmp_path: Path) -> None:
    assert native.refusal(native._folder()) is None
    built = json.loads((native._folder() / "build.json").read_text())
    (tmp_path / "build.json").write_text(json.dumps({**built, "torch": "0.1"}))
    reason = f"built for torch 0.1, this is torch {torch.__version__}; rebuild"
    assert native.refusal(tmp_path) == reason
    assert _python("from imm.ops import native; print(native.status())", IMM_NATIVE_DIR=str(tmp_path)) == reason
    (tmp_path / "build.json").write_text(json.dumps({**built, "schemas": "0"}))
    assert native.refusal(tmp_path) == "built from another list of op schemas; rebuild"
    (tmp_path / "build.json").write_text("{")
    assert "unreadable" in str(native.refusal(tmp_path))
    assert native.refusal(tmp_path / "nowhere") == "not built: this is the pure install"
