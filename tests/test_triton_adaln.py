"""The Triton adaLN kernels and timestep embedding against float64, in Triton's interpreter and on CUDA."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from interpreter import DEVICE, in_the_interpreter, kernel_test
from torch import Tensor

from imm.ops import adaln, dispatch, timestep_embedding

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["shared", "chunks", "permuted"]
#: Layout, dtype, (B, T, C): a token alone, ragged features and chunks, the sizes of DiT-S; large ones as networks have them.
CASES = [*itertools.product(LAYOUTS, DTYPES, [(1, 1, 1), (2, 3, 17), (2, 17, 384)])]
CASES += itertools.product(["chunks"], [torch.float32, torch.bfloat16], [(1, 2, 1152), (1, 1, 2100)])


test_in_the_interpreter = in_the_interpreter(__file__)


def tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=torch.float64).to(dtype).to(DEVICE)


def modulations(count: int, images: int, features: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """Rows of one matrix, as a network's chunks are; or of a permuted one."""
    rows = (
        tokens((count * features, images), dtype, 9).t()
        if layout == "permuted"
        else tokens((images, count * features), dtype, 9)
    )
    return list(rows.chunk(count, dim=1))


def check(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> None:
    """Within a few roundings of the arithmetic and one of the result."""
    pairs = zip((got,) if isinstance(got, Tensor) else got, (want,) if isinstance(want, Tensor) else want, strict=True)
    for value, truth in pairs:
        assert value.shape == truth.shape
        arithmetic = 1e-12 if value.dtype == torch.float64 else 2e-5
        bound = arithmetic * truth.abs().max() + torch.finfo(value.dtype).eps * truth.abs()
        assert (value.double() - truth).abs().le(bound).all(), (value.double() - truth).abs().max()


def double(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, Tensor) else v for v in values)


@kernel_test
@pytest.mark.every(5)
@pytest.mark.parametrize(("layout", "dtype", "shape"), CASES, ids=str)
def test_adaln(layout: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    from imm_kernels import adaln as kernels

    B, _, C = shape
    x, y, grad_z, grad_h = (tokens(shape, dtype, i) for i in range(4))
    numbers = torch.float32 if dtype == torch.bfloat16 else dtype
    gate, shift, scale = modulations(3, 1 if layout == "shared" else B, C, numbers, layout)
    args = x, shift, scale, 1e-6
    check(kernels.adaln_modulate(*args), adaln.adaln_modulate(*double(args)))
    args = grad_h, x, scale, 1e-6
    check(adaln._triton_bwd(*args), adaln.adaln_modulate_bwd(*double(args)))
    args = x, y, gate, shift, scale, 1e-6
    check(kernels.gated_residual_adaln(*args), adaln.gated_residual_adaln(*double(args)))
    args = grad_z, grad_h, x, y, gate, scale, 1e-6
    check(adaln._triton_gated_bwd(*args), adaln.gated_residual_adaln_bwd(*double(args)))


@kernel_test
@pytest.mark.every(5)
@pytest.mark.parametrize(("layout", "dtype", "shape"), CASES, ids=str)
def test_adaln_tangents(layout: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    B, _, C = shape
    x, y, dx, dy = (tokens(shape, dtype, i) for i in range(4))
    numbers = torch.float32 if dtype == torch.bfloat16 else dtype
    gate, shift, scale, dgate, dshift, dscale = modulations(6, 1 if layout == "shared" else B, C, numbers, layout)
    args = x, shift, scale, 1e-6, dx, dshift, dscale
    check(dispatch.run("adaln_modulate_jvp", "triton", *args), adaln.adaln_modulate_jvp(*double(args)))
    args = x, y, gate, shift, scale, 1e-6, dx, dy, dgate, dshift, dscale
    check(dispatch.run("gated_residual_adaln_jvp", "triton", *args), adaln.gated_residual_adaln_jvp(*double(args)))


@kernel_test
def test_mixed_dtypes_and_strided_tokens() -> None:
    x, y = tokens((17, 3, 4), torch.float32, 0).permute(2, 1, 0), tokens((4, 6, 34), torch.bfloat16, 1)[:, ::2, ::2]
    args = x, y, *modulations(3, 4, 17, torch.float16, "chunks"), 1e-6
    z, h = dispatch.run("gated_residual_adaln", "triton", *args)
    assert (z.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    check((z, h), adaln.gated_residual_adaln(*double(args)))


@kernel_test
def test_no_tokens_have_no_gradient() -> None:
    for shape in ((0, 3, 5), (2, 0, 5)):
        x = torch.zeros(shape, device=DEVICE)
        gate = torch.zeros(shape[0], 5, device=DEVICE)
        z, h = dispatch.run("gated_residual_adaln", "triton", x, x, gate, gate, gate, 1e-6)
        assert z.shape == h.shape == x.shape
        for grad in adaln._triton_gated_bwd(x, x, x, x, gate, gate, 1e-6)[2:]:
            assert torch.equal(grad, gate)


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 6, 256])
def test_timestep_embedding(dim: int, dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, 994.0, 993.999, 1000.0], dtype=torch.float64, device=DEVICE)[::2]
    s = torch.tensor([1e-3, 12.5], dtype=torch.float32, device=DEVICE)
    args, along = (t, s, dim, 10000.0, dtype), (t.flip(0) / 1000, s[1:].expand(2) / 12)
    found = dispatch.run("timestep_embedding_jvp", "triton", *args, *along)
    truth = timestep_embedding.timestep_embedding_jvp(t, s.double(), dim, 10000.0, torch.float64, *along)
    for got, exact in zip(found, truth, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps + 1e-12
    assert torch.equal(dispatch.run("timestep_embedding", "triton", *args), found[0])
