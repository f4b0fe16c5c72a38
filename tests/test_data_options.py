"""--channels, --transform, --skip-broken and --class by name, wherever pictures are read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused, said
from fuzz_pictures import saved
from PIL import Image
from test_data_layouts import write_folder

from imm import checkpoints
from imm.data import load
from imm.evaluation.sets import load_set
from imm.training.state import SETTINGS_FILE, states_in

RANDOM = np.random.default_rng(0)
TRAIN = ("--steps", 1, "--batch", 4, "--width", 8)


def colour(size=(8, 8)) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def folder(path: Path, **files: bytes) -> Path:
    return write_folder(path, ((name.replace("__", "/").replace("_", "."), content) for name, content in files.items()))


def png(image: Image.Image, **options) -> bytes:
    return saved(image, "PNG", **options)


# ---- channels

GREY = colour().convert("L")
KINDS_OF_GREY = {
    "b_png": png(GREY.convert("LA")),
    "c_png": png(GREY.convert("P")),
    "d_webp": saved(GREY, "WEBP", lossless=True),
    "e_jpg": saved(GREY, "JPEG", quality=95),
    "f_bmp": saved(GREY, "BMP"),
}


@pytest.mark.parametrize("first", [{"a_png": png(GREY)}, {}])
def test_a_set_is_grey_where_every_picture_is(first, tmp_path) -> None:
    path = str(folder(tmp_path, **first, **KINDS_OF_GREY))
    one, three = load(path), load(path, channels=3)
    assert one.shape == (1, 8, 8)
    assert torch.equal(three.pixels, one.pixels.expand(-1, 3, -1, -1))
    assert torch.equal(load(path, channels=1).pixels, one.pixels)
    exact = [image for image, name in zip(one.pixels, [*first, *KINDS_OF_GREY], strict=True) if not name.endswith("jpg")]
    assert all(torch.equal(image[0], torch.from_numpy(np.array(GREY))) for image in exact)


@pytest.mark.parametrize("kind", ["c_png", "d_webp"])
def test_pictures_that_have_no_grey_mode_fit_beside_colour(kind, tmp_path) -> None:
    content = KINDS_OF_GREY[kind]
    path = str(folder(tmp_path, **{kind: content, "e_png": png(colour())}))
    assert load(path).shape == (3, 8, 8)
    assert load(str(folder(tmp_path / "alone", **{kind: content}))).shape == (1, 8, 8)


def test_a_mixture_is_refused_with_the_option(tmp_path) -> None:
    path = folder(tmp_path / "set", a_jpg=saved(colour(), "JPEG"), b_jpg=saved(GREY, "JPEG"), c_png=png(colour()))
    for command in (
        ("data", "stats", "--data", path),
        ("data", "convert", "--data", path, "--out", tmp_path / "a.zip"),
        ("train", "--data", path, "--out", tmp_path / "run", *TRAIN),
    ):
        line = refused(*command)
        assert "--channels=3 or --channels=1" in line
        assert "got a mixture at b.jpg" in line
    call("data", "convert", "--data", path, "--out", tmp_path / "a.zip", "--channels", 3)
    found = load(str(tmp_path / "a.zip"))
    assert found.shape == (3, 8, 8)
    assert torch.equal(found.pixels[1, 0], found.pixels[1, 2])
    assert "images: 3 of 8x8, 1 channel\n" in said("data", "stats", "--data", path, "--channels", 1)
    call("train", "--data", path, "--out", tmp_path / "run", *TRAIN, "--channels", 1)
    with pytest.raises(ValueError, match="channels: expected 1, 3 or none, got 2"):
        load(str(path), channels=2)


def test_channels_of_arrays(tmp_path) -> None:
    images = RANDOM.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    luma = load(str(tmp_path / "a.npz"), channels=1).pixels[:, 0].numpy()
    np.testing.assert_array_equal(luma, np.stack([np.array(Image.fromarray(image).convert("L")) for image in images]))
    assert load_set(str(tmp_path / "a.npz"), channels=1).resize == "to 1 channel"


# ---- what is said


def test_alpha_frames_and_squeezing_are_said(tmp_path) -> None:
    wide = colour((16, 8))
    path = folder(
        tmp_path / "set",
        a_png=png(wide.convert("RGBA")),
        b_png=png(wide, save_all=True, append_images=[colour((16, 8)), colour((16, 8))]),
        c_png=png(colour()),
    )
    output = said("data", "stats", "--data", path, "--resolution", 8)
    squeezed = "not square, squeezed (--transform=center-crop keeps proportions): 2, such as a.png (16x8)"
    assert f"note: pictures that are {squeezed}" in output
    assert "note: pictures with alpha, which is left out: 1, such as a.png" in output
    assert "note: animated pictures, of which the first frame is taken: 1, such as b.png" in output
    for command in (
        ("data", "convert", "--data", path, "--resolution", 8, "--out", tmp_path / "a.zip"),
        ("train", "--data", path, "--resolution", 8, "--out", tmp_path / "run", *TRAIN),
        ("eval", "--data", path, "--ref", path, "--resolution", 8, "--metrics", "mmd-pixels", "--out", tmp_path / "a.json"),
    ):
        output = said(*command)
        assert output.count("squeezed") == 1
        assert output.count("with alpha") == 1
        assert "squeezed" not in said(*command, "--transform", "center-crop") if command[0] != "train" else True
    assert load(str(path), 8, transform="center-crop").pixels[0].permute(1, 2, 0).tolist() == np.array(wide)[:, 4:12].tolist()
    assert json.loads((tmp_path / "a.json").read_text())["protocol"]["reference"]["resize"].startswith("center-crop, bilinear")


# ---- skip-broken


def test_broken_pictures_are_left_out_and_listed(tmp_path) -> None:
    path = tmp_path / "set"
    for number in range(8):
        folder(path, **{f"{'ab'[number % 2]}__{number}_png": png(colour())})
    (path / "a" / "2.png").write_bytes(b"broken")
    (path / "b" / "5.png").write_bytes((path / "b" / "5.png").read_bytes()[:60])
    for command, listed in (
        (("data", "stats", "--data", path, "--out", tmp_path / "stats.json"), tmp_path / "stats.json.left-out.txt"),
        (("train", "--data", path, "--out", tmp_path / "run", *TRAIN), tmp_path / "run" / "data.left-out.txt"),
        (
            ("eval", "--data", path, "--ref", path, "--metrics", "mmd-pixels", "--out", tmp_path / "e.json"),
            tmp_path / "e.json.left-out.txt",
        ),
    ):
        assert "a/2.png: no BMP, JPEG, PNG or WebP file" in refused(*command)
        output = said(*command, "--skip-broken")
        count = 4 if command[0] == "eval" else 2
        assert f"left out: {count} pictures that cannot be read, listed in {listed}\n" in output
        assert [name in listed.read_text() for name in ("a/2.png: ", "b/5.png: ", "a/0.png")] == [True, True, False]
    found = load(str(path), skip_broken=True)
    assert (len(found), found.labels.tolist(), found.class_names) == (6, [0, 0, 0, 1, 1, 1], ("a", "b"))
    assert found.source.endswith("set without 2 broken ones")
    for file in path.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected images that are whole, got none in 8; .*an empty file"):
        load(str(path), skip_broken=True)


# ---- class names


def test_class_names_reach_the_checkpoint_and_imm_sample(tmp_path) -> None:
    path = tmp_path / "set"
    for number in range(8):
        folder(path, **{f"{('cat', 'dog', '1', 'crane')[number % 4]}__{number}_png": png(colour())})
    run = tmp_path / "run"
    output = said("train", "--data", path, "--out", run, *TRAIN)
    assert "4 classes (0 1, 1 cat, 2 crane, 3 dog)" in output
    net = run / "snapshot-0000001.safetensors"
    assert checkpoints.format.read_settings(net, "flow_map")["extra"]["data"]["class_names"] == ["1", "cat", "crane", "dog"]
    sample = ("sample", "--net", net, "--seeds", "0-1")
    assert "class: 3, called dog" in said(*sample, "--out", tmp_path / "name", "--class", "dog")
    call(*sample, "--out", tmp_path / "number", "--class", "3")
    assert (tmp_path / "name" / "000001.png").read_bytes() == (tmp_path / "number" / "000001.png").read_bytes()
    assert json.loads((tmp_path / "name" / "generation.json").read_text())["labels"] == "3"
    assert "class: 1, called cat" in said(*sample, "--out", tmp_path / "one", "--class", "1")  # a number is a number
    line = refused(*sample, "--out", tmp_path / "no", "--class", "Dgo")
    assert "class: expected a number or a name of" in line
    assert "such as dog, ..., got 'Dgo'" in line
    assert not (tmp_path / "no").exists()

    # A state from before there were names is gone on from, and so is one whose folders were renamed in the same order.
    path_of_settings = states_in(run)[0] / SETTINGS_FILE
    settings = json.loads(path_of_settings.read_text())
    del settings["settings"]["data"]["class_names"]
    path_of_settings.write_text(json.dumps(settings))
    (path / "dog").rename(path / "fox")
    two = ("--steps", 2, *TRAIN[2:])
    assert "resuming at step 1" in said("train", "--data", path, "--out", run, *two)
    assert "called fox" in said(
        "sample", "--net", run / "snapshot-0000002.safetensors", "--seeds", 0, "--out", tmp_path / "f", "--class", "fox"
    )


def test_names_that_are_no_utf8_are_kept_and_escaped(tmp_path) -> None:
    odd = os.fsdecode(b"\xff\xfe")
    path = folder(tmp_path / "set", a__1_png=png(colour()), **{f"{odd}__1_png": png(colour()), f"{odd}__{odd}_png": b""})
    escaped = r"\udcff\udcfe"
    output = said("data", "stats", "--data", path, "--skip-broken", "--out", tmp_path / "a.json")
    assert f"class names: 0 a, 1 {escaped}\n" in output
    assert f"{escaped}/{escaped}.png: an empty file" in output
    assert f"{escaped}/{escaped}.png: an empty file" in (tmp_path / "a.json.left-out.txt").read_text()
    for dest in ("a.npz", "a.zip"):
        call("data", "convert", "--data", path, "--skip-broken", "--out", tmp_path / dest)
        assert load(str(tmp_path / dest)).class_names == ("a", odd)
    assert f"2 classes (0 a, 1 {escaped})" in said("train", "--data", path, "--skip-broken", "--out", tmp_path / "run", *TRAIN)
    net = tmp_path / "run" / "snapshot-0000001.safetensors"
    assert f"called {escaped}" in said("sample", "--net", net, "--class", 1, "--seeds", 0, "--out", tmp_path / "out")


def test_names_that_no_checkpoint_has_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "a.npz", images=RANDOM.integers(0, 256, (4, 8, 8), dtype=np.uint8), labels=np.arange(4) % 2)
    call("train", "--data", tmp_path / "a.npz", "--out", tmp_path / "run", *TRAIN)
    net = tmp_path / "run" / "snapshot-0000001.safetensors"
    line = refused("sample", "--net", net, "--out", tmp_path / "o", "--class", "dog")
    assert f"class: expected a number, for {net} keeps no class names, got 'dog'" in line
    extra = {"data": {"class_names": ["crane", "crane"]}}
    checkpoints.save(net, checkpoints.load(net), extra=extra)
    line = refused("sample", "--net", net, "--out", tmp_path / "o", "--class", "crane")
    assert "expected a name that one class has, got 'crane', the name of [0, 1]" in line
