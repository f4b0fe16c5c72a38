"""imm::mmd_loss and imm::mmd_gram against float64 and against what is known in closed form."""

from __future__ import annotations

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

#: G1: one group; M: alone, even, odd; D: one feature, prime, one above a vector, CIFAR. Large sizes are in the full suite.
SHAPES = [(1, 1, 1), (2, 2, 37), (3, 4, 257), (2, 7, 64), (5, 4, 3072)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["laplace", "rbf"]


def truth(y_t: Tensor, y_r: Tensor, scale: Tensor, weight: Tensor | None, kernel: str, eps: float) -> Tensor:
    """The formula, in float64, by broadcasting and autograd."""
    y_r, scale = y_r.double(), scale.double()

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        square = (x[:, :, None] - y[:, None]).square().sum(-1).clamp_min(eps**2)
        exponent = square.sqrt() if kernel == "laplace" else 0.5 * square
        return torch.exp(-scale[:, None, None] * exponent / x.shape[2]).mean((1, 2))

    loss = mean_kernel(y_t, y_t) + mean_kernel(y_r, y_r) - 2 * mean_kernel(y_t, y_r)
    return loss if weight is None else loss * weight.double()


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, apart: float = 1.0, kernel: str = "laplace"):
    """Particles ``apart`` from their targets, and a scale that puts the exponent of independent ones near 1."""
    groups, _, features = shape
    y_r = torch.randn(shape, device=device)
    y_t = (y_r + apart * torch.randn(shape, device=device)).to(dtype)
    scale = (math.sqrt(features) if kernel == "laplace" else 1.0) * (
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
    dist = (a[:, :, None] - b[:, None]).square().sum(-1)
    dist = dist.sqrt() if kernel == "laplace" else 0.5 * dist
    expected = torch.exp(-scale[:, None, None] * dist / 129)
    (expected * upstream).sum().backward()
    for value, exact in ((gram, expected), (x.grad, a.grad), (y.grad, b.grad)):
        assert_close(value, exact, 5 * 129)


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
        ({"kernel": "gauss"}, ValueError, r"one of \['laplace', 'rbf'\], got 'gauss'"),
        ({"eps": 0.0}, ValueError, "positive floor"),
    ],
)
def test_bad_input_is_refused(change, error, text) -> None:
    arguments = {"y_t": torch.randn(2, 4, 8), "y_r": torch.randn(2, 4, 8), "scale": torch.ones(2)} | change
    with pytest.raises(error, match=text):
        F.mmd_loss(**arguments)


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
