"""imm.functional.energy_score and crps: against the definition in float64, identities of scoring rules, bad input.

Kernels on a GPU are in test_triton_energy_score.py. Left out: sizes beyond memory.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import scores
import torch
from torch import Tensor

from imm.functional import crps, energy_score, noise
from imm.ops import dispatch
from imm.ops.mmd import KERNELS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: What runs on this device, and the reference.
RUNS = {"chosen": torch.ops.imm.energy_score, "reference": functools.partial(dispatch.run, "energy_score", "reference")}
runs = pytest.mark.parametrize("run", RUNS)


def sets(G: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(G, n, D, generator=gen, dtype=torch.float64).to(dtype) for n in (N, M))
    return x, y


def check(run: str, x: Tensor, y: Tensor, alpha: float = 1.0, **options: Any) -> None:
    """Loss and gradient against the definition."""
    pair = scores.pair_weight(x.shape[1], alpha)
    kernel, bandwidths = options.get("kernel", "energy"), list(options.get("bandwidths", [1.0]))
    scale, weight = options.get("scale"), options.get("weight")
    found = RUNS[run](x, y, None, None, 0, scale, weight, 1.0, alpha, None, kernel, bandwidths)
    scores.assert_matches(found, scores.energy_score(x, y, pair, weight, scale, kernel, bandwidths))
    assert found[0].dtype == torch.promote_types(x.dtype, torch.float32)
    assert found[1].dtype == x.dtype


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_and_dtypes_match_float64(kernel: str, dtype: torch.dtype, run: str, device: str) -> None:
    for (N, M, D), alpha in (((1, 3, 5), 0.0), ((2, 1, 16), 1.0), ((8, 13, 100), 0.95), ((5, 4, 1), 0.5)):
        x, y = (v.to(device) for v in sets(3, N, M, D, dtype))
        options = {"kernel": kernel, "bandwidths": [1.0] if kernel == "energy" else [0.5, 2.0]}
        numbers = {"scale": torch.tensor([0.5, 1.0, 2.0]).to(device), "weight": torch.rand(3, device=device) + 0.5}
        check(run, x, y, alpha, **options)
        check(run, x, y, alpha, **options, **numbers)


@runs
@pytest.mark.parametrize(("N", "M", "D"), [(2, 1, 1), (8, 1, 1), (50, 1, 1), (3, 7, 2), (4, 1, 90), (16, 5, 17), (3, 2, 700)])
def test_sizes_and_layouts_match_float64(N: int, M: int, D: int, run: str, device: str) -> None:
    x, y = (v.to(device) for v in sets(37, N, M, D))
    check(run, x, y)
    first = [v.transpose(0, 1).contiguous().transpose(0, 1) for v in (x, y)]
    last = [v.permute(1, 2, 0).contiguous().permute(2, 0, 1) for v in (x, y)]
    check(run, *first)
    check(run, *last)
    check(run, x[::2], y[::2], 0.0)
    check(run, x[..., D // 2 :], y[..., : D - D // 2])
    check(run, x[..., ::2], y[..., ::2])
    check(run, x, y[:, :1].expand(37, M, D))
    check(run, x + 300.0, y + 300.0)


@runs
@pytest.mark.parametrize(("N", "M", "D"), [(8, 100, 128), (3, 5, 4), (2, 300, 20)])
def test_drawn_targets_are_those_of_noise(N: int, M: int, D: int, run: str, device: str) -> None:
    x, y = sets(3, N, 2, D)
    mean, log_std, seed = y[:, 0], 0.3 * y[:, 1] - 1.0, 2**40 + 5
    n = noise(range(seed, seed + 3), (M, D))
    targets = mean.double()[:, None] + log_std.double().exp()[:, None] * n.double()
    given = [v.to(device) for v in (x, mean, log_std, torch.tensor([seed]))]
    found = RUNS[run](*given, M, None, None, 1.0, 1.0, None, "energy", [1.0])
    scores.assert_matches([v.cpu() for v in found], scores.energy_score(x, targets, scores.pair_weight(N, 1.0)))
    x, mean, log_std, _ = given
    drawn = functools.partial(energy_score, x, mean=mean, log_std=log_std, draws=M)
    chosen = RUNS["chosen"](*given, M, None, None, 1.0, 1.0, None, "energy", [1.0])[0]
    assert torch.equal(drawn(seed=seed), chosen)
    assert not torch.equal(drawn(seed=seed + 1), chosen)


def test_a_draw_is_within_4e_6_of_noise(device: str) -> None:
    """Twice the distance of one member at 0 from one target is the norm of a draw. The first seed's is small: there a uniform
    number near 1 has few digits in float32."""
    seeds = [3760026, *range(64)]
    n = torch.stack([noise([seed], (4,)).double()[0] for seed in seeds])
    assert n[0, :2].norm() < 0.002
    zeros, two = torch.zeros(1, 4, device=device), torch.tensor([[0.0, 0.0, -math.inf, -math.inf]], device=device)
    for seed, right in zip(seeds, n[:, :2].norm(dim=1), strict=True):
        loss = energy_score(zeros[None], mean=zeros, log_std=two, draws=1, seed=seed, alpha=0.0)
        assert abs(float(loss) - 2 * right) < 2 * 4e-6 * 1.5


def test_estimators_are_one_number() -> None:
    """alpha goes from V to fair in a straight line; N = 2 as others write it."""
    x, y = sets(4, 6, 3, 5)
    v, almost, fair = (energy_score(x, y, alpha=alpha) for alpha in (0.0, 0.95, 1.0))
    torch.testing.assert_close(almost, 0.05 * v + 0.95 * fair)
    torch.testing.assert_close(fair, energy_score(x, y, pair_weight=1.0 / (6 * 5)))
    torch.testing.assert_close(v, energy_score(x, y, pair_weight=1.0 / 36))
    x, y = sets(4, 2, 1, 5)
    d = lambda a, b: (a - b).norm(dim=1)
    ear = d(x[:, 0], y[:, 0]) + d(x[:, 1], y[:, 0]) - d(x[:, 0], x[:, 1])
    torch.testing.assert_close(energy_score(x, y), ear)


@pytest.mark.parametrize("N", [1, 2, 7])
def test_crps_is_the_integral_of_its_definition(N: int, device: str) -> None:
    """Of the empirical distribution function's squared distance to the observation's step, exactly, by the sorted members."""
    members, observation = torch.randn(N, 3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    cuts, order = torch.cat([members, observation[None]]).sort(0)
    widths = cuts.diff(dim=0)
    below = (order < N).cumsum(0)[:-1] / N
    step = (order == N).cumsum(0)[:-1]
    exact = (widths * (below - step).square()).sum(0)
    score = crps(members.float().to(device), observation.float().to(device), alpha=0.0)
    torch.testing.assert_close(score.cpu().double(), exact, rtol=1e-5, atol=1e-6)
    if N == 1:
        error = (members[0].float() - observation.float()).abs()
        assert torch.equal(crps(members.float(), observation.float(), alpha=0.0), error)
    else:
        x, y = members.reshape(N, 15).t()[..., None].float(), observation.reshape(15, 1, 1).float()
        torch.testing.assert_close(crps(members.float(), observation.float()).flatten(), 0.5 * energy_score(x, y))


@pytest.mark.parametrize("D", [1, 4])
def test_the_expectation_is_least_at_the_true_law(D: int) -> None:
    """Of laws N(shift, width^2) for targets N(0, 1): a wrong sign or factor of a term moves the minimum."""
    gen = torch.Generator().manual_seed(3)
    n, y = torch.randn(40000, 4, D, generator=gen), torch.randn(40000, 1, D, generator=gen)
    mean = lambda shift, width: float(energy_score(shift + width * n, y).mean())
    best = mean(0.0, 1.0)
    for shift, width in ((0.3, 1.0), (-0.3, 1.0), (0.0, 0.75), (0.0, 1.3)):
        assert mean(shift, width) > best + 0.005 * D**0.5
    if D == 1:  # 2 E|X - Y| - E|X - X'|, all of them 2 / sqrt(pi)
        assert abs(best - 2 / math.sqrt(math.pi)) < 0.01


@runs
@pytest.mark.parametrize("D", [1, 6])
def test_ties_and_nan_stay_in_their_group(D: int, run: str, device: str) -> None:
    x, y = (v.to(device) for v in sets(40, 4, 2, D))
    plain = RUNS[run](x, y, None, None, 0, None, None, 1.0, 1.0, None, "energy", [1.0])
    x[1], x[2, 1], x[3, 2] = x[1, 0], x[2, 0], y[3, 1]
    y[4] = x[4, :1]
    x[4] = x[4, :1]
    check(run, x, y)
    x[5, 1, 0], x[6, 0, 0], y[7, 0, 0] = math.nan, math.inf, math.nan
    loss, grad = RUNS[run](x, y, None, None, 0, None, None, 1.0, 1.0, None, "energy", [1.0])
    assert loss[4] == 0
    assert not grad[4].any()
    assert loss.isnan()[5:8].tolist() == [True, True, True]
    assert grad.isnan().flatten(1).any(1)[[5, 7]].all()
    others = [g for g in range(40) if g not in range(1, 8)]
    assert torch.equal(loss[others], plain[0][others])
    assert torch.equal(grad[others], plain[1][others])


@runs
@pytest.mark.parametrize("D", [1, 6])
def test_weight_0_is_a_mask(D: int, run: str, device: str) -> None:
    x, y = (v.to(device) for v in sets(20, 3, 1, D))
    weight = torch.ones(20, device=device)
    weight[3:9] = 0
    x[4] = math.nan
    loss, grad = RUNS[run](x, y, None, None, 0, None, weight, 1.0, 1.0, None, "energy", [1.0])
    assert loss.isfinite().all()
    assert not loss[3:9].any()
    assert not grad[3:9].any()
    assert grad[9:].flatten(1).any(1).all()
    assert not energy_score(x, y, weight=0.0).any()


@pytest.mark.parametrize(("G", "N", "D"), [(5000, 8, 1), (300, 4, 40)])
def test_threads_change_no_bits(G: int, N: int, D: int) -> None:
    x, y = sets(G, N, 30 if D > 1 else 1, D)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(RUNS["chosen"](x, y, None, None, 0, None, None, 1.0, 1.0, None, "energy", [1.0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_gradient_goes_to_x_only() -> None:
    x, y = sets(3, 4, 2, 4)
    x.requires_grad_()
    for learns in ("y", "mean", "log_std"):
        given = {"y": y} if learns == "y" else {"mean": y[:, 0], "log_std": y[:, 1], "draws": 3, "seed": 1}
        given[learns] = given[learns].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="gradient goes to x only"):
            energy_score(x, **given)
    # Upstream of each group, layouts of the gradient.
    upstream = torch.tensor([1.0, 2.0, -3.0])
    (ones,), (scaled,) = (torch.autograd.grad(energy_score(x, y), x, u) for u in (torch.ones(3), upstream))
    torch.testing.assert_close(scaled, upstream[:, None, None] * ones)
    members = torch.randn(4, 6, 7, requires_grad=True)
    crps(members, torch.randn(6, 7)).mean().backward()
    assert members.grad.is_contiguous()


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck(kernel: str, device: str) -> None:
    x, y = (v.to(device) for v in sets(2, 3, 2, 4, torch.float64))
    x.requires_grad_()
    options = {"kernel": kernel, "scale": torch.tensor([0.7, 3.0], device=device), "alpha": 0.3}
    assert torch.autograd.gradcheck(lambda v: energy_score(v, y, **options), x)
    drawn = {"mean": y[:, 0], "log_std": y[:, 1], "draws": 5, "seed": 3}
    assert torch.autograd.gradcheck(lambda v: energy_score(v, **drawn, **options), x)
    members = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: crps(v, y.flatten()[:5]), members)


def test_it_compiles_whole(device: str) -> None:
    x, y = (v.to(device) for v in sets(3, 4, 2, 8))
    calls = {
        "given": lambda x, y: energy_score(x, y, weight=0.5, scale=2.0, kernel="laplace"),
        "drawn": lambda x, y: energy_score(x, mean=y[:, 0], log_std=y[:, 1], draws=5, seed=11),
        "crps": lambda x, y: crps(x.flatten(1).t(), y[:, 0, 0]),
    }
    for call in calls.values():
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss, again = call(mine, y), torch.compile(call, fullgraph=True, backend="aot_eager")(other, y)
        assert torch.equal(loss, again)
        loss.sum().backward()
        again.sum().backward()
        assert torch.equal(mine.grad, other.grad)


X, Y = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
DRAWN: dict[str, Any] = {"mean": Y[:, 0], "log_std": Y[:, 1], "draws": 5, "seed": 1}


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (X, {"y": Y[:, :0]}, r"y: expected \[G, M, D\] with M > 0, got \[3, 0, 8\]"),
        (X[:, :0], {"y": Y}, r"x: expected \[G, N, D\] with N, D > 0, got \[3, 0, 8\]"),
        (X[0], {"y": Y}, r"x: expected \[G, N, D\] with N, D > 0, got \[4, 8\]"),
        (X, {"y": Y[:2]}, r"y: expected \[3, 2, 8\], got \[2, 2, 8\]"),
        (X, {"y": Y[..., :7]}, r"y: expected \[3, 2, 8\], got \[3, 2, 7\]"),
        (X, {"y": Y.double()}, "y: expected x's dtype torch.float32, got torch.float64"),
        (X.long(), {"y": Y}, "x: expected a floating dtype of 16, 32 or 64 bits, got torch.int64"),
        (X, {"y": Y.to("meta")}, "y: expected the device"),
        (X, {"y": Y, "alpha": 1.5}, r"alpha: expected a number in \[0, 1\], got 1.5"),
        (X, {"y": Y, "alpha": -0.1}, r"alpha: expected a number in \[0, 1\], got -0.1"),
        (X, {"y": Y, "alpha": math.nan}, r"alpha: expected a number in \[0, 1\], got nan"),
        (X[:, :1], {"y": Y}, "alpha: expected 0 for a single member, N = 1, got 1"),
        (X, {"y": Y, "weight": torch.ones(2)}, r"weight: expected one number per group, \[3\], got \[2\]"),
        (X, {"y": Y, "scale": torch.ones(3).long()}, "scale: expected a floating dtype, got torch.int64"),
        (X, {"y": Y, "scale": -1.0}, "scale: expected a number >= 0, got -1.0"),
        (X, {"y": Y, "scale": torch.tensor([1.0, -1.0, 1.0])}, "scale: expected numbers >= 0, got"),
        (X, {"y": Y, "kernel": "cosine"}, "kernel: expected one of"),
        (X, {"y": Y, "bandwidths": (1.0, 2.0)}, "bandwidths: expected one for the energy kernel"),
        (X, {}, r"y: expected y, or all of mean, log_std, draws and seed, got \[\]"),
        (X, {"y": Y, "mean": Y[:, 0]}, r"y: expected y, or all of .*, got \['y', 'mean'\]"),
        (X, {**DRAWN, "log_std": None}, r"y: expected y, or all of .*, got \['mean', 'draws', 'seed'\]"),
        (X, {**DRAWN, "draws": 0}, "draws: expected a count >= 1, got 0"),
        (X, {**DRAWN, "mean": Y}, r"mean: expected \[3, 8\], got \[3, 2, 8\]"),
        (X, {**DRAWN, "log_std": Y[:, 1].bfloat16()}, "log_std: expected x's dtype torch.float32, got torch.bfloat16"),
        (X, {**DRAWN, "seed": torch.zeros(3).long()}, r"seed: expected one int64, \[1\], got \[3\] of torch.int64"),
        (X, {**DRAWN, "seed": 3.0}, r"seed: expected an integer in \[0, 2\^63\) or a \[1\] int64 tensor, got 3\.0"),
        (X, {**DRAWN, "seed": -1}, r"seed: expected an integer in \[0, 2\^63\) or .*, got -1"),
        (X[..., :6], {**DRAWN, "mean": Y[:, 0, :6], "log_std": Y[:, 0, :6]}, "x: expected D divisible by 4 with drawn targets"),
    ],
)
def test_bad_input_is_said(x: Tensor, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        energy_score(x, **given)
    assert len(str(caught.value).splitlines()) == 1


def test_bad_input_of_crps_is_said() -> None:
    with pytest.raises(ValueError, match=r"ensemble: expected \['N', 3, 5\] with N > 0 for this observation, got \[8, 3, 4\]"):
        crps(torch.zeros(8, 3, 4), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="alpha: expected 0 for a single member, N = 1, got 1"):
        crps(torch.zeros(1, 3), torch.zeros(3))
    assert crps(torch.zeros(4, 0), torch.zeros(0)).shape == (0,)
