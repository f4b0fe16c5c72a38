"""The Triton kernels of the energy score against float64, in Triton's interpreter and on CUDA."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scores
import torch
from interpreter import DEVICE, INTERPRETED, in_the_interpreter, kernel_test
from torch import Tensor

from imm.ops import dispatch
from imm.ops.mmd import KERNELS
from imm.ops.noise import noise

triton = pytest.importorskip("triton")
tl = triton.language
quick_normals = pytest.importorskip("imm_kernels.noise").quick_normals

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENERGY: tuple[Any, ...] = ("energy", [1.0])


test_in_the_interpreter = in_the_interpreter(__file__)


@triton.jit
def _draw_kernel(out, seed_ptr, FAST: tl.constexpr):
    places = tl.arange(0, 16)[:, None] * 4096 + tl.arange(0, 4096)[None, :]
    tl.store(out + places, quick_normals(tl.load(seed_ptr) + tl.arange(0, 16), 0, 16, 4096, FAST))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    from imm_kernels import energy_score as module

    if INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.autograd.profiler.record_function("cpu"))
    return module


def sets(G: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(N * D)
    return torch.randn(G, N, D).to(dtype).to(DEVICE), torch.randn(G, M, D).to(dtype).to(DEVICE)


def check(kernels: Any, x: Tensor, y: Tensor, alpha: float = 1.0, what: tuple[Any, ...] = ENERGY, **numbers: Tensor) -> None:
    """Loss and gradient against the definition, bitwise identical twice."""
    scale, weight = numbers.get("scale"), numbers.get("weight")
    arguments = x, y, None, None, 0, scale, weight, 1.0, alpha, None, *what
    found, again = kernels.energy_score(*arguments), kernels.energy_score(*arguments)
    scores.assert_matches(found, scores.energy_score(x, y, scores.pair_weight(x.shape[1], alpha), weight, scale, *what))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert (found[0].dtype, found[1].dtype) == (torch.float32, x.dtype)


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "alpha"), [(1, 0.0), (2, 1.0), (8, 0.95), (16, 0.5)])
def test_lines_match_float64(N: int, alpha: float, dtype: torch.dtype, kernels: Any) -> None:
    """D = 1, one target: as CRPS lays it out, as rows of a group, and with numbers of hundreds."""
    members, target = sets(1, N, 1, 600, dtype)
    x, y = members.permute(2, 1, 0), target.permute(2, 1, 0)
    check(kernels, x, y, alpha, weight=torch.rand(600, device=DEVICE))
    check(kernels, x[:537].contiguous(), y[:537], alpha)
    check(kernels, x[::2], y[::2], alpha, scale=torch.full((1,), 0.5, device=DEVICE))
    if dtype == torch.float32:
        check(kernels, x + 300.0, y + 300.0, alpha)


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D"),
    [(2, 1, 16), (8, 5, 128), (50, 1, 1), (5, 3, 1), (2, 1, 2), (4, 3, 37), (3, 2, 300), (20, 2, 90)],
)
def test_sizes_match_float64(N: int, M: int, D: int, dtype: torch.dtype, kernels: Any) -> None:
    x, y = sets(3, N, M, D, dtype)
    check(kernels, x, y, 0.95)


@kernel_test
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_numbers_and_strides(kernel: str, kernels: Any) -> None:
    x, y = sets(6, 5, 4, 24)
    what = kernel, [1.0] if kernel == "energy" else [0.5, 2.0]
    numbers = {"scale": torch.rand(3, device=DEVICE).double() + 0.5, "weight": torch.rand(3, device=DEVICE) + 0.5}
    check(kernels, x[::2], y[::2], 0.0, what, **numbers)
    check(kernels, *(v.transpose(0, 1).contiguous().transpose(0, 1)[:3] for v in (x, y)), 1.0, what, **numbers)
    check(kernels, *(v.permute(1, 2, 0).contiguous().permute(2, 0, 1) for v in (x, y)), 1.0, what)
    check(kernels, x[..., 3:20], y[:, :1].expand(6, 3, 24)[..., 2:19], 1.0, what)


@kernel_test
@pytest.mark.parametrize(
    ("N", "M", "D", "dtype"), [(8, 7, 128, torch.float32), (2, 9, 4, torch.bfloat16), (3, 5, 20, torch.float32)]
)
def test_drawn_targets_are_those_of_noise(N: int, M: int, D: int, dtype: torch.dtype, kernels: Any) -> None:
    x, y = sets(3, N, 2, D, dtype)
    mean, log_std, seed = y[:, 0], 0.3 * y[:, 1] - 1.0, torch.tensor([2**40 + 5], device=DEVICE)
    n = noise(seed.cpu() + torch.arange(3), M * D, 0).view(3, M, D).to(DEVICE)
    targets = mean.double()[:, None] + log_std.double().exp()[:, None] * n.double()
    found = kernels.energy_score(x, mean, log_std, seed, M, None, None, 1.0, 1.0, None, *ENERGY)
    scores.assert_matches(found, scores.energy_score(x, targets, scores.pair_weight(N, 1.0)))


@kernel_test
def test_a_draw_is_within_4e_6_of_noise(kernels: Any) -> None:
    """Small radii too, where a uniform number near 1 has few digits."""
    out, seed = torch.empty(16, 4096, device=DEVICE), torch.tensor([3760026 - 7], device=DEVICE)
    _draw_kernel[(1,)](out, seed, FAST=not INTERPRETED, num_warps=8)
    exact = noise(seed.cpu() + torch.arange(16), 4096, 0)
    assert (out.cpu().double() - exact.double()).abs().max() < 4e-6
    assert exact[7, :2].norm() < 0.002


@kernel_test
@pytest.mark.parametrize("D", [1, 6])
def test_ties_nan_and_masks_stay_in_their_group(D: int, kernels: Any) -> None:
    x, y = sets(20, 4, 1, D)
    call = lambda weight=None: kernels.energy_score(x, y, None, None, 0, None, weight, 1.0, 1.0, None, *ENERGY)
    plain = call()
    x[1], x[2, 1], x[3, 2] = x[1, 0], x[2, 0], y[3, 0]
    x[4] = y[4]
    check(kernels, x, y)
    x[5, 1, 0], x[6, 0, 0], y[7, 0, 0] = math.nan, math.inf, math.nan
    loss, grad = call()
    assert (loss[4], grad[4].any()) == (0, False)
    assert loss.isnan()[5:8].all()
    assert grad.isnan().flatten(1).any(1)[[5, 7]].all()
    others = [0, *range(8, 20)]
    for value, right in zip((loss, grad), plain, strict=True):
        assert torch.equal(value[others], right[others])
    weight = torch.ones(20, device=DEVICE)
    weight[4:9] = 0
    loss, grad = call(weight)
    assert not loss[4:9].any()
    assert not grad[4:9].any()
    assert grad[9:].flatten(1).any(1).all()


@kernel_test
def test_offsets_beyond_32_bits(kernels: Any) -> None:
    """Rows, then groups, more than 2^31 elements apart; pages that are not touched cost nothing."""
    x, y = sets(2, 2, 1, 20, torch.bfloat16)
    far = 2**31 + 16
    memory = torch.empty(far + 64, dtype=torch.bfloat16, device=DEVICE)
    for strides in ((20, far, 1), (far, 20, 1)):
        apart = memory.as_strided(x.shape, strides)
        apart.copy_(x)
        found = kernels.energy_score(apart, y, None, None, 0, None, None, 1.0, 1.0, None, *ENERGY)
        here = kernels.energy_score(x, y, None, None, 0, None, None, 1.0, 1.0, None, *ENERGY)
        assert all(torch.equal(a, b) for a, b in zip(found, here, strict=True))


def test_the_predicate_names_its_reason() -> None:
    def reason(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> str | None:
        return dict(dispatch.explain("energy_score", dispatch.Request(torch.device("cuda"), dtype, shape)))["triton"]

    assert reason(()) is None
    assert reason((7, 8, 512)) is reason((7, 32, 128)) is reason((7, 4096, 1)) is None
    assert reason((7, 2, 513)) == "supports D <= 512 and N D <= 4096 (powers of two), got N = 2, D = 513"
    assert reason((7, 33, 128)) == "supports D <= 512 and N D <= 4096 (powers of two), got N = 33, D = 128"
    assert "supports torch.float32" in str(reason((7, 8, 16), torch.float64))
