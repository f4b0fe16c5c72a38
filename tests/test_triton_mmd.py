"""The Triton MMD kernels against float64, in Triton's interpreter and on CUDA."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, in_the_interpreter, kernel_test
from tolerance import assert_close
from torch import Tensor

from imm.ops import dispatch, flow_map_mmd, mmd

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: M at the edges of the regimes and of their blocks; D one, ragged, a multiple of sixteen.
SIZES = [(M, D) for D, M in itertools.product([1, 37, 272], [1, 2, 3, 4, 5, 6, 7, 8])]
SIZES += [(9, 1), (9, 272), (16, 37), (33, 37), (17, 272), (32, 64), (65, 37), (64, 64)]  # each third is in make test
KERNEL = ("laplace", [1.0], 1e-8)


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    from imm_kernels import mmd as module

    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.autograd.profiler.record_function("cpu"))
    return module


def wide(args: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def inputs(G: int, M: int, D: int, dtype: torch.dtype, apart: float = 0.5, kernel: str = "laplace") -> list[Any]:
    """y_t, y_r, scale, weight, upstream."""
    torch.manual_seed(M * D)
    y_r = torch.randn(G, M, D)
    y_t = y_r + apart * torch.randn(G, M, D)
    scale = (torch.rand(G, dtype=torch.float64) + 0.3) * (D**0.5 if kernel in ("laplace", "energy") else 1.0)
    return [
        y_t.to(dtype).to(DEVICE),
        y_r.to(dtype).to(DEVICE),
        *(v.to(DEVICE) for v in (scale, torch.rand(G), torch.rand(G) + 0.5)),
    ]


def check(kernels: Any, args: list[Any], kernel: tuple[Any, ...] = KERNEL, unbiased: bool = False, atol: float = 2e-6) -> None:
    """Loss and gradient, in one launch and by saved slopes, against the reference in float64; bitwise identical twice."""
    y_t, y_r, scale, weight, upstream = args
    what = kernels.Kernel(kernel[0], tuple(kernel[1]), kernel[2], unbiased)
    truth, slopes = mmd.mmd_loss(*wide(args[:4]), *kernel, unbiased)
    up = torch.ones_like(truth) if upstream is None else upstream.expand(len(truth))
    exact = mmd.mmd_loss_bwd(up.double(), slopes, *wide([y_t, y_r, weight]), unbiased)
    loss, grad = kernels.loss_and_gradient(*args, what)
    # A distance from products has lost up to CLOSE of its digits: as if of many terms.
    terms = max(y_t.shape[1] * y_t.shape[2], 1000 if y_t.shape[1] > kernels.largest_direct(mix=False) else 1)
    # The loss is a difference of means of size 1.
    torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=atol)
    assert (loss.dtype, grad.dtype, grad.shape) == (torch.float32, y_t.dtype, y_t.shape)
    assert_close(grad, exact, terms)
    alone, slopes = kernels.loss(y_t, y_r, scale, weight, *kernel, unbiased)
    again = kernels.gradient(up, slopes, y_t, y_r, weight, unbiased)
    assert torch.equal(alone, loss)
    assert_close(again, exact, terms)
    for value, twice in zip((loss, grad), kernels.loss_and_gradient(*args, what), strict=True):
        assert torch.equal(value, twice)


@kernel_test
@pytest.mark.every(3)
@pytest.mark.parametrize(("M", "D"), SIZES)
def test_every_size_matches_float64(M: int, D: int, kernels: Any) -> None:
    check(kernels, inputs(2, M, D, torch.float32))


@kernel_test
@pytest.mark.every(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unbiased", [False, True], ids=["v", "u"])
@pytest.mark.parametrize("kernel", mmd.KERNELS)
@pytest.mark.parametrize("M", [3, 11])
def test_every_kernel_and_dtype_matches_float64(M: int, kernel: str, unbiased: bool, dtype: torch.dtype, kernels: Any) -> None:
    bandwidths = [2.0] if kernel == "energy" else [0.5, 1.0, 2.0]
    check(kernels, inputs(2, M, 70, dtype, kernel=kernel), (kernel, bandwidths, 1e-8), unbiased)


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize("M", [2, 8, 4])
def test_split_features(M: int, kernels: Any) -> None:
    """Few groups of many features: slices of a group, added in order."""
    check(kernels, inputs(1, M, 8201, torch.float32))


@kernel_test
@pytest.mark.parametrize("M", [2, 4])
def test_a_program_takes_several_groups(M: int, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)
    check(kernels, inputs(2 * kernels.direct_sizes(M, 40, 32, mix=False).programs + 1, M, 40, torch.float32))


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize("M", [16, 33])
def test_sliced_products(M: int, kernels: Any) -> None:
    check(kernels, inputs(1, M, 3000, torch.float32))


@kernel_test
@pytest.mark.every(3)
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("M", [4, 16])
def test_close_pairs_keep_their_digits(M: int, apart: float, kernels: Any) -> None:
    check(kernels, inputs(2, M, 1024, torch.float32, apart), atol=3e-7)


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize("M", [5, 20])
def test_close_pairs_within_a_set(M: int, kernels: Any) -> None:
    """Pairs that are not matched are close too, and some coincide."""
    args = inputs(2, M, 256, torch.float32)
    for y in args[:2]:
        y[:, 1] = y[:, 0] + 1e-3 * torch.randn_like(y[:, 0])
        y[:, 3] = y[:, 2]
    args[1][1, 4] = args[0][1, 2] + 1e-4
    check(kernels, args)


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize("M", [4, 16])
def test_any_strides(M: int, kernels: Any) -> None:
    y_t, y_r, scale, weight, _ = inputs(6, M, 48, torch.float32)
    one = torch.full((1,), 0.25, device=DEVICE)
    check(kernels, [y_t[::2], y_r[::2], scale[::2], weight[:1].expand(3), one])
    swapped = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in (y_t, y_r)]
    check(kernels, [*swapped, scale, None, one])
    check(kernels, [y_t[..., 5:33], y_r[..., 3:31], scale, weight, None])
    check(kernels, [y_t[..., ::2], y_r[..., ::2], scale, weight, None])
    check(kernels, [y_t[:, :1].expand(6, M, 48), y_r, scale, weight, None])


@kernel_test
@pytest.mark.parametrize("M", [2, 9])
def test_offsets_beyond_32_bits(M: int, kernels: Any) -> None:
    """Rows, then groups, more than 2^31 elements apart; pages that are not touched cost nothing."""
    far, D = 2**31 + 16, 20
    memory = torch.empty((M - 1) * far + D, dtype=torch.bfloat16, device=DEVICE) if M == 2 else None
    y_t, y_r, scale, weight, _ = inputs(2, M, D, torch.bfloat16)
    if memory is not None:
        rows = memory.as_strided((1, M, D), (far, far, 1))
        rows.copy_(y_t[:1])
        check(kernels, [rows, y_r[:1], scale[:1], weight[:1], None])
    else:
        memory = torch.empty(far + M * D, dtype=torch.bfloat16, device=DEVICE)
    groups = memory.as_strided((2, M, D), (far - M * D, D, 1))
    groups.copy_(y_t)
    check(kernels, [groups, y_r, scale, weight, None])


@kernel_test
@pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter")
@pytest.mark.parametrize("M", [2, 9])
def test_a_hundred_thousand_groups(M: int, kernels: Any) -> None:
    check(kernels, inputs(100_000, M, 16, torch.float32))


@kernel_test
@pytest.mark.parametrize("M", [4, 16])
def test_special_values(M: int, kernels: Any) -> None:
    y_t, y_r, scale, weight, _ = inputs(3, M, 40, torch.float32)
    y_t[1, 2, 3] = float("nan")
    what = kernels.Kernel("laplace", (1.0,), 1e-8, False)
    loss, grad = kernels.loss_and_gradient(y_t, y_r, scale, weight, None, what)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(2).any(1).tolist() == [False, True, False]
    y_t[1, 2, 3] = float("inf")
    loss, grad = kernels.loss_and_gradient(y_t, y_r, scale, weight, None, what)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isfinite().all(2).all(1).tolist() == [True, False, True]
    floor = kernels.Kernel("laplace", (1.0,), 1e3, False)
    assert not kernels.loss_and_gradient(y_r, y_r + 1e-6, scale, weight, None, floor)[1].any()
    empty = kernels.loss_and_gradient(y_r[:0], y_r[:0], scale[:0], None, None, what)
    assert [len(v) for v in empty] == [0, 0]


@kernel_test
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)]
)
@pytest.mark.parametrize("shape", [(2, 1, 40), (2, 4, 300), (1, 4, 9001), (2, 8, 64), (2, 16, 100), (1, 40, 70)], ids=str)
def test_flow_map_loss_matches_float64(
    shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], kernels: Any
) -> None:
    state, output = dtypes
    x_t, x_r, scale, weight, upstream = inputs(*shape, state)
    g_t, g_r, *_ = inputs(*shape, output, 0.1)
    upstream *= 2.0**10  # float16 has no gradients of 1e-6
    numbers = [torch.rand(shape[0], dtype=torch.float64, device=DEVICE) + 0.2 for _ in range(4)]
    args = (x_t, x_r, g_t, g_r.float(), *numbers, scale, weight, upstream, *KERNEL, False)
    truth, exact = flow_map_mmd.flow_map_mmd(*wide(args))
    mix = kernels.Mix(x_t, x_r, *numbers)
    what = kernels.Kernel("laplace", (1.0,), 1e-8, False)
    loss, grad = kernels.loss_and_gradient(g_t, g_r.float(), scale, weight, upstream, what, mix)
    torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=2e-6)
    assert_close(grad, exact, shape[1] * shape[2])
    up = torch.rand(shape[0], device=DEVICE) + 0.5
    for given in (3.0 * up, up[:1], None):
        wanted = flow_map_mmd.flow_map_mmd_bwd(up, grad, g_t, given)
        assert_close(kernels.rescaled(up, grad, g_t, given), wanted.double(), 1)


@kernel_test
@pytest.mark.every(5)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", mmd.KERNELS)
def test_gram_matches_float64(kernel: str, dtype: torch.dtype, kernels: Any) -> None:
    from imm_kernels import mmd_gram

    for M_x, M_y, D in ((1, 1, 1), (4, 5, 37), (17, 33, 64)):
        x, _, scale, *_ = inputs(2, M_x, D, dtype, kernel=kernel)
        y, *_ = inputs(2, M_y, D, dtype)
        y[:, :1] = x[:, :1] + 1e-3
        options = (kernel, [2.0] if kernel == "energy" else [0.5, 2.0], 1e-8)
        up = torch.randn(2, M_x, M_y, device=DEVICE)
        settings = (kernel, tuple(options[1]), 1e-8)
        truth = mmd.mmd_gram(*wide((x, y, scale)), *options)
        torch.testing.assert_close(mmd_gram.gram(x, y, scale, *settings).double(), truth, rtol=2e-5, atol=2e-6)
        exact = mmd.mmd_gram_bwd(*wide((up, x, y, scale)), *options)
        for value, right in zip(mmd_gram.gram_gradients(up, x, y, scale, *settings), exact, strict=True):
            assert_close(value, right, max(M_x, M_y) * D)


@kernel_test
def test_pairs_of_a_gram_beyond_32_bits(kernels: Any) -> None:
    """The last row of the coefficients 2^31 numbers after the first: of 16 bits, since more would be too much to reserve."""
    from imm_kernels import mmd_gram
    from imm_kernels.mmd_math import set_of

    M_x, M_y, D, row_step = 3, 2, 20, 2**30
    x, y = torch.randn(1, M_x, D, device=DEVICE), torch.randn(1, M_y, D, device=DEVICE)
    coefficients = torch.empty((M_x - 1) * row_step + M_y, dtype=torch.float16, device=DEVICE).as_strided(
        (M_x, M_y), (row_step, 1)
    )
    coefficients.copy_(torch.randn(M_x, M_y))
    grad = torch.empty_like(x)
    block = {"ROWS": mmd_gram.GRADIENT_ROWS, "BLOCK_D": mmd_gram.GRADIENT_FEATURES}
    mmd_gram._gram_gradient_kernel[(1,)](set_of(x), set_of(y), coefficients, grad, row_step, 1, M_x, M_y, D, **block)
    assert_close(grad[0], (coefficients.double()[..., None] * (x[0].double()[:, None] - y.double())).sum(1), M_y * D)


def test_predicates_refuse_with_reasons() -> None:
    for op in ("mmd_loss", "flow_map_mmd"):
        rows = dict(dispatch.explain(op, dispatch.Request(torch.device("cuda"), torch.float64, (2, 4, 8))))
        assert "supports torch.float32" in str(rows["triton"])
        rows = dict(dispatch.explain(op, dispatch.Request(torch.device("cuda"), torch.float32, (2, 257, 8))))
        assert rows["triton"] == "supports up to 256 particles, got 257"
        assert dispatch.explain(op, dispatch.Request(torch.device("cuda"), torch.bfloat16, (2, 256, 8)))[-2] == ("triton", None)
