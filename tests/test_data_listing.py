"""What is in a folder, a zip or a tar: nothing is left out without a word, and labels are those that are meant."""

from __future__ import annotations

import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from command_line import call, said
from fuzz_pictures import saved
from PIL import Image
from test_data_layouts import tarred, write_folder, write_zip

from imm import data
from imm.data import load
from imm.data.listing import open_files

PNG = saved(Image.new("RGB", (8, 8), (200, 30, 90)), "PNG")
PETS = [f"{name}/{number}.png" for name in ("cat", "cow", "dog") for number in range(2)]


def folder(path: Path, names) -> Path:
    return write_folder(path, ((name, PNG) for name in names))


def refused(path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(str(path))


# ---- links and permissions


def test_links_to_folders_and_files_are_followed(tmp_path) -> None:
    plain = folder(tmp_path / "plain", PETS)
    links = tmp_path / "links"
    links.mkdir()
    for name in ("cat", "dog"):
        (links / name).symlink_to(plain / name)
    (links / "cow").mkdir()
    for number in range(2):
        (links / "cow" / f"{number}.png").symlink_to(plain / "cow" / f"{number}.png")
    (links / "dog2").symlink_to(plain / "dog")  # a folder twice is no cycle
    found = load(str(links))
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert found.class_names == ("cat", "cow", "dog", "dog2")
    (tmp_path / "all").symlink_to(links)
    assert len(load(str(tmp_path / "all"))) == 8


def test_links_that_lead_back_are_not_followed(tmp_path) -> None:
    path = folder(tmp_path / "set", PETS)
    (path / "cat" / "itself").symlink_to(path / "cat")
    (path / "dog" / "up").symlink_to("..")
    (path / "dog" / "outside").symlink_to("../..")  # leads to the set again
    (path / "cow" / "other").symlink_to(path / "dog")
    found = load(str(path))
    assert found.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert any("not followed: 5 links to a folder around them, such as " in note for note in found.notes)
    assert "note: not followed: 5 links" in said("data", "stats", "--data", path)


@pytest.mark.parametrize("name", ["dog/3.png", "fish", "fish.png"])
def test_broken_links_are_refused_by_name(name, tmp_path) -> None:
    path = folder(tmp_path, PETS)
    (path / name).symlink_to("nowhere")
    refused(path, f"got the broken link .*{name}$")
    (path / name).unlink()
    (path / name).symlink_to(path / name)
    refused(path, f"expected a folder that can be listed, got .*{name}: ")


@pytest.mark.parametrize("closed", ["", "cow", "dog/deep"])
def test_folders_that_cannot_be_listed_are_refused_by_name(closed, monkeypatch, tmp_path) -> None:
    path = folder(tmp_path, [*PETS, "dog/deep/1.png", "@eaDir/x.png"])
    scandir = os.scandir

    def scan(place):
        if Path(place) in (path / closed, path / "@eaDir"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", scan)
    refused(path, f"expected a folder that can be listed, got {path / closed}: Permission denied")


def test_a_pipe_is_refused_by_name(tmp_path) -> None:
    path = folder(tmp_path, PETS)
    os.mkfifo(path / "cat" / "pipe.png")
    refused(path, "expected files and folders, got .*pipe.png, which is neither")


def test_hard_links_in_tars_are_read(tmp_path) -> None:
    path = folder(tmp_path / "set", [".hidden/x.png", *PETS])
    os.link(path / "cat" / "0.png", path / "dog" / "2.png")
    os.link(path / ".hidden" / "x.png", path / "dog" / "3.png")
    assert load(str(path)).labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    for name in ("set.tar", "SET.TAR"):
        assert load(str(tarred(path, name))).labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2]


def test_links_in_archives_are_refused_by_name(tmp_path) -> None:
    path = folder(tmp_path / "set", PETS)
    (path / "dog" / "2.png").symlink_to("1.png")
    refused(tarred(path), r"expected files and folders in .*, got dog/2.png, a link or a device; pack it again")
    with tarfile.open(tmp_path / "hard.tar", "w") as archive:
        info = tarfile.TarInfo("cat/1.png")
        info.type, info.linkname = tarfile.LNKTYPE, "cat/0.png"
        archive.addfile(info)
    refused(tmp_path / "hard.tar", "got cat/1.png, a link or a device")
    link = zipfile.ZipInfo("dog")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    refused(write_zip(tmp_path / "a.zip", [("cat/0.png", PNG), (link, b"cat")]), "got dog, a link or a device")


# ---- what is no picture


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_an_empty_class_folder_is_refused(kind, tmp_path) -> None:
    path = folder(tmp_path / "set", PETS)
    (path / "bird").mkdir()
    if kind == "zip":
        path = write_zip(tmp_path / "a.zip", [("bird/", b""), *((name, PNG) for name in PETS)])
    if kind == "tar":
        path = tarred(path)
    refused(path, r"expected an image \(.*\) in every class folder of .*, got none in bird/$")


def test_other_formats_are_counted_aloud(tmp_path) -> None:
    path = folder(tmp_path / "set", [*PETS, "cat/a.tif", "cat/b.GIF", "dog/c.tif", "dog/Thumbs.db", "dog/@eaDir/1.png"])
    folder(path, ["@eaDir/x.png", "lost+found/y.png", "dog/notes"])
    found = load(str(path))
    assert found.num_classes == 3
    assert found.notes == (
        "files that are not read, as their endings are not .bmp, .jpeg, .jpg, .png, .webp: "
        "2 .tif, 1 .gif, 1 without an ending, such as cat/a.tif",
    )
    assert "2 .tif, 1 .gif" in said("data", "convert", "--data", path, "--out", tmp_path / "a.zip")
    folder(path, ["bird/1.tif", "bird/2.avif"])
    refused(path, r"got none in bird/ but 1 .tif, 1 .avif, such as bird/1.tif")
    refused(folder(tmp_path / "tiffs", ["1.tif", "2.jfif"]), "found none but 1 .tif, 1 .jfif, such as 1.tif")


# ---- depth


def table(names, first: int = 0, **more) -> bytes:
    return json.dumps({"labels": [[name, first + number // 2] for number, name in enumerate(names)], **more}).encode()


def test_a_folder_around_the_set_is_stepped_into(tmp_path) -> None:
    for around in ("pets", "a/b/c"):
        members = [(f"{around}/{name}", PNG) for name in PETS]
        found = load(str(write_zip(tmp_path / "a.zip", members)))
        assert (found.labels.tolist(), found.class_names) == ([0, 0, 1, 1, 2, 2], ("cat", "cow", "dog"))
        listed = [*members, (f"{around}/dataset.json", table(PETS, 1)), ("README.txt", b"")]
        assert load(str(write_zip(tmp_path / "b.zip", listed))).labels.tolist() == [1, 1, 2, 2, 3, 3]
    folder(tmp_path / "in" / "pets", PETS)
    assert load(str(tmp_path / "in")).num_classes == 3
    assert load(str(tarred(tmp_path / "in"))).num_classes == 3
    one = load(str(folder(tmp_path / "one", ["cat/1.png", "cat/2.png"])))  # a class, as ever
    assert (one.labels.tolist(), one.notes) == ([0, 0], ("one class: all images are in the folder cat/",))


def test_labels_that_are_not_at_the_top_are_refused(tmp_path) -> None:
    members = [("dog/0.png", PNG), *((f"cat/{name}", PNG) for name in PETS), ("cat/dataset.json", table(PETS))]
    refused(write_zip(tmp_path / "a.zip", members), "expected dataset.json at the top of .*, got cat/dataset.json")


def test_splits_as_classes_are_said(tmp_path) -> None:
    path = folder(tmp_path / "set", [f"{split}/{name}" for split in ("train", "val") for name in PETS])
    assert "note: the classes are the folders train, val, which are called like splits" in said("data", "stats", "--data", path)
    assert load(str(path / "train")).num_classes == 3
    path = folder(tmp_path / "deep", [f"{name}/sub/{number}.png" for name in ("a", "b") for number in range(2)])
    assert any("hold pictures in sub-folders only" in note for note in load(str(path)).notes)


def test_classes_without_an_image_are_said(tmp_path) -> None:
    members = [*((name, PNG) for name in PETS), ("dataset.json", table(PETS, 1))]
    found = load(str(write_zip(tmp_path / "a.zip", members)))
    assert (found.num_classes, found.notes) == (4, ("classes without an image: 1 of 4 (0)",))


# ---- labels and names


@pytest.mark.parametrize("name", ["labels", "label", "arr_1"])
@pytest.mark.parametrize("images", ["images", "arr_0", "latents"])
def test_labels_by_any_name(images, name, tmp_path) -> None:
    values = np.zeros((3, 8, 8, 3), np.uint8) if images != "latents" else np.zeros((3, 4, 8, 8), np.float16)
    np.savez(tmp_path / "a.npz", **{images: values, name: np.arange(3), "mu": np.zeros(3)})
    found = load(str(tmp_path / "a.npz"), latents=True)
    assert (found.labels.tolist(), found.notes) == ([0, 1, 2], ("arrays that are not read: mu",))


def test_arrays_that_contradict_each_other_are_refused(tmp_path) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(3), arr_1=np.arange(3))
    refused(tmp_path / "a.npz", "expected one array of labels, label, arr_1 in .*, got labels and arr_1")
    np.savez(tmp_path / "a.npz", images=images, arr_0=images)
    refused(tmp_path / "a.npz", "expected one array of images, arr_0 in .*, got images and arr_0")
    for names, text in ((np.arange(3), "as a list of text"), (np.array(["a"]), "a name for each of 3 classes, got 1")):
        np.savez(tmp_path / "a.npz", images=images, labels=np.arange(3), class_names=names)
        refused(tmp_path / "a.npz", text)


@pytest.mark.parametrize("dest", ["out.zip", "out", "out.npz"])
def test_class_names_are_kept(dest, tmp_path) -> None:
    path = folder(tmp_path / "set", PETS)
    assert "class names: 0 cat, 1 cow, 2 dog" in said("data", "stats", "--data", path)
    call("data", "convert", "--data", path, "--out", tmp_path / dest)
    found = load(str(tmp_path / dest))
    assert (found.class_names, found.num_classes) == (("cat", "cow", "dog"), 3)
    assert data.digest(found) == data.digest(load(str(path)))


def test_bad_class_names_are_refused(tmp_path) -> None:
    members = [(name, PNG) for name in PETS]
    for names, text in ((["a", "b"], "a name for each of 3 classes, got 2"), ("abc", "as a list of text"), ([1, 2, 3], "text")):
        refused(write_zip(tmp_path / "a.zip", [*members, ("dataset.json", table(PETS, class_names=names))]), text)


def test_generated_folders_are_listed_alike(monkeypatch, tmp_path) -> None:
    from imm.evaluation.sets import seed_files

    path = folder(tmp_path / "made", ["000000/000001.png", "000000/@eaDir/000002.png", "grid.png", "generation.json"])
    (path / "001000").symlink_to(folder(tmp_path / "elsewhere", ["001001.png"]))
    assert list(seed_files(path)) == [1, 1001]
    (path / "000000" / "000003.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"broken link .*000003\.png"):
        seed_files(path)
    with open_files(tmp_path / "elsewhere") as files:
        assert files.names == ["001001.png"]
