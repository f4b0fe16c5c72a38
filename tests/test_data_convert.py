"""Digest, numbers, crops and conversion of data sets, and the commands for them."""

from __future__ import annotations

import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch
from command_line import call, refused, said
from PIL import Image

from imm.data import ImageData, digest, load, summarize, to_float
from imm.data.convert import spread
from imm.pictures import fit

RANDOM = np.random.default_rng(0)


@pytest.fixture
def images() -> np.ndarray:
    return RANDOM.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def npz(images, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, images=images, labels=np.array([4, 0, 2, 2, 0, 1]))
    return path


# ---- the digest and the numbers


def test_the_digest_is_what_its_description_says(images) -> None:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    planes = images.transpose(0, 3, 1, 2).copy().tobytes()
    labels = torch.arange(6)
    head = b"imm-data 1 uint8 6 3 8 8\n" + planes
    with_labels = hashlib.sha256(head + b"labels\n" + np.arange(6, dtype="<i8").tobytes()).hexdigest()
    assert digest(pixels, labels) == with_labels
    assert digest(pixels.contiguous().numpy(), labels.int().numpy()) == with_labels
    assert digest(ImageData(pixels, labels, 6, "anywhere")) == with_labels
    assert digest(pixels) == hashlib.sha256(head + b"no labels\n").hexdigest()


def test_the_digest_tells_changes_apart(images) -> None:
    pixels, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.arange(6)
    other = pixels.clone()
    other[5, 2, 7, 7] ^= 1
    sets = [(pixels, labels), (pixels, None), (pixels, labels.flip(0)), (pixels.flip(0), labels), (other, labels)]
    sets += [(pixels.float(), labels), (pixels.reshape(6, 3, 4, 16), labels)]
    assert len({digest(*arguments) for arguments in sets}) == len(sets)
    for dtype in (torch.bfloat16, torch.float64):
        assert digest(pixels.to(dtype)) != digest(pixels.float())


def test_what_the_digest_refuses(images) -> None:
    pixels = torch.from_numpy(images)
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\] .*, got \[6, 8, 8, 3\] of torch.uint8"):
        digest(pixels)
    with pytest.raises(ValueError, match=r"of torch\.int64"):
        digest(pixels.long())
    pixels = pixels.permute(0, 3, 1, 2)
    for labels in (torch.arange(5), torch.zeros(6)):
        with pytest.raises(ValueError, match=r"labels: expected \[6\] integers"):
            digest(pixels, labels)
    with pytest.raises(ValueError, match="beside an ImageData"):
        digest(ImageData(pixels, None, 0, ""), torch.arange(6))


def test_the_numbers(images) -> None:
    images[0, 0, 0] = 0
    data = ImageData(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([3, 0, 0, 1, 0, 3]), 4, "somewhere")
    found = summarize(data)
    assert json.loads(json.dumps(found)) == found
    assert (found["count"], found["shape"], found["classes"], found["per_class"]) == (6, [3, 8, 8], 4, [3, 1, 0, 2])
    np.testing.assert_allclose(found["mean"], images.mean((0, 1, 2)), rtol=1e-14)
    np.testing.assert_allclose(found["std"], images.std((0, 1, 2)), rtol=1e-14)
    assert (found["min"], found["max"], found["sha256"]) == (0, images.max(), digest(data))
    with pytest.raises(ValueError, match=r"expected uint8 images, got 6 of torch.float32"):
        summarize(ImageData(data.images, None, 0, ""))


def test_bytes_become_floats_when_asked() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels).dtype == torch.float32
    torch.testing.assert_close(to_float(levels), levels.double().div(127.5).sub(1).float())
    latents = torch.randn(4)
    assert to_float(latents) is latents


# ---- crops


def test_centre_crop() -> None:
    picture = RANDOM.integers(0, 256, (7, 12, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(picture, None, "center-crop"), picture[:, 2:9])
    np.testing.assert_array_equal(fit(picture.transpose(1, 0, 2), 7, "center-crop"), picture.transpose(1, 0, 2)[2:9])
    assert fit(picture, 4, "center-crop").shape == (4, 4, 3)
    with pytest.raises(ValueError, match="expected square images or a resolution, got 12x7"):
        fit(picture, None)
    with pytest.raises(ValueError, match=r"expected one of none, center-crop, .*, got 'flip'"):
        fit(picture, 4, "flip")


def test_the_adm_crop() -> None:
    picture = RANDOM.integers(0, 256, (16, 24, 1), dtype=np.uint8)
    across = (picture.reshape(16, 12, 2).sum(2) + 1) // 2  # pillow rounds after each direction
    halved = (across.reshape(8, 2, 12).sum(1) + 1) // 2
    out = fit(picture, 8, "center-crop-dhariwal")  # halved once, then as it is
    assert out.shape == (8, 8, 1)
    np.testing.assert_array_equal(out[:, :, 0], halved[:, 2:10])
    smaller = fit(picture, 5, "center-crop-dhariwal")  # not halved twice: 8 < 2 * 5; 12x8 -> 8x5 by bicubic
    image = Image.fromarray(halved.astype(np.uint8)).resize((8, 5), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(smaller[:, :, 0], np.asarray(image)[:, 1:6])
    assert fit(picture, 20, "center-crop-dhariwal").shape == (20, 20, 1)
    ramp = np.broadcast_to(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], (16, 16, 3))
    assert fit(ramp, 16, "center-crop-dhariwal").tolist() == ramp.tolist()
    with pytest.raises(ValueError, match="expected a resolution for center-crop-dhariwal"):
        fit(picture, None, "center-crop-dhariwal")


# ---- conversion


@pytest.mark.parametrize("dest", ["out.zip", "out", "out.npz"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_conversion_changes_nothing(dest, labelled, channels, images, tmp_path) -> None:
    source, target = tmp_path / "source.npz", tmp_path / dest
    np.savez(source, images=images[..., :channels], **({"labels": np.array([4, 0, 2, 2, 0, 1])} if labelled else {}))
    assert f"wrote {target}" in said("data", "convert", "--data", source, "--out", target)
    before, after = load(str(source)), load(str(target))
    assert torch.equal(before.pixels, after.pixels)
    assert digest(before) == digest(after)
    assert before.num_classes == after.num_classes == (5 if labelled else 0)
    assert [p.name for p in tmp_path.glob(".*")] == []  # no part is left


def test_the_zip_is_the_one_that_others_read(npz, tmp_path) -> None:
    for name in ("a.zip", "b.zip"):
        call("data", "convert", "--data", npz, "--out", tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = [f"00000/img{number:08d}.png" for number in range(6)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        table = json.loads(archive.read("dataset.json"))
        assert Image.open(archive.open(names[0])).mode == "RGB"
    assert table == {"labels": [[name, label] for name, label in zip(names, [4, 0, 2, 2, 0, 1], strict=True)]}


def test_npz_bytes_do_not_depend_on_the_way(npz, tmp_path) -> None:
    call("data", "convert", "--data", npz, "--out", tmp_path / "a.zip")
    call("data", "convert", "--data", tmp_path / "a.zip", "--out", tmp_path / "a.npz")
    call("data", "convert", "--data", npz, "--out", tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert (file["images"].shape, file["images"].dtype, file["labels"].dtype) == ((6, 8, 8, 3), np.uint8, np.int64)


def test_resolution_and_number_of_images(npz, tmp_path) -> None:
    call("data", "convert", "--data", npz, "--out", tmp_path / "a.zip", "--resolution", 4, "--max-images", 3)
    data = load(str(tmp_path / "a.zip"))
    assert torch.equal(data.pixels, load(str(npz), 4).pixels[::2])
    assert data.labels.tolist() == [4, 2, 0]
    assert spread(10, None) == spread(10, 99) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]


def test_pictures_of_many_sizes_are_cropped_to_one(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(20, 16), (9, 30), (40, 40)]):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / "in" / f"{number}.png")
    base = ("data", "convert", "--data", tmp_path / "in", "--out", tmp_path / "out.zip")
    assert "expected square images or a resolution, got 20x16" in refused(*base)
    for transform in ("none", "center-crop", "center-crop-dhariwal"):
        call(*base, "--resolution", 8, "--transform", transform)
        data = load(str(tmp_path / "out.zip"))
        assert data.shape == (3, 8, 8)
        assert data.pixels[:, 0].flatten(1).unique(dim=1).flatten().tolist() == [0, 1, 2]


def test_refusals(npz, tmp_path) -> None:
    convert = ("data", "convert", "--data", npz, "--out")
    assert "another place than the source" in refused(*convert, npz)
    assert "a folder without an ending" in refused(*convert, tmp_path / "a.tar.gz")
    assert "expected a new or an empty folder" in refused(*convert, tmp_path)
    assert "expected a folder that can be written to" in refused(*convert, tmp_path / "no" / "a.zip")
    (tmp_path / "folder.zip").mkdir()
    assert "expected a file, got the folder" in refused(*convert, tmp_path / "folder.zip")
    crop = (*convert, tmp_path / "a.zip", "--transform", "center-crop-dhariwal")
    assert "expected a resolution for center-crop-dhariwal" in refused(*crop)
    assert "which has no splits, got test" in refused(*convert, tmp_path / "a.zip", "--split", "test")
    assert "expected 'mnist5k', a folder" in refused("data", "stats", "--data", "nowhere")
    assert "expected a file in a folder" in refused("data", "stats", "--data", npz, "--out", tmp_path / "no" / "a.json")
    assert not (tmp_path / "a.zip").exists()


def test_stats(npz, images, tmp_path) -> None:
    output = said("data", "stats", "--data", npz, "--out", tmp_path / "stats.json")
    assert "images: 6 of 8x8, 3 channels" in output
    assert "classes: 5, images of each: [2, 1, 2, 0, 1]" in output
    assert f"mean: {' '.join(f'{mean:.5f}' for mean in images.mean((0, 1, 2)))}" in output
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found == summarize(load(str(npz)))
    assert f"sha256: {found['sha256']}" in output
    assert "images: 6 of 4x4" in said("data", "stats", "--data", npz, "--resolution", 4)


def test_the_digits_convert_as_they_train(tmp_path) -> None:
    call("data", "convert", "--data", "mnist5k", "--out", tmp_path / "a.zip", "--max-images", 50)
    assert torch.equal(load(str(tmp_path / "a.zip")).pixels, load("mnist5k").pixels[::100])
