"""Conversions that fail, are killed or run out of disk: how far they came, and the same command resumes."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused, said
from fuzz_pictures import saved
from PIL import Image
from test_data_layouts import write_folder

from imm import pictures
from imm.data import load, parts
from imm.data.convert import write, write_latents
from imm.data.sources import open_source

COUNT = 12
KINDS = ["out.zip", "out", "out.npz"]


@pytest.fixture
def source(tmp_path) -> Path:
    """Pictures in two classes; number 7 can be broken and mended."""
    return write_folder(tmp_path / "set", ((f"{'ab'[number % 2]}/{number:02d}.png", png(number)) for number in range(COUNT)))


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), "PNG")


def content(path: Path) -> list[tuple[str, bytes]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [(file.name, file.read_bytes()) for file in files]


def hidden(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.glob(".*"))


def whole(source: Path, dest: str, *options: str) -> list[tuple[str, bytes]]:
    """What a run that nothing stops writes."""
    path = source.parent / "whole" / dest
    path.parent.mkdir(exist_ok=True)
    call("data", "convert", "--data", source, "--out", path, *options)
    return content(path)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the pictures that are read from now on."""
    names: list[str] = []
    plain = pictures.read_picture

    def note(content: bytes, name: str) -> pictures.Decoded:
        names.append(Path(name).name)
        return plain(content, name)

    monkeypatch.setattr("imm.data.sources.read_picture", note)
    return names


@pytest.mark.parametrize("dest", KINDS)
def test_a_broken_picture(dest, source, read, tmp_path) -> None:
    expected = whole(source, dest)
    path = tmp_path / dest
    convert = ("data", "convert", "--data", source, "--out", path)
    broken = source / "b" / "07.png"
    broken.write_bytes(b"broken")
    line = refused(*convert)
    assert line.startswith("Error: data: expected an image, got ")
    assert line.endswith("b/07.png: no BMP, JPEG, PNG or WebP file; 9 of 12 images are done and kept; the same command resumes")
    assert not path.exists()
    assert hidden(path) == [f".{dest}.part.jsonl", f".{dest}.part.zip"]
    broken.write_bytes(png(7))
    read.clear()
    assert "resuming after 9 of 12 images that are done" in said(*convert)
    assert read == ["07.png", "09.png", "11.png"]
    assert content(path) == expected
    assert hidden(path) == []


@pytest.mark.parametrize("dest", KINDS)
def test_a_broken_picture_is_left_out_or_taken_away(dest, source, read, tmp_path) -> None:
    convert = ("data", "convert", "--data", source, "--out")
    (source / "b" / "07.png").write_bytes(b"broken")
    (source / "a" / "02.png").write_bytes(b"")
    for name in ("left", "gone"):
        (tmp_path / name).mkdir()
        refused(*convert, tmp_path / name / dest)
    output = said(*convert, tmp_path / "left" / dest, "--skip-broken")
    listed = tmp_path / "left" / f"{dest}.left-out.txt"
    assert f"left out: 2 pictures that cannot be read, listed in {listed}\n" in output
    assert all(name in line for name, line in zip(("a/02.png", "b/07.png"), listed.read_text().splitlines(), strict=True))
    (source / "b" / "07.png").unlink()
    (source / "a" / "02.png").unlink()
    call(*convert, tmp_path / "gone" / dest)
    assert content(tmp_path / "left" / dest) == content(tmp_path / "gone" / dest) == whole(source, dest)
    assert load(str(tmp_path / "left" / dest)).labels.tolist() == [0] * 5 + [1] * 5


def stopped_after(count: int, monkeypatch, error: Exception | signal.Signals) -> None:
    """Make the conversion fail, or get a signal, before the picture of that number is kept."""
    append = parts.Parts.append

    def fail(self, number, *rest) -> None:
        if len(self.kept) == count:
            if isinstance(error, Exception):
                raise error
            os.kill(os.getpid(), error)
        append(self, number, *rest)

    monkeypatch.setattr(parts.Parts, "append", fail)


@pytest.mark.parametrize("dest", KINDS)
def test_a_full_disk_and_signals(dest, source, tmp_path) -> None:
    expected = whole(source, dest)
    convert = ("data", "convert", "--data", source, "--out", tmp_path / dest)
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(4, patch, OSError(errno.ENOSPC, "No space left on device"))
        line = refused(*convert)
        assert "out: cannot write" in line
        assert "No space left on device; 4 of 12 images are done and kept; the same command resumes" in line
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.getsignal(number)
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(6, patch, number)
            result = call(*convert, ok=False)
        assert "stopped; 6 of 12 images are done and kept" in result.output
        assert result.exit_code == 1
        assert signal.getsignal(number) is before
    assert "resuming after 6 of 12" in said(*convert)
    assert content(tmp_path / dest) == expected


@pytest.mark.parametrize("dest", KINDS)
def test_a_file_that_cannot_grow(dest, source, tmp_path) -> None:
    """As on a full disk, from the system itself."""
    expected = whole(source, dest)
    convert = ("data", "convert", "--data", source, "--out", tmp_path / dest)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, kept in ((900, False), (1400, True), (2500, True)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            line = refused(*convert)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "out: cannot write" in line
        assert "File too large" in line
        assert ("of 12 images are done and kept" in line) is kept
    call(*convert)
    assert content(tmp_path / dest) == expected
    assert hidden(tmp_path / dest) == []


@pytest.mark.parametrize("dest", KINDS)
def test_any_part_of_what_was_kept_is_gone_on_from(dest, source, tmp_path, monkeypatch) -> None:
    """Cut, or with bytes changed, at many places: what is not whole is made again."""
    expected = whole(source, dest)
    path = tmp_path / dest
    part, journal = tmp_path / f".{dest}.part.zip", tmp_path / f".{dest}.part.jsonl"
    with open_source(str(source)) as opened:
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(8, patch, ValueError("enough"))
            with pytest.raises(ValueError, match="enough; 8 of 12"):
                write(opened, str(path))
        kept = part.read_bytes(), journal.read_bytes()
        random = np.random.default_rng(0)
        for _ in range(25):
            one, other = (bytearray(file) for file in kept)
            for file in (one, other):
                match int(random.integers(4)):
                    case 0:
                        del file[int(random.integers(len(file) + 1)) :]
                    case 1:
                        file[int(random.integers(len(file)))] ^= 1 + int(random.integers(255))
                    case 2:
                        file.extend(random.bytes(100))
            part.write_bytes(one)
            journal.write_bytes(other)
            write(opened, str(path))
            assert content(path) == expected
            assert hidden(path) == []
            if path.is_dir():
                shutil.rmtree(path)


def test_another_request_or_source_begins_anew(source, read, tmp_path) -> None:
    path = tmp_path / "out.zip"
    convert = ("data", "convert", "--data", source, "--out", path)
    broken = source / "b" / "07.png"
    broken.write_bytes(b"broken")
    refused(*convert)
    line = refused(*convert, "--resolution", "4")
    assert "going on" not in line
    refused(*convert, "--resolution", "4")
    (source / "a" / "04.png").write_bytes(png(99))  # the third
    assert "2 of 12" not in line
    broken.write_bytes(png(7))
    read.clear()
    assert "resuming after 2 of 12" in said(*convert, "--resolution", "4")
    assert content(path) == whole(source, "out.zip", "--resolution", "4")


def test_a_mixture_goes_on_with_channels(source, read, tmp_path) -> None:
    """Where what was done has as many; and not the other way, for what was made grey or coloured would be taken unasked."""
    path = tmp_path / "out.zip"
    convert = ("data", "convert", "--data", source, "--out", path)
    (source / "b" / "07.png").write_bytes(saved(Image.new("L", (8, 8), 90), "PNG"))
    assert "--channels=3 or --channels=1 to make them so, got a mixture at b/07.png; 9 of 12" in refused(*convert)
    read.clear()
    assert "resuming after 9 of 12" in said(*convert, "--channels", 3)
    assert read == ["07.png", "09.png", "11.png"]
    assert content(path) == whole(source, "out.zip", "--channels", "3")
    refused(*convert)
    assert "going on" not in said(*convert, "--channels", 1)
    assert content(path) == whole(source, "out.zip", "--channels", "1")
    with open_source(str(source)) as opened, pytest.MonkeyPatch.context() as patch:
        stopped_after(11, patch, ValueError("enough"))
        with pytest.raises(ValueError, match="enough; 11 of 12"):
            write(opened, str(path), channels=3)
    assert "got a mixture at b/07.png; 9 of 12" in refused(*convert)


def test_what_an_earlier_version_left_is_replaced(source, tmp_path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "junk.png").write_bytes(b"")
    call("data", "convert", "--data", source, "--out", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000", "dataset.json"]


def test_a_failure_leaves_what_was_there(source, tmp_path) -> None:
    target = tmp_path / "out.zip"
    target.write_bytes(b"something older")
    (source / "a" / "00.png").write_bytes(b"broken")
    assert "expected an image" in refused("data", "convert", "--data", source, "--out", target)
    assert target.read_bytes() == b"something older"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.zip", "set"]  # nothing was done


def test_two_at_once_are_refused(source, tmp_path) -> None:
    with open_source(str(source)) as opened:
        numbers = list(range(COUNT))
        with parts.open_parts(tmp_path / "a.zip", {}, opened, numbers, skip_broken=False):
            line = refused("data", "convert", "--data", source, "--out", tmp_path / "a.zip")
    assert "expected a place that no other run writes to" in line


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_real_kill(number, source, tmp_path) -> None:
    expected = whole(source, "out.zip")
    path = tmp_path / "out.zip"
    slow = (
        "import sys, time; from imm.data import sources; from imm.cli import main; plain = sources.read_picture\n"
        "def read(*a):\n time.sleep(0.2); return plain(*a)\n"
        "sources.read_picture = read; main(sys.argv[1:])"
    )
    options = ["data", "convert", f"--data={source}", f"--out={path}"]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    journal = tmp_path / ".out.zip.part.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if number == signal.SIGTERM:
        assert "of 12 images are done and kept; the same command resumes" in errors
    assert not path.exists()
    assert "resuming after " in said(*options)
    assert content(path) == expected


def test_latents_go_on_by_whole_batches(source, tmp_path, monkeypatch) -> None:
    calls: list[int] = []

    def encode(images, vae, batch):
        calls.append(len(images))
        return images[:, :, ::4, ::4] + images.mean(), images[:, :, ::4, ::4].abs()  # the others count, as with real ones

    monkeypatch.setattr("imm.data.convert.encode_latents", encode)
    monkeypatch.setattr("imm.data.convert.fingerprint", lambda vae: vae)
    with open_source(str(source)) as opened:
        write_latents(opened, str(tmp_path / "whole.npz"), "one", batch=4)
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(7, patch, ValueError("enough"))
            with pytest.raises(ValueError, match="enough; 7 of 12 images are done"):
                write_latents(opened, str(tmp_path / "a.npz"), "one", batch=4)
        said: list[str] = []
        calls.clear()
        write_latents(opened, str(tmp_path / "a.npz"), "one", batch=4, say=said.append)
    assert (calls, said) == ([4, 4], ["resuming after 4 of 12 images that are done"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    found = load(str(tmp_path / "a.npz"), latents=True)
    assert (found.class_names, found.num_classes) == (("a", "b"), 2)
    assert found.pixels.dtype == torch.float16
