"""All networks: published names, conditioning on both times, precision of the time embedding."""

from __future__ import annotations

import pytest
import torch
from small import spread

from imm.networks import DDPMpp, DiT, UNet


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 131), ("L", 459), ("XL", 677)])
def test_dit_sizes(size, millions) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in DiT(size).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


pytestmark = pytest.mark.usefixtures("size_t")


IMAGES = ("DDPMpp", "DiT", "UNet")


def make(name: str):
    if name == "DDPMpp":
        return DDPMpp(3, 8, num_classes=5, width=8, multipliers=(1, 2), blocks=1, attention=(4,))
    if name == "DiT":
        return DiT("T", patch=4, channels=3, resolution=8, num_classes=5)
    return UNet(channels=3, resolution=8, num_classes=5, width=8, multipliers=(1, 2))


@pytest.mark.parametrize("name", IMAGES)
def test_output_is_nearly_zero_at_first_and_then_depends_on_everything(name) -> None:
    network = make(name).eval().requires_grad_(False)
    x, t, s, labels = torch.randn(2, 3, 8, 8), torch.full((2,), 900.0), torch.full((2,), 300.0), torch.tensor([1, 5])
    first = float(network(x, t, s, labels).abs().max())
    assert 0.0 < first < 1e-3 if name == "DDPMpp" else first == 0.0  # which has the release's small gain there
    base = spread(network)(x, t, s, labels)
    assert base.shape == x.shape
    for changed in ((x + 0.1, t, s, labels), (x, t - 50, s, labels), (x, t, s - 50, labels), (x, t, s, labels - 1)):
        assert float((network(*changed) - base).abs().max()) > 1e-4
    assert not torch.allclose(network(x, t, s, labels), network(x, s, t, labels))  # the two times are told apart


@pytest.mark.parametrize("width", [4, 12, 20, 28, 36])
def test_any_allowed_width(width) -> None:
    network = UNet(resolution=8, width=width, multipliers=(1, 2))
    t = torch.tensor([500.0])
    assert network(torch.randn(1, 1, 8, 8), t, t, torch.tensor([0])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("name", IMAGES)
def test_wrong_images_are_refused(name) -> None:
    t = torch.tensor([500.0])
    for shape in ((1, 1, 8, 8), (1, 3, 8, 4), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"x: expected \[B, 3, 8, 8\], got"):
            make(name)(torch.randn(shape), t, t, torch.tensor([0]))


def test_demo_unet_is_small() -> None:
    assert sum(p.numel() for p in UNet().parameters()) == pytest.approx(150_000, rel=0.15)


@pytest.mark.parametrize(
    ("make_it", "text"),
    [
        (lambda: DiT("M"), r"unknown DiT size 'M'; expected one of"),
        (lambda: DiT("S", patch=3), "patch: expected a divisor of resolution = 32, got 3"),
        (lambda: UNet(resolution=10), "resolution: expected a multiple of 4 for 3 levels, got 10"),
        (lambda: UNet(width=6), "width: expected a positive multiple of 4, got 6"),
        (lambda: UNet(width=0), "width: expected a positive multiple of 4, got 0"),
        (lambda: DDPMpp(resolution=18), "resolution: expected a multiple of 4 for 3 levels, got 18"),
        (lambda: DDPMpp(width=6), "width: expected a positive multiple of 4, got 6"),
        (lambda: DDPMpp(width=100), "expected channels that 32 groups divide, got 200 in one layer"),
        (lambda: DDPMpp(blocks=0), r"multipliers and blocks: expected numbers >= 1, got \[2, 2, 2\] and 0"),
        (
            lambda: DDPMpp(resolution=64, attention=(4,)),
            r"attention: expected sides of levels, out of \[64, 32, 16\], got \[4\]",
        ),
        (lambda: DDPMpp(augment_dim=-1), "num_classes and augment_dim: expected numbers >= 0, got 0 and -1"),
    ],
)
def test_bad_settings_are_refused(make_it, text) -> None:
    with pytest.raises(ValueError, match=text):
        make_it()
