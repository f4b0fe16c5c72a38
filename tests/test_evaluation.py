"""The pixel scores tell real images from blurs, noise and wrong labels."""

from __future__ import annotations

import pytest
import torch

from imm.data import mnist_5k
from imm.evaluation import PixelReference, picture_set
from imm.pictures import grid, to_uint8


@pytest.fixture(scope="module")
def halves():
    data = mnist_5k(16)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(1))
    first, second = order[:3000], order[3000:4000]
    reference = PixelReference(data.images[first], data.labels[first], 10)
    return reference, data.images[second], data.labels[second]


def test_real_images_pass(halves) -> None:
    reference, images, labels = halves
    scores = reference.score(images, labels)
    assert scores.label_match > 0.93
    assert scores.spread == pytest.approx(1.0, abs=0.05)
    assert abs(scores.mmd) < 0.002
    real = reference.score_real()
    assert real.label_match == pytest.approx(0.95, abs=0.02)
    assert abs(real.mmd) < 0.002


def test_blurs_have_no_spread_and_a_large_mmd(halves) -> None:
    blur = halves[0].score_class_means()
    assert blur.label_match > 0.9
    assert blur.spread < 1e-3
    assert blur.mmd > 0.05


def test_noise_and_wrong_labels_fail(halves) -> None:
    reference, images, labels = halves
    assert reference.score(images, (labels + 1) % 10).label_match < 0.05
    noise = reference.score(torch.randn_like(images), labels)
    assert noise.label_match < 0.3
    assert noise.mmd > 0.2


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="as many labels as images"):
        PixelReference(torch.zeros(3, 4), torch.zeros(2).long(), 1)


def test_pictures() -> None:
    values = to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]))
    assert values.tolist() == [0, 0, 128, 255, 255]
    decoded = to_uint8(torch.tensor([-1.5, -1.0, -1 / 255, 0.0, 1 / 255, 0.99, 1.0, 1.5]), decoded=True)
    assert decoded.tolist() == [0, 0, 127, 127, 128, 253, 255, 255]
    whole = torch.linspace(-1, 1, 4001)
    assert torch.equal(decoded_of := to_uint8(whole, decoded=True), (whole * 127.5 + 127.5).floor().to(torch.uint8))
    assert 0.4 < float((to_uint8(whole) != decoded_of).double().mean()) < 0.6  # what the other rule would change
    for rule, value in ((False, 128), (True, 127)):
        set_ = picture_set(torch.zeros(2, 3, 4, 4), decoded=rule)
        assert int(set_.pixels.max()) == value
        assert ("127.5 x + 127.5" in set_.quantisation) == rule
    stored = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert picture_set(stored, decoded=True).quantisation == picture_set(stored).quantisation
    picture = grid([("one", torch.zeros(3, 1, 8, 8)), ("", torch.ones(2, 3, 8, 8))], cell=16, gap=2)
    margin = picture.shape[1] - (3 * 18 + 2)
    assert picture.shape[0] == 2 * 18 + 2
    assert margin > 10
    assert picture[10, margin + 10].tolist() == [128, 128, 128]
    assert picture[28, margin + 10].tolist() == [255, 255, 255]
