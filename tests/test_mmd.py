"""imm::mmd_loss and imm::mmd_gram against float64 and against what is known in closed form."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import DATA
from tolerance import assert_close
from torch import Tensor

from imm import functional as F
from imm.ops import dispatch

#: G1: one group; M: alone, even, odd; D: one feature, prime, one above a vector, CIFAR. Large sizes are in the full suite.
SHAPES = [(1, 1, 1), (2, 2, 37), (3, 4, 257), (2, 7, 64), (5, 4, 3072)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["laplace", "rbf", "imq", "energy"]


def truth(
    y_t: Tensor,
    y_r: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    kernel: str,
    eps: float,
    bandwidths: tuple[float, ...] = (1.0,),
    estimator: str = "v",
) -> Tensor:
    """The formula, in float64, by broadcasting and autograd."""
    y_r, particles = y_r.double(), y_t.shape[1]

    def kernel_sum(x: Tensor, y: Tensor) -> Tensor:
        values = kernel_minus_one(x, y, scale, kernel, eps, bandwidths)
        return (values if estimator == "v" else values - torch.diag_embed(values.diagonal(0, 1, 2))).sum((1, 2))

    loss = kernel_sum(y_t, y_t) + kernel_sum(y_r, y_r) - 2 * kernel_sum(y_t, y_r)
    loss = loss / (particles**2 if estimator == "v" else particles * (particles - 1))
    return loss if weight is None else loss * weight.double()


def kernel_minus_one(
    x: Tensor, y: Tensor, scale: Tensor, kernel: str, eps: float = 1e-8, bandwidths: tuple[float, ...] = (1.0,)
) -> Tensor:
    """k(x_j, y_k) - 1 (k for energy), the mean over the bandwidths."""
    square = (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(eps**2)

    def of_scale(kappa: Tensor) -> Tensor:
        return {
            "laplace": lambda: torch.expm1(-kappa * square.sqrt()),
            "rbf": lambda: torch.expm1(-0.5 * kappa * square),
            "imq": lambda: -kappa * square / (1 + kappa * square),
            "energy": lambda: -kappa * square.sqrt(),
        }[kernel]()

    kappa = scale.double()[:, None, None] / x.shape[2]
    return torch.stack([of_scale(factor * kappa) for factor in bandwidths]).mean(0)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, apart: float = 1.0, kernel: str = "laplace"):
    """Particles ``apart`` from their targets, and a scale that puts the exponent of independent ones near 1."""
    groups, _, features = shape
    y_r = torch.randn(shape, device=device)
    y_t = (y_r + apart * torch.randn(shape, device=device)).to(dtype)
    scale = (math.sqrt(features) if kernel in ("laplace", "energy") else 1.0) * (
        torch.rand(groups, dtype=torch.float64, device=device) + 0.2
    )
    return y_t.requires_grad_(), y_r.to(dtype), scale, torch.rand(groups, dtype=torch.float64, device=device) + 0.5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_match_float64(shape, dtype, kernel, device) -> None:
    y_t, y_r, scale, weight = inputs(shape, dtype, device, kernel=kernel)
    loss = F.mmd_loss(y_t, y_r, scale, weight=weight, kernel=kernel)
    loss.mean().backward()
    exact = y_t.detach().double().requires_grad_()
    expected = truth(exact, y_r, scale, weight, kernel, 1e-8)
    expected.mean().backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert y_t.grad.dtype == dtype
    terms = shape[1] * shape[2]
    assert_close(loss, expected, terms)
    assert_close(y_t.grad, exact.grad, terms)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_and_gradients_match_float64(dtype, kernel, device) -> None:
    x, y, scale, _ = inputs((3, 4, 129), dtype, device, kernel=kernel)
    y = torch.cat([y, y[:, :1] + 1], 1).requires_grad_()
    upstream = torch.randn(3, 4, 5, device=device)
    gram = F.mmd_gram(x, y, scale, kernel=kernel)
    (gram * upstream).sum().backward()
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    expected = kernel_minus_one(a, b, scale, kernel) + (kernel != "energy")
    (expected * upstream).sum().backward()
    for value, exact in ((gram, expected), (x.grad, a.grad), (y.grad, b.grad)):
        assert_close(value, exact, 5 * 129)


@pytest.mark.parametrize("estimator", F.ESTIMATORS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("particles", [2, 4, 7, 9, 20])
def test_mixtures_and_estimators_match_float64(particles, kernel, estimator, device) -> None:
    bandwidths = (3.0,) if kernel == "energy" else (0.25, 1.0, 4.0)
    y_t, y_r, scale, weight = inputs((2, particles, 65), torch.float32, device, kernel=kernel)
    loss = F.mmd_loss(y_t, y_r, scale, weight=weight, kernel=kernel, bandwidths=bandwidths, estimator=estimator)
    loss.mean().backward()
    exact = y_t.detach().double().requires_grad_()
    expected = truth(exact, y_r, scale, weight, kernel, 1e-8, bandwidths, estimator)
    expected.mean().backward()
    # The terms of the loss have size 1 and more, and the unbiased one is near 0.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=2e-6)
    assert_close(y_t.grad, exact.grad, particles * 65)


def test_the_u_statistic_is_unbiased(device) -> None:
    """Also for particles coupled in pairs; the V-statistic is not."""
    gen = torch.Generator(device).manual_seed(0)
    y_t = torch.randn(40_000, 3, 2, dtype=torch.float64, device=device, generator=gen)
    other = torch.randn(40_000, 3, 2, dtype=torch.float64, device=device, generator=gen)
    one = torch.ones(len(y_t), device=device)
    for y_r in (other, 0.8 * y_t + 0.6 * other):  # either way normal, so the distributions are equal
        u, v = (F.mmd_loss(y_t, y_r, one, kernel="rbf", estimator=estimator) for estimator in ("u", "v"))
        assert abs(float(u.mean())) < 4 * float(u.std()) / math.sqrt(len(u))
        assert float(v.mean()) > 20 * float(v.std()) / math.sqrt(len(v))


@pytest.mark.parametrize("upstream", [None, 2.0**-12])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("particles", [1, 4, 12])
def test_flow_map_loss_is_the_loss_of_its_particles(particles, g_dtype, upstream, device) -> None:
    groups, shape = 3, (3, particles, 2, 5, 5)
    x_t, x_r, g_t, g_r = (torch.randn(shape, device=device) for _ in range(4))
    g_t, g_r = g_t.to(g_dtype).requires_grad_(), (0.5 * g_r).to(g_dtype)
    c = [torch.rand(groups, dtype=torch.float64, device=device) + 0.2 for _ in range(4)]
    scale, weight = torch.rand(2, groups, dtype=torch.float64, device=device) * 5
    up = None if upstream is None else torch.full((1,), upstream, device=device)
    arguments = {"weight": weight, "kernel": "imq", "bandwidths": (1.0, 2.0)}
    loss = F.flow_map_mmd_loss(x_t, x_r, g_t, g_r, *c, scale, upstream=up, **arguments)
    for factor in {upstream or 1.0, 0.5}:  # finished for this one, and another
        g_t.grad = None
        (factor * loss.sum()).backward(retain_graph=True)
        exact = g_t.detach().double().requires_grad_()
        wide = [v.reshape(-1, 1, 1, 1, 1) for v in c]
        y_t, y_r = wide[0] * x_t.double() + wide[1] * exact, wide[2] * x_r.double() + wide[3] * g_r.double()
        expected = F.mmd_loss(y_t, y_r, scale, **arguments)
        (factor * expected.sum()).backward()
        assert_close(loss, expected, 50 * particles)
        assert g_t.grad.dtype == g_dtype
        assert_close(g_t.grad, exact.grad, 50 * particles)


def test_a_gradient_is_memory_of_its_own(device) -> None:
    """Whatever becomes of one, the next backward pass gives the same; also of many at once."""
    x, g = torch.randn(3, 2, 8, device=device), torch.randn(3, 2, 8, device=device).requires_grad_()
    loss = F.flow_map_mmd_loss(x, x + 1, g, g.detach(), 0.5, 0.5, 0.5, 0.5, torch.ones(3, device=device))
    right = torch.autograd.grad(loss.sum(), g, retain_graph=True)[0].clone()
    for _ in range(2):
        loss.sum().backward(retain_graph=True)
    assert torch.equal(g.grad, 2 * right)
    g.grad.zero_()
    torch.autograd.grad(loss.sum(), g, retain_graph=True)[0].zero_()
    assert torch.equal(torch.autograd.grad(loss.sum(), g, retain_graph=True)[0], right)
    rows = torch.autograd.grad(loss, g, torch.eye(3, device=device), is_grads_batched=True)[0]
    assert torch.equal(rows.sum(0), right)


def test_a_group_left_out_by_its_upstream_has_no_gradient(device) -> None:
    x, g = torch.randn(3, 2, 8, device=device), torch.randn(3, 2, 8, device=device).requires_grad_()
    mask = torch.tensor([1.0, 0.0, 2.0], device=device)
    loss = F.flow_map_mmd_loss(x, x + 1, g, g.detach(), 0.5, 0.5, 0.5, 0.5, torch.ones(3, device=device), upstream=mask)
    (mask * loss).sum().backward()
    assert torch.isfinite(g.grad).all()
    assert g.grad.any(2).any(1).tolist() == [True, False, True]


def test_flow_map_loss_takes_numbers_and_refuses_other_gradients(device) -> None:
    x, g = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    one = torch.ones(2, device=device)
    loss = F.flow_map_mmd_loss(x, x, g, g, 0.5, 0.5, 0.5, 0.5, one)
    # The three sums cancel to the last bit on the CPU; a Triton kernel adds them in other orders.
    torch.testing.assert_close(loss, torch.zeros_like(one), rtol=0, atol=0 if device == "cpu" else 1e-6)
    with pytest.raises(RuntimeError, match="the gradient goes to g_t only"):
        F.flow_map_mmd_loss(x.requires_grad_(), x, g, g, 0.5, 0.5, 0.5, 0.5, one)
    with pytest.raises(ValueError, match=r"c_out_r: expected one number per group, \[2\], got \[3\]"):
        torch.ops.imm.flow_map_mmd(
            *[x.detach()] * 2,
            g,
            g,
            *[one.double()] * 3,
            torch.ones(3, dtype=torch.float64, device=device),
            one,
            None,
            None,
            "rbf",
            [1.0],
            1e-8,
            False,
        )


def test_small_gradients_are_scaled_before_they_are_rounded(device) -> None:
    """A gradient scaler's factor reaches the kernel: a float16 gradient below its smallest number survives."""
    x, g = torch.randn(2, 2, 4, 64, device=device), torch.randn(2, 2, 4, 64, device=device).half()
    one, factor = torch.ones(2, device=device), torch.full((1,), 2.0**16, device=device)
    g_t, weight = g[0].requires_grad_(), torch.full((2,), 1e-7, device=device)
    arguments = *x, g_t, g[1], 0.5, 0.5, 0.5, 0.5, one
    (F.flow_map_mmd_loss(*arguments, weight=weight).sum() * factor).backward()
    assert int((g_t.grad == 0).sum()) > 0.9 * g_t.numel()
    g_t.grad = None
    (F.flow_map_mmd_loss(*arguments, weight=weight, upstream=factor).sum() * factor).backward()
    assert int((g_t.grad == 0).sum()) < 0.1 * g_t.numel()


@pytest.mark.parametrize("index", range(3))
def test_parity_with_recorded_losses(index) -> None:
    with np.load(DATA / "laplace_loss.npz") as archive:
        case = {k.split("_", 1)[1]: torch.from_numpy(archive[k]) for k in archive.files if k.startswith(f"c{index}_")}
    y_t = case["y_t"].requires_grad_()
    loss = F.mmd_loss(y_t, case["y_r"], case["kernel_scale"], weight=case["weight"], eps=1e-4)
    loss.mean().backward()
    torch.testing.assert_close(loss, case["loss_per_group"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(y_t.grad, case["grad_y_t_of_mean"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
def test_close_pairs_keep_their_digits(apart, device) -> None:
    """float32, D = 4096: a Gram product would lose the matched pairs, a sum of ones the value."""
    y_t, y_r, scale, _ = inputs((2, 4, 4096), torch.float32, device, apart)
    loss = F.mmd_loss(y_t, y_r, scale)
    loss.sum().backward()
    exact = y_t.detach().double().requires_grad_()
    expected = truth(exact, y_r, scale, None, "laplace", 1e-8)
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(y_t.grad.double(), exact.grad, rtol=1e-3, atol=float(exact.grad.abs().max()) * 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_sets_give_exactly_zero_and_a_finite_gradient(kernel, device) -> None:
    y_t = torch.randn(3, 4, 50, dtype=torch.float64, device=device).requires_grad_()
    loss = F.mmd_loss(y_t, y_t.detach().clone(), torch.full((3,), 20.0, device=device), kernel=kernel)
    loss.sum().backward()
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.isfinite(y_t.grad).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_coinciding_particles_have_a_finite_gradient(kernel, dtype, device) -> None:
    y_t = torch.randn(2, 1, 9, dtype=dtype, device=device).repeat(1, 4, 1).requires_grad_()
    F.mmd_loss(
        y_t, torch.randn(2, 4, 9, dtype=dtype, device=device), torch.ones(2, device=device), kernel=kernel
    ).sum().backward()
    assert torch.isfinite(y_t.grad).all()
    assert float(y_t.grad.abs().max()) > 0


def test_eps_is_a_floor_with_zero_gradient(device) -> None:
    y_t = torch.zeros(1, 1, 4, dtype=torch.float64, device=device).requires_grad_()
    y_r = torch.full_like(y_t.detach(), 0.01)  # distance 0.02
    for eps, moves in ((0.019, True), (0.021, False)):
        (grad,) = torch.autograd.grad(F.mmd_loss(y_t, y_r, torch.ones(1, device=device), eps=eps).sum(), y_t)
        assert bool(grad.abs().sum() > 0) is moves


def test_two_diracs_in_closed_form(device) -> None:
    """M = 1: loss = 2 w (k(eps) - k(d)), the consistency model's case (section 3.9)."""
    y_t = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64, device=device)
    y_r = torch.zeros_like(y_t)
    scale, weight = torch.tensor([0.7], device=device), torch.tensor([1.5], device=device)
    laplace = F.mmd_loss(y_t, y_r, scale, weight=weight, eps=1e-3)
    expected = 2 * 1.5 * (math.exp(-float(scale) * 1e-3 / 2) - math.exp(-float(scale) * 5 / 2))
    assert float(laplace) == pytest.approx(expected, rel=1e-12)
    rbf = F.mmd_loss(y_t, y_r, scale, weight=weight, kernel="rbf")
    assert float(rbf) == pytest.approx(2 * 1.5 * (1 - math.exp(-0.5 * float(scale) * 25 / 2)), rel=1e-12)


def test_gradient_formula() -> None:
    """Section 3.3: repulsion from the own particles, attraction to the targets."""
    y_t, y_r, scale, weight = inputs((1, 3, 10), torch.float64, "cpu")
    F.mmd_loss(y_t, y_r, scale, weight=weight).sum().backward()
    kappa = float(scale) / 10
    expected = torch.zeros(3, 10, dtype=torch.float64)
    for j in range(3):
        for k in range(3):
            for other, sign in ((y_t[0, k], -1.0), (y_r[0, k], 1.0)):
                away = (y_t[0, j] - other).detach()
                if float(away.norm()) > 0:
                    expected[j] += sign * math.exp(-kappa * float(away.norm())) * away / away.norm()
    torch.testing.assert_close(y_t.grad[0], 2 * float(weight) * kappa / 9 * expected, rtol=1e-12, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    particles=st.integers(1, 6),
    features=st.integers(1, 40),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 2**31),
)
def test_properties(groups, particles, features, kernel, seed) -> None:
    """Non-negative, symmetric, and blind to the order of particles."""
    generator = torch.Generator().manual_seed(seed)
    y_t, y_r = torch.randn(2, groups, particles, features, dtype=torch.float64, generator=generator)
    scale = torch.rand(groups, dtype=torch.float64, generator=generator) * 50
    loss = F.mmd_loss(y_t, y_r, scale, kernel=kernel)
    assert bool((loss >= -1e-14).all())
    torch.testing.assert_close(F.mmd_loss(y_r, y_t, scale, kernel=kernel), loss, rtol=1e-10, atol=1e-14)
    order = torch.randperm(particles, generator=generator)
    torch.testing.assert_close(F.mmd_loss(y_t[:, order], y_r, scale, kernel=kernel), loss, rtol=1e-10, atol=1e-14)
    gram = F.mmd_gram(y_t, y_t, scale, kernel=kernel)
    torch.testing.assert_close(gram, gram.transpose(1, 2))
    if kernel == "energy":  # conditionally positive: for coefficients that sum to 0
        gram = gram - gram.mean(1, keepdim=True) - gram.mean(2, keepdim=True) + gram.mean((1, 2), keepdim=True)
    assert bool((torch.linalg.eigvalsh(gram) > -1e-9).all())


def test_a_nan_particle_stays_in_its_group(device) -> None:
    y_t = torch.randn(3, 4, 20, device=device)
    y_t[1, 2, 5] = float("nan")
    y_t.requires_grad_()
    loss = F.mmd_loss(y_t, torch.randn(3, 4, 20, device=device), torch.ones(3, device=device))
    loss.sum().backward()
    assert torch.isnan(loss).tolist() == [False, True, False]
    assert torch.isfinite(y_t.grad[[0, 2]]).all()
    assert torch.isnan(y_t.grad[1]).any()


def test_image_shapes_and_no_groups(device) -> None:
    y = torch.randn(2, 4, 3, 8, 8, device=device)
    assert F.mmd_loss(y, y, torch.ones(2, device=device)).shape == (2,)
    assert F.mmd_loss(y[:0], y[:0], torch.ones(0, device=device)).shape == (0,)
    assert F.mmd_gram(y, y[:, :3], torch.ones(2, device=device)).shape == (2, 4, 3)


def test_a_zero_scale_is_a_constant_kernel(device) -> None:
    y_t = torch.randn(1, 3, 8, device=device).requires_grad_()
    loss = F.mmd_loss(y_t, torch.randn(1, 3, 8, device=device), torch.zeros(1, device=device))
    loss.sum().backward()
    assert float(loss.detach()) == 0.0
    assert float(y_t.grad.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"y_r": torch.randn(2, 3, 8)}, ValueError, r"expected the same shape, got \[2, 4, 8\] and \[2, 3, 8\]"),
        ({"y_r": torch.randn(2, 4, 7)}, ValueError, "same G and D"),
        ({"y_r": torch.randn(2, 4, 8).double()}, TypeError, "expected one dtype"),
        ({"y_t": torch.randn(4, 8)}, ValueError, r"expected \[G, M, \.\.\.\]"),
        (
            {"y_t": torch.ones(2, 4, 8).long(), "y_r": torch.ones(2, 4, 8).long()},
            TypeError,
            "16, 32 or 64 bits, got torch.int64",
        ),
        ({"y_t": torch.randn(2, 0, 8), "y_r": torch.randn(2, 0, 8)}, ValueError, r"M, D > 0, got \[2, 0, 8\]"),
        ({"scale": torch.ones(3)}, ValueError, r"one number per group, \[2\], got \[3\]"),
        ({"scale": torch.ones(2).long()}, TypeError, "floating dtype"),
        ({"scale": torch.tensor([1.0, -1.0])}, ValueError, "expected numbers >= 0"),
        ({"scale": torch.tensor([1.0, float("nan")])}, ValueError, "expected numbers >= 0"),
        ({"weight": torch.ones(2, 1)}, ValueError, r"weight: expected one number per group"),
        ({"kernel": "gauss"}, ValueError, r"one of \['laplace', 'rbf', 'imq', 'energy'\], got 'gauss'"),
        ({"bandwidths": ()}, ValueError, "one or more positive factors"),
        ({"bandwidths": (1.0, -1.0)}, ValueError, "one or more positive factors"),
        ({"bandwidths": (1.0, 2.0), "kernel": "energy"}, ValueError, "expected one for the energy kernel"),
        ({"estimator": "w"}, ValueError, r"one of \['v', 'u'\], got 'w'"),
        ({"estimator": "u", "y_t": torch.randn(2, 1, 8), "y_r": torch.randn(2, 1, 8)}, ValueError, "expected M >= 2"),
        ({"eps": 0.0}, ValueError, "positive floor"),
    ],
)
def test_bad_input_is_refused(change, error, text) -> None:
    arguments = {"y_t": torch.randn(2, 4, 8), "y_r": torch.randn(2, 4, 8), "scale": torch.ones(2)} | change
    with pytest.raises(error, match=text):
        F.mmd_loss(**arguments)


def test_a_bad_upstream_gradient_is_called_by_its_name() -> None:
    y, slopes = torch.randn(2, 4, 8), torch.ones(2, 4, 8)
    for backward in (torch.ops.imm.mmd_loss_bwd, functools.partial(dispatch.run, "mmd_loss_bwd", "reference")):
        with pytest.raises(ValueError, match=r"grad: expected one number per group, \[2\], got \[3\]"):
            backward(torch.ones(3), slopes, y, y, None, False)


@pytest.mark.parametrize("name", ["y_r", "scale", "weight"])
def test_a_gradient_for_anything_but_y_t_is_an_error(name) -> None:
    arguments = {"y_t": torch.randn(2, 4, 8), "y_r": torch.randn(2, 4, 8), "scale": torch.ones(2), "weight": torch.ones(2)}
    arguments[name] = arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match="the gradient goes to y_t only"):
        F.mmd_loss(**arguments)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(64, 4, 4096), (4, 64, 4096), (1, 256, 512), (2, 4, 65536)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_shapes_match_float64(shape, dtype, device) -> None:
    y_t, y_r, scale, weight = inputs(shape, dtype, device)
    loss = F.mmd_loss(y_t, y_r, scale, weight=weight)
    loss.mean().backward()
    exact = F.mmd_loss(y_t.detach().double().requires_grad_(), y_r.double(), scale, weight=weight)
    assert_close(loss, exact, shape[1] * shape[2])
