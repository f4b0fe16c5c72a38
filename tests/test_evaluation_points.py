"""Scores of points in few dimensions: against closed forms and plain formulas."""

from __future__ import annotations

import pytest
import torch

from imm.evaluation import energy_distance, sliced_wasserstein, total_variation


def normal(count: int, seed: int, features: int = 2) -> torch.Tensor:
    return torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_energy_distance_is_its_formula_and_has_no_bias() -> None:
    x, y = normal(30, 0), normal(2100, 1) + 0.3
    mean = lambda a, b, own: sum((p - q).norm() for p in a for q in b) / (len(a) * (len(b) - own))
    small = y[:20]
    expected = 2 * mean(x, small, 0) - mean(x, x, 1) - mean(small, small, 1)
    assert energy_distance(x, small) == pytest.approx(float(expected), rel=1e-12)
    assert energy_distance(y[:1000].float(), y[1000:].float()) == pytest.approx(0.0, abs=3e-3)
    drawn = [energy_distance(normal(8, 2 * seed), normal(8, 2 * seed + 1)) for seed in range(400)]
    assert abs(sum(drawn) / 400) < 0.03
    assert energy_distance(torch.zeros(3, 1), torch.ones(4, 1)) == 2.0


def test_the_sliced_distance_of_shifted_and_scaled_sets() -> None:
    x = normal(2000, 0, 3)
    seeded = lambda: torch.Generator().manual_seed(5)
    shift = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, 1024, seeded()) == pytest.approx(3 / 3**0.5, rel=0.06)  # E cos^2 = 1 / D
    assert sliced_wasserstein(x, 2 * x, 64, seeded()) == pytest.approx(1.0, rel=0.03)
    assert sliced_wasserstein(x, x.flip(0), 8, seeded()) == 0.0
    assert sliced_wasserstein(x[:1000], x, 64, seeded()) < 0.15
    assert sliced_wasserstein(x, x + shift, 8, seeded()) == sliced_wasserstein(x, x + shift, 8, seeded())


def test_total_variation_of_shares_and_counts() -> None:
    assert total_variation(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])) == pytest.approx(0.5)
    assert total_variation(torch.tensor([10, 30]), torch.tensor([1, 3])) == 0.0
    assert total_variation(torch.tensor([1, 0]), torch.tensor([0, 7])) == 1.0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x and y: expected \[N, D\] and \[M, D\] with two points or more, got \[3, 2\]"):
        energy_distance(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="directions: expected a count >= 1, got 0"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="p and q: expected shares or counts of the same values"):
        total_variation(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0]))
