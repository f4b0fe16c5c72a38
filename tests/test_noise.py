"""imm::noise: the Philox stream and what follows from an image's seed alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import imm
from imm.ops.noise import philox_4x32


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    """The known-answer vectors published with the generator (Random123)."""
    assert tuple(int(w) for w in philox_4x32(words(*counter), words(*key))) == expected


def test_the_mapping_from_words_to_normals() -> None:
    seed, step = (5 << 32) + 9, 3
    value = imm.noise([seed], (7,), step)[0]
    for q in range(2):
        r = [int(w) for w in philox_4x32(words(q, 0, step, 0), words(9, 5))]
        for pair in range(2):
            radius = math.sqrt(-2 * math.log((r[2 * pair] + 0.5) / 2**32))
            angle = 2 * math.pi * (r[2 * pair + 1] + 0.5) / 2**32
            for lane, expected in ((2 * pair, radius * math.cos(angle)), (2 * pair + 1, radius * math.sin(angle))):
                if 4 * q + lane < 7:
                    assert float(value[4 * q + lane]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_an_images_noise_depends_on_its_seed_alone(batch, device) -> None:
    seeds = list(range(100, 164))
    whole = imm.noise(seeds, (3, 8, 8), 1, device=device)
    parts = [imm.noise(seeds[i : i + batch], (3, 8, 8), 1, device=device) for i in range(0, 64, batch)]
    assert torch.equal(torch.cat(parts), whole)


def test_devices_agree(device) -> None:
    torch.testing.assert_close(
        imm.noise(range(9), (33,), device=device).cpu(), imm.noise(range(9), (33,)), rtol=1e-6, atol=1e-7
    )


def test_steps_and_seeds_differ_and_prefixes_agree() -> None:
    a, b = imm.noise([1, 2], (64,), 0), imm.noise([1, 2], (64,), 1)
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a, b)
    assert torch.equal(imm.noise([1, 2], (61,), 0), a[:, :61])
    assert not torch.equal(imm.noise([1], (64,)), imm.noise([1 + 2**32], (64,)))


def test_it_is_standard_normal() -> None:
    values = imm.noise(range(512), (2048,)).double().flatten()
    n = len(values)
    assert abs(float(values.mean())) < 4 / math.sqrt(n)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((values**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    inside = float((values.abs() < 1.96).double().mean())
    assert inside == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / n))
    rows = values.reshape(512, 2048)
    correlation = float((rows[:, :-1] * rows[:, 1:]).mean())
    assert abs(correlation) < 4 / math.sqrt(n)


def test_numpy_seeds() -> None:
    assert torch.equal(imm.noise(np.arange(3), (5,)), imm.noise(range(3), (5,)))


def test_empty() -> None:
    assert imm.noise([], (3, 4)).shape == (0, 3, 4)
    assert imm.noise([3], (0,)).shape == (1, 0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([-1], (3,)), "integers in"),
        (([2**63], (3,)), "integers in"),
        (([True], (3,)), "integers in"),
        ((torch.tensor([-1]), (3,)), "integers in"),
        (([1.5], (3,)), "integers in"),
        ((torch.zeros(3), (3,)), "int64 tensor"),
        ((torch.zeros(3, 1, dtype=torch.int64), (3,)), r"\[B\] int64"),
        (([1], (-3,)), "sizes >= 0"),
        (([1], (3,), -1), "counts >= 0"),
    ],
)
def test_bad_input_is_refused(arguments, error) -> None:
    with pytest.raises(ValueError, match=error):
        imm.noise(*arguments)
