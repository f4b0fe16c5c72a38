"""adaln_modulate, gated_residual_adaln and timestep_embedding: against torch's own forms in float64, properties, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from imm.functional import adaln_modulate, gated_residual_adaln, timestep_embedding

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[2:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def made(B: int, T: int, C: int, rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, y and, as chunks of one matrix, gate, shift and scale."""
    generator = torch.manual_seed(B + 10 * T + 100 * C)
    tokens = [torch.randn(B, T, C, generator=generator, dtype=torch.float64) for _ in range(2)]
    modulations = torch.randn(rows, 3 * C, generator=generator, dtype=torch.float64).to(dtype).chunk(3, dim=1)
    return [*(t.to(dtype) for t in tokens), *modulations]


def close(got: Tensor, want: Tensor) -> None:
    arithmetic = 1e-12 if got.dtype == torch.float64 else 2e-5
    bound = arithmetic * want.abs().max() + torch.finfo(got.dtype).eps * want.abs()
    assert (got.double() - want).abs().le(bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 17, 2), (3, 5, 64, 1), (2, 16, 1152, 2)], ids=str)
def test_against_layer_norm_in_float64(sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> None:
    x, y, gate, shift, scale = (v.to(device) for v in made(*sizes, dtype))
    wide = [v.double() for v in (x, y, gate, shift, scale)]
    close(adaln_modulate(x, shift, scale), plain(wide[0], *wide[3:]))
    z, h = gated_residual_adaln(x, y, gate, shift, scale)
    residual = wide[0] + wide[2][:, None] * wide[1]
    close(z, residual)
    close(h, plain(residual, *wide[3:]))


@pytest.mark.parametrize("rows", [1, 3])
def test_gradients_are_those_of_the_plain_form(rows: int, device: str) -> None:
    x, y, gate, shift, scale = leaves = [v.to(device).detach().requires_grad_() for v in made(3, 5, 17, rows)]
    weights = [torch.randn(3, 5, 17, dtype=torch.float64, device=device) for _ in range(2)]

    def gradients(z: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weights[0] * z).sum() + (weights[1] * h).sum(), leaves)

    residual = x + gate[:, None] * y
    expected = gradients(residual, plain(residual, shift, scale))
    for got, want in zip(gradients(*gated_residual_adaln(x, y, gate, shift, scale)), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad((weights[1] * plain(x, shift, scale)).sum(), (x, shift, scale))
    got = torch.autograd.grad((weights[1] * adaln_modulate(x, shift, scale)).sum(), (x, shift, scale))
    for mine, want in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-10, atol=1e-12)


def test_each_result_has_the_dtype_of_its_reader(device: str) -> None:
    x, y, gate, shift, scale = (v.to(device) for v in made(2, 3, 8, 2, torch.float32))
    z, h = gated_residual_adaln(x, y.bfloat16(), gate.half(), shift.half(), scale.half())
    assert (z.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    x.requires_grad_()
    gate16 = gate.half().requires_grad_()
    z, h = gated_residual_adaln(x, y.bfloat16(), gate16, shift.half(), scale.half())
    (z.sum() + h.float().sum()).backward()
    assert x.grad is not None
    assert gate16.grad is not None
    assert (x.grad.dtype, gate16.grad.dtype) == (torch.float32, torch.float16)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.floats(-3.0, 3.0), st.floats(0.1, 30.0))
def test_a_norm_forgets_offset_and_size(C: int, offset: float, size: float) -> None:
    x, _, _, shift, scale = made(2, 3, C, 2)
    torch.testing.assert_close(
        adaln_modulate(x * size + offset, shift, scale, eps=1e-12),
        adaln_modulate(x, shift, scale, eps=1e-12),
        rtol=1e-6,
        atol=1e-6,
    )


def test_a_closed_gate_changes_nothing(device: str) -> None:
    x, y, gate, shift, scale = (v.to(device) for v in made(2, 3, 8, 2, torch.float32))
    z, h = gated_residual_adaln(x, y, torch.zeros_like(gate), shift, scale)
    assert torch.equal(z, x)
    assert torch.equal(h, adaln_modulate(x, shift, scale))


def test_images_do_not_mix(device: str) -> None:
    x, y, gate, shift, scale = (v.to(device) for v in made(4, 3, 24, 4, torch.float32))
    together = gated_residual_adaln(x, y, gate, shift, scale)
    for i in range(4):
        alone = gated_residual_adaln(*(v[i : i + 1] for v in (x, y, gate, shift, scale)))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5)])
def test_no_tokens(shape: tuple[int, int, int], device: str) -> None:
    x = torch.zeros(shape, device=device, requires_grad=True)
    rows = torch.ones(shape[0], 5, device=device, requires_grad=True)
    z, h = gated_residual_adaln(x, x, rows, rows, rows)
    (z.sum() + h.sum()).backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_embedding_of_both_times(device: str) -> None:
    t = torch.tensor([994.0, 994.0 - 1.5e-3], dtype=torch.float64, device=device)
    s = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
    value = timestep_embedding(t, s, 256, dtype=torch.float64)
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64, device=device) / 128)
    for times, rows in zip((t, s), value, strict=True):
        phase = times[:, None] * frequencies
        torch.testing.assert_close(rows, torch.cat([phase.cos(), phase.sin()], dim=1), rtol=1e-9, atol=1e-12)
    assert float((value[0, 0] - value[0, 1]).abs().max()) > 5e-4
    for dtype in DTYPES:
        close(timestep_embedding(t, s, 256, dtype=dtype), value)


def test_gradient_of_the_embedding(device: str) -> None:
    t, s = (torch.rand(3, dtype=torch.float64, device=device).requires_grad_() for _ in range(2))
    weight = torch.randn(2, 3, 8, dtype=torch.float64, device=device)
    got = torch.autograd.grad((weight * timestep_embedding(t, s, 8)).sum().double(), (t, s))
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64, device=device) / 4)
    phase = torch.stack([t, s])[..., None] * frequencies
    want = torch.autograd.grad((weight * torch.cat([phase.cos(), phase.sin()], dim=2)).sum(), (t, s))
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


X, ROWS = torch.zeros(2, 3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((X[0], X[0], ROWS, ROWS, ROWS), ValueError, r"x: expected tokens \[B, T, C\] with C > 0, got \[3, 4\]"),
        ((X[..., :0], X[..., :0], ROWS[:, :0], ROWS[:, :0], ROWS[:, :0]), ValueError, r"x: expected tokens"),
        ((X, X[:, :2], ROWS, ROWS, ROWS), ValueError, r"y: expected \[2, 3, 4\] as x has, got \[2, 2, 4\]"),
        ((X, X, ROWS[:, :3], ROWS, ROWS), ValueError, r"gate: expected \[2, 4\] or \[1, 4\], got \[2, 3\]"),
        ((X, X, ROWS, ROWS[0], ROWS), ValueError, r"shift: expected \[2, 4\] or \[1, 4\], got \[4\]"),
        ((X, X, ROWS, ROWS, ROWS[:1]), ValueError, r"scale: expected \[2, 4\] of torch.float32 as the other modulations"),
        ((X, X, ROWS, ROWS, ROWS.double()), ValueError, r"scale: expected \[2, 4\] of torch.float32 as the other modulations"),
        ((X.long(), X, ROWS, ROWS, ROWS), TypeError, "x: expected a floating dtype of 16, 32 or 64 bits, got torch.int64"),
        ((X, X.bool(), ROWS, ROWS, ROWS), TypeError, "y: expected a floating dtype of 16, 32 or 64 bits, got torch.bool"),
        ((X, X, ROWS, ROWS, ROWS, 0.0), ValueError, "eps: expected a positive number, got 0"),
    ],
)
def test_bad_tokens_are_refused(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    *tensors, eps = arguments if len(arguments) == 6 else (*arguments, 1e-6)
    with pytest.raises(error, match=text):
        gated_residual_adaln(*tensors, eps=eps)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((torch.zeros(2), torch.zeros(3), 4), ValueError, r"t and s: expected the same shape \[B\], got \[2\] and \[3\]"),
        ((torch.zeros(2, dtype=torch.long), torch.zeros(2), 4), TypeError, "t: expected a floating dtype"),
        ((torch.zeros(2), torch.zeros(2), 3), ValueError, "dim: expected a positive even number, got 3"),
        ((torch.zeros(2), torch.zeros(2), 0), ValueError, "dim: expected a positive even number, got 0"),
    ],
)
def test_bad_times_are_refused(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        timestep_embedding(*arguments)


def test_bad_periods_and_dtypes_are_refused() -> None:
    t = torch.zeros(2)
    for period in (1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_period: expected a finite number > 1"):
            timestep_embedding(t, t, 4, max_period=period)
    with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
        timestep_embedding(t, t, 4, dtype=torch.int32)
