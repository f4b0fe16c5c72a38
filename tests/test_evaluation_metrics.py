"""The arithmetic of the metrics: closed forms, torch-fidelity's recorded numbers, degenerate sets, merging."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from imm.evaluation import (
    FeatureStatistics,
    MMDReference,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
)
from imm.evaluation.evaluate import gathered, split_of
from imm.evaluation.statistics import is_statistics, load_statistics, save_statistics

RECORDED = json.loads((Path(__file__).parent / "data" / "evaluation_numbers.json").read_text())


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    out = FeatureStatistics(features.shape[1])
    out.update(features)
    return out


def recorded_features(seed: int, n: int, d: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """As when the numbers were recorded."""
    base = np.random.default_rng(seed).standard_normal((n, d)) @ np.random.default_rng(100).standard_normal((d, d)) / d**0.5
    return torch.from_numpy(base * scale + shift)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{case['n']}x{case['d']}")
def test_recorded_numbers(case) -> None:
    x = recorded_features(1, case["n"], case["d"], case["shift"], case["scale"])
    y = recorded_features(2, case["m"], case["d"])
    distance = statistics_of(x).frechet_distance(statistics_of(y))
    assert distance == pytest.approx(case["frechet_inception_distance"], rel=1e-8)  # theirs has 8 digits
    assert distance == pytest.approx(case["frechet_exact"], rel=1e-12)
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(case["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(case["kernel_inception_distance_std"], rel=1e-7, abs=1e-13)
    shares = neighbourhoods(x, y, rows=100)
    assert shares.precision == pytest.approx(case["precision"], abs=1e-7)  # recorded in float32
    assert shares.recall == pytest.approx(case["recall"], abs=1e-7)
    assert inception_score(x) == pytest.approx((case["inception_score_mean"], case["inception_score_std"]), rel=1e-9)


def test_frechet_closed_forms() -> None:
    d = 6
    zero, one = torch.zeros(d), torch.eye(d)
    assert frechet_distance(zero, one, zero + 2.0, 4.0 * one) == pytest.approx(d * 4.0 + d * 1.0, rel=1e-12)
    first, second = torch.rand(2, d, dtype=torch.float64)
    expected = float((first.sqrt() - second.sqrt()).square().sum())  # commuting covariances
    assert frechet_distance(zero, first.diag(), zero, second.diag()) == pytest.approx(expected, rel=1e-12)
    # One line each, at an angle: tr (s1 s2)^(1/2) = |u.v|.
    u, v = (torch.nn.functional.normalize(torch.randn(d, dtype=torch.float64), dim=0) for _ in range(2))
    value = frechet_distance(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert value == pytest.approx(2.0 - 2.0 * abs(float(u @ v)), rel=1e-12)
    assert frechet_distance(zero, 0.0 * one, zero, one) == pytest.approx(d)


def test_fewer_images_than_dimensions() -> None:
    x = torch.randn(20, 64)
    same = statistics_of(x).frechet_distance(statistics_of(x.clone()))
    assert same < 1e-11
    moved = statistics_of(x).frechet_distance(statistics_of(x + 3.0))
    assert moved == pytest.approx(64 * 9.0, rel=1e-6)  # x + 3 rounds in float32
    assert statistics_of(torch.ones(5, 3)).frechet_distance(statistics_of(torch.ones(9, 3))) == 0.0


def test_frechet_refusals() -> None:
    zero, one = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"sigma2: expected \[3, 3\], got \[2, 2\]"):
        frechet_distance(zero, one, zero, torch.eye(2))
    with pytest.raises(ValueError, match="mu1: expected finite numbers"):
        frechet_distance(zero + float("nan"), one, zero, one)
    with pytest.raises(ValueError, match="positive semi-definite"):
        frechet_distance(zero, one, zero, -one)


def test_parts_make_the_whole(device) -> None:
    x = torch.randn(501, 12, device=device) * 3.0 + 1000.0  # sums of squares would lose the variance
    whole = statistics_of(x)
    merged = FeatureStatistics(12)
    for part in x.split(77):
        merged.merge(statistics_of(part))
    merged.merge(FeatureStatistics(12))
    exact = x.double().cpu()
    assert merged.n == 501
    for one in (whole, merged):
        torch.testing.assert_close(one.mean, exact.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(one.covariance(), exact.T.cov(), rtol=1e-10, atol=1e-10)


def test_statistics_refusals(tmp_path) -> None:
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match=r"features: expected \[N, 4\], got \[2, 3\]"):
        statistics.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="expected finite numbers, got NaN"):
        statistics.update(torch.full((2, 4), float("nan")))
    assert statistics.n == 0
    statistics.update(torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        statistics.covariance()
    with pytest.raises(ValueError, match="expected 4 dimensions, got 3"):
        statistics.merge(FeatureStatistics(3))


def test_statistics_files(tmp_path) -> None:
    path = tmp_path / "ref.npz"
    statistics = statistics_of(torch.randn(50, 7))
    save_statistics(path, {"net": statistics}, {"reference": {"count": 50}})
    assert is_statistics(path)
    assert [p.name for p in tmp_path.iterdir()] == ["ref.npz"]
    found, about = load_statistics(path)
    assert about == {"reference": {"count": 50}}
    assert found["net"].n == 50
    assert torch.equal(found["net"].mean, statistics.mean)
    assert torch.equal(found["net"].m2, statistics.m2)
    path.write_bytes(path.read_bytes()[:200])
    assert not is_statistics(path)
    with pytest.raises(ValueError, match="expected statistics that imm eval stats wrote"):
        load_statistics(path)


def share(rank: int, path: str) -> None:
    """What one of two processes knows in the end, in a file."""
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=2)
    x = torch.load(f"{path}.x")
    mine = split_of(len(x), rank, 2)
    statistics = FeatureStatistics(x.shape[1])
    for part in x[mine.start : mine.stop].split(13):
        statistics.update(part)
    statistics.all_reduce()
    everything = gathered(x[mine.start : mine.stop], len(x))
    torch.save((statistics.n, statistics.mean, statistics.m2, everything), f"{path}.{rank}")
    dist.destroy_process_group()


def test_two_processes_are_as_one(tmp_path) -> None:
    x = torch.randn(101, 9) + 5.0
    torch.save(x, tmp_path / "run.x")
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_evaluation_metrics as test\n"
    other = subprocess.Popen([sys.executable, "-c", f"{program}test.share(1, {str(tmp_path / 'run')!r})"])
    share(0, str(tmp_path / "run"))
    assert other.wait(timeout=100) == 0
    results = [torch.load(tmp_path / f"run.{rank}") for rank in range(2)]
    whole = statistics_of(x)
    for n, mean, m2, everything in results:
        assert n == 101
        torch.testing.assert_close(mean, whole.mean, rtol=1e-10, atol=0)
        torch.testing.assert_close(m2, whole.m2, rtol=1e-10, atol=1e-9)
        assert torch.equal(everything, x)
    assert all(torch.equal(results[0][i], results[1][i]) for i in (1, 2))


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    x, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64) + 0.5
    kernel = lambda a, b: (float(a @ b) / 4 + 1) ** 3
    own = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(30) for j in range(30) if i != j) / (30 * 29)
    cross = sum(kernel(a, b) for a in x for b in y) / 900
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(own - 2 * cross, rel=1e-10)  # every subset is the whole set
    assert std == pytest.approx(0.0, abs=1e-12)


def test_neighbourhoods_by_hand() -> None:
    line = torch.arange(10.0)[:, None]
    same = neighbourhoods(line, line)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    far = neighbourhoods(line + 100.0, line)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    # Samples on one real image: all inside, but they reach no other, and few real balls hold them.
    stuck = neighbourhoods(torch.full((10, 1), 0.0) + 1e-3 * line, line)
    assert stuck.precision == 1.0
    assert stuck.recall == 0.1
    # The fifth neighbour of 0 to 9 is 5, 4, 3, 3, 3, 3, 3, 3, 4, 5 away: the balls of 0, 1 and 2 hold all, 3's all but 0.
    assert stuck.coverage == 0.4
    assert stuck.density == pytest.approx((10 + 10 + 10 + 9) / (5 * 10))


def test_inception_score_limits() -> None:
    logits = torch.full((1000, 10), -1e3).scatter(1, (torch.arange(1000) % 10)[:, None], 1e3)
    assert inception_score(logits)[0] == pytest.approx(10.0, rel=0.1)
    assert inception_score(torch.zeros(100, 10)) == pytest.approx((1.0, 0.0))


def test_mmd_reference(device) -> None:
    real = torch.randn(300, 20, device=device)
    reference = MMDReference(real, 200)
    near, far = reference.score(torch.randn(300, 20, device=device)), reference.score(real + 1.0)
    assert abs(near) < 0.005
    assert far > 0.05
    scale = 1.0 / torch.cdist(r := real[torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200]], r)
    scale = 1.0 / (1.0 / scale)[(1.0 / scale) > 0].median()
    kernel = lambda a, b: torch.exp(-torch.cdist(a.double(), b.double()) * scale)
    x = real[:100] + 0.3
    off = lambda k: (k.sum() - len(k)) / (len(k) * (len(k) - 1))
    expected = float(off(kernel(x, x)) + off(kernel(r, r)) - 2 * kernel(x, r).mean())
    assert reference.score(x) == pytest.approx(expected, abs=2e-6)
    assert MMDReference(torch.ones(5, 3, device=device)).score(torch.ones(4, 3, device=device)) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="at least two rows"):
        reference.score(real[:1])


@pytest.mark.parametrize("function", [kernel_distance, neighbourhoods])
def test_pairs_are_checked(function) -> None:
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="features of one length, got 3 and 2"):
        function(x, x[:, :2])
    with pytest.raises(ValueError, match="y: expected finite numbers"):
        function(x, x / 0.0)
    with pytest.raises(ValueError, match="x: expected features"):
        function(x[:1], x)
