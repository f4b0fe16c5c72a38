"""Geometric augmentation: against an image that is known everywhere, its labels, and how often what happens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imm.data import augment
from imm.data.augmentation import draw, labels, transform

SIDE = 48
RIGHT_ANGLE = math.pi / 2


def scene(x: Tensor, y: Tensor) -> Tensor:
    """Brightness at pixels from the centre, y down."""
    return torch.sin(0.15 * x + 0.3) * torch.cos(0.11 * y) + torch.exp(-((x - 4) ** 2 + (y + 6) ** 2) / 60)


def centred(height: int, width: int) -> tuple[Tensor, Tensor]:
    x, y = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2 for size in (width, height))
    return x.expand(height, width), y[:, None].expand(height, width)


def one(**numbers: float) -> Tensor:
    """[1, 8] of a0=..., 0 where not given."""
    return torch.tensor([[numbers.get(f"a{i}", 0.0) for i in range(8)]], dtype=torch.float64)


def where_from(x: Tensor, y: Tensor, a: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where a place of the result was in the image, by products of matrices in the order of the table."""

    def turn(angle: float) -> Tensor:
        return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)

    a0, a1, a2, a3, a4, a5, a6, a7 = a[0].tolist()
    forward = torch.diag(torch.tensor([1 - 2 * a0, 1 - 2 * a1], dtype=torch.float64))
    forward = 2 ** (0.2 * a2) * forward
    forward = turn(-a3) @ forward
    stretch = torch.diag(torch.tensor([2 ** (0.2 * a5), 2 ** (-0.2 * a5)], dtype=torch.float64))
    forward = turn(-a4) @ stretch @ turn(a4) @ forward  # anticlockwise, as a3
    shift = torch.tensor([a6 * width / 8, a7 * height / 8], dtype=torch.float64)
    places = torch.stack([x, y], -1) - shift
    back = places @ torch.linalg.inv(forward).T
    return back[..., 0], back[..., 1]


@settings(deadline=None)
@given(
    st.sampled_from([(48, 48), (40, 64)]),
    st.tuples(*[st.integers(0, 1)] * 2, *[st.floats(-1, 1)] * 3, st.floats(-2, 2), *[st.floats(-1, 1)] * 2),
)
def test_an_image_that_is_known_everywhere(size, numbers) -> None:
    height, width = size
    x, y = centred(height, width)
    a = one(**{f"a{i}": value for i, value in enumerate(numbers)})
    found = transform(scene(x, y)[None, None], a)[0, 0]
    from_x, from_y = where_from(x, y, a, height, width)
    seen = (from_x.abs() < width / 2 - 6) & (from_y.abs() < height / 2 - 6)  # what is mirrored at the edges is another scene
    assert float((found - scene(from_x, from_y))[seen].abs().max()) < 5e-3


def test_directions() -> None:
    """A spot right of the centre: turned anticlockwise it is above, moved down it is below."""
    x, y = centred(SIDE, SIDE)
    spot = torch.exp(-((x - 8) ** 2 + y**2) / 8)[None, None]

    def centre(image: Tensor) -> tuple[float, float]:
        return tuple(round(float((image * along).sum() / image.sum()), 1) for along in (x, y))

    assert centre(transform(spot, one(a3=RIGHT_ANGLE))) == (0.0, -8.0)
    assert centre(transform(spot, one(a0=1))) == (-8.0, 0.0)
    assert centre(transform(spot, one(a6=-1.0, a7=1.0))) == (2.0, 6.0)
    assert centre(transform(spot, one(a2=2.0))) == (round(8 * 2**0.4, 1), 0.0)
    assert centre(transform(spot, one(a4=RIGHT_ANGLE, a5=1.0))) == (round(8 * 2**-0.2, 1), 0.0)


def test_the_stretch_is_along_the_direction_that_edm_labels() -> None:
    """Labels (a5 cos a4, a5 sin a4) stretch along (cos a4, -sin a4) in pixels: up to the right for a4 = 45 degrees."""
    x, y = centred(SIDE, SIDE)
    spot = torch.exp(-(x**2 + y**2) / 18)[None, None]
    a = one(a4=RIGHT_ANGLE / 2, a5=2.0)
    assert labels(a)[0, 5:7].tolist() == pytest.approx([2 * 0.5**0.5] * 2)
    wide = transform(spot, a)[0, 0]

    def spread(along_x: float, along_y: float) -> float:
        return float((wide * (along_x * x + along_y * y) ** 2).sum() / wide.sum())

    up, down = spread(0.5**0.5, -(0.5**0.5)), spread(0.5**0.5, 0.5**0.5)
    assert up / down == pytest.approx(2 ** (4 * 0.2 * 2), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_move_is_exact(dtype) -> None:
    noise = torch.randn(4, 3, 8, 13, dtype=dtype)
    a = torch.zeros(4, 8)
    a[1, 0] = a[2, 1] = a[3, 0] = a[3, 1] = 1
    expected = torch.stack([noise[0], noise[1].flip(2), noise[2].flip(1), noise[3].flip(1, 2)])
    assert torch.equal(transform(noise, a), expected)


def test_the_two_passes_of_the_filter_give_the_image_again() -> None:
    """Even noise, when it hardly moves: neither they nor the edges lose anything."""
    noise = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    torch.testing.assert_close(transform(noise, one(a2=1e-12)), noise, rtol=0, atol=1e-10)


def test_an_even_image_stays_even() -> None:
    a = draw(64, 1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform(torch.full((64, 1, 9, 9), 0.7), a), torch.full((64, 1, 9, 9), 0.7))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_sampled_in_32(dtype) -> None:
    pictures, a = torch.rand(300, 1, 16, 16).to(dtype), draw(300, 0.5)
    assert torch.equal(transform(pictures, a), transform(pictures.float(), a).to(dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_without_waiting_for_it() -> None:
    pictures, a = torch.rand(300, 3, 16, 16), draw(300, 0.5)
    on_gpu, of_gpu = pictures.cuda(), a.cuda()
    augment(on_gpu, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(on_gpu, 0.5)
        found = transform(on_gpu, of_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), transform(pictures, a), rtol=0, atol=1e-5)


def test_what_the_network_is_told() -> None:
    a = draw(200, 0.5, generator=torch.Generator().manual_seed(0))
    told = labels(a)
    for row, (a0, a1, a2, a3, a4, a5, a6, a7) in zip(told.tolist(), a.tolist(), strict=True):
        expected = [a0, a1, a2, math.cos(a3) - 1, math.sin(a3), a5 * math.cos(a4), a5 * math.sin(a4), a6, a7]
        assert row == pytest.approx(expected, abs=1e-6)
    assert torch.equal(labels(torch.zeros(3, 8)), torch.zeros(3, 9))


def test_how_often_what_is_drawn() -> None:
    count, p = 40_000, 0.12
    a = draw(count, p, generator=torch.Generator().manual_seed(0))
    rates = (a != 0).double().mean(0)
    expected = torch.tensor([0.5, p / 2, p, p, p / 2, *[p] * 3], dtype=torch.float64)
    assert float(((rates - expected) / (expected * (1 - expected) / count).sqrt()).abs().max()) < 4
    drawn = a != 0
    assert not (drawn[:, 4] & ~drawn[:, 5]).any()
    for some in (a[drawn[:, 5]], (whole := draw(count, 1.0, generator=torch.Generator().manual_seed(1)))):
        along_axes = float((some[:, 4] == 0).double().mean())
        assert along_axes == pytest.approx(0.5, abs=2 / len(some) ** 0.5)  # whatever the probability
    assert (whole[:, 1:] != 0).double().mean(0).tolist() == pytest.approx([0.5, 1, 1, 0.5, 1, 1, 1], abs=0.02)
    assert torch.equal(drawn[:, 6], drawn[:, 7])
    together = (drawn[:, 2] & drawn[:, 3]).double().mean()
    assert float(together) == pytest.approx(p * p, abs=4 * (p * p / count) ** 0.5)
    for column in (2, 5, 6, 7):
        assert float(a[drawn[:, column], column].std()) == pytest.approx(1, abs=0.05)
    for column in (3, 4):
        assert float(a[:, column].abs().max()) < math.pi + 1e-6
        assert float(a[drawn[:, column], column].std()) == pytest.approx(math.pi / 3**0.5, abs=0.1)
    assert not draw(1000, 0.0)[:, 1:].any()


def test_a_generator_repeats_it() -> None:
    pictures = torch.rand(16, 3, 16, 16)
    one, two = (augment(pictures, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert one[0].shape == pictures.shape
    assert one[1].shape == (16, 9)
    assert augment(pictures[:0], 0.5)[0].shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("pictures", "probability", "message"),
    [
        (torch.zeros(2, 3, 7, 16), 0.1, r"images: expected a floating \[B, C, H, W\] with H and W of at least 8, got \[2"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0.1, r"images: expected a floating .* got .* of torch.uint8"),
        (torch.zeros(3, 16, 16), 0.1, r"images: expected a floating \[B, C, H, W\]"),
        (torch.zeros(2, 3, 16, 16), 1.1, r"probability: expected a number in \[0, 1\], got 1.1"),
    ],
)
def test_refusals(pictures, probability, message) -> None:
    with pytest.raises(ValueError, match=message):
        augment(pictures, probability)
