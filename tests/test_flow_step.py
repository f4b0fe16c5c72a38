"""imm::flow_step against float64 and the published formula."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

import imm
from imm import functional as F

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_match_float64(dtype, noisy, guided, per_image, device) -> None:
    x, g, u = (torch.randn(5, 3, 7, device=device).to(dtype).requires_grad_() for _ in range(3))
    count = 5 if per_image else 1
    skip, out, w, c_noise = (torch.rand(count, dtype=torch.float64, device=device) for _ in range(4))
    seeds = torch.arange(5, device=device)
    extra = {"g_uncond": u, "guidance": w} if guided else {}
    fresh = {"c_noise": c_noise, "seeds": seeds, "step": 2} if noisy else {}
    value = F.flow_step(x, g, skip, out, **extra, **fresh)
    upstream = torch.randn(5, 3, 7, device=device).to(dtype)
    inputs = [x, g, u] if guided else [x, g]
    grads = torch.autograd.grad(value, inputs, upstream)

    exact = [v.detach().double().requires_grad_() for v in inputs]
    skip, out, w, c_noise = (v[:, None, None] for v in (skip, out, w, c_noise))
    output = exact[2] + w * (exact[1] - exact[2]) if guided else exact[1]
    expected = skip * exact[0] + out * output
    if noisy:
        expected = expected + c_noise * imm.noise(seeds, (3, 7), 2).double()
    assert value.dtype == dtype
    assert_close(value, expected, 6)
    for mine, truth in zip(grads, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert mine.dtype == dtype
        assert_close(mine, truth, 4)


def test_the_state_keeps_its_dtype_whatever_the_network_gives(device) -> None:
    x = torch.randn(2, 4, dtype=torch.float64, device=device)
    g = torch.randn(2, 4, dtype=torch.bfloat16, device=device)
    assert torch.equal(F.flow_step(x, g, 0.5, -0.25), 0.5 * x - 0.25 * g.double())


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"g": torch.randn(2, 4)}, ValueError, r"same shape \[B, \.\.\.\], got \[2, 3\] and \[2, 4\]"),
        ({"g": torch.ones(2, 3).long()}, TypeError, "g: expected a floating dtype of 16, 32 or 64 bits"),
        ({"g_uncond": torch.randn(2, 3)}, ValueError, "both or neither"),
        ({"guidance": 1.5}, ValueError, "both or neither"),
        ({"c_noise": 1.0}, ValueError, "both or neither"),
        ({"g_uncond": torch.randn(2, 3).double(), "guidance": 1.5}, ValueError, "expected .* of torch.float32"),
        ({"c_skip": torch.ones(3)}, ValueError, r"expected \[1\] or \[2\], got \[3\]"),
        ({"c_noise": 1.0, "seeds": torch.arange(3)}, ValueError, r"one per image, \[2\]"),
    ],
)
def test_bad_input_is_refused(change, error, text) -> None:
    arguments = {"x": torch.randn(2, 3), "g": torch.randn(2, 3), "c_skip": 1.0, "c_out": 1.0} | change
    with pytest.raises(error, match=text):
        F.flow_step(**arguments)


def test_a_gradient_for_a_coefficient_is_an_error() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="detach the coefficients"):
        F.flow_step(x, x, torch.ones(1, dtype=torch.float64, requires_grad=True), 1.0)
