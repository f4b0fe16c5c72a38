"""Sets larger than memory: arrays that are mapped, pictures that are decoded as they are needed, and runs on both."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, refused
from PIL import Image

from imm.data import convert, digest, lazy, load, load_tokens
from imm.data.lazy import LazyPixels
from imm.evaluation.sets import load_set

OPTIONS = ["--steps=3", "--batch=4", "--width=8", "--tick=1", "--grid=none", "--device=cpu"]
RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(12):
        path = tmp_path / "pictures" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def large(monkeypatch) -> None:
    """Every set is a large one."""
    monkeypatch.setattr(lazy, "LARGE", 0)


def is_mapped(values: torch.Tensor) -> bool:
    """Whether a tensor lies in a file's pages."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    inside = [line for line in lines if int(line[0].split("-")[0], 16) <= values.data_ptr() < int(line[0].split("-")[1], 16)]
    return len(inside[0]) > 5 and inside[0][5].startswith("/")


def states(out: Path) -> dict:
    from imm.training.state import read_state

    return read_state(out)[0]


@pytest.mark.parametrize("layout", ["x.npz", "x.zip", "folder"])
def test_a_large_set_trains_bit_for_bit_as_a_small_one(layout, folder, tmp_path, monkeypatch) -> None:
    path = folder
    if layout != "folder":
        path = tmp_path / layout
        call("data", "convert", f"--data={folder}", f"--out={path}")
    train = lambda name: call("train", f"--data={path}", *OPTIONS, f"--out={tmp_path / name}", "--xflip").output
    small = load(str(path))
    assert "as they are needed" not in train("small")
    monkeypatch.setattr(lazy, "LARGE", 0)
    found = load(str(path))
    assert isinstance(found.pixels, LazyPixels) is (layout != "x.npz")
    if layout == "x.npz":
        assert is_mapped(found.pixels)
    assert torch.equal(found.pixels[:], small.pixels)
    assert torch.equal(found.pixels[torch.tensor([5, 0, 5])], small.pixels[[5, 0, 5]])
    assert digest(found) == digest(small)
    assert (found.shape, len(found), found.class_names) == (small.shape, 12, small.class_names)
    assert ("as they are needed" in train("large")) is (layout != "x.npz")
    one, other = states(tmp_path / "small"), states(tmp_path / "large")
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_posteriors_and_tokens_are_mapped_where_they_are_aligned(large, tmp_path) -> None:
    arrays = {"latents_mean": RANDOM.normal(size=(6, 4, 8, 8)), "latents_std": RANDOM.random((6, 4, 8, 8))}
    arrays = {name: value.astype(np.float16) for name, value in arrays.items()}

    class Kept:
        kept = range(6)

    rows = lambda index: [value[index] for value in arrays.values()]
    convert._write_npz(tmp_path / "aligned.npz", list(arrays), Kept, rows, np.arange(6) % 2, ["a", "b"])  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "aligned.npz") as archive:
        assert archive.testzip() is None
    np.savez(tmp_path / "other.npz", **arrays, labels=np.arange(6) % 2)
    np.savez_compressed(tmp_path / "compressed.npz", **arrays, labels=np.arange(6) % 2)
    for name in ("aligned", "other", "compressed"):
        found = load(str(tmp_path / f"{name}.npz"), latents=True)
        assert np.array_equal(found.pixels.numpy(), arrays["latents_mean"])
        assert np.array_equal(found.deviations.numpy(), arrays["latents_std"])
        assert found.pixels.data_ptr() % 2 == 0
        if name != "other":
            assert is_mapped(found.pixels) is is_mapped(found.deviations) is (name == "aligned")
    call("train", f"--data={tmp_path / 'aligned.npz'}", *OPTIONS, f"--out={tmp_path / 'run'}")
    np.save(tmp_path / "tokens.npy", arrays["latents_mean"].reshape(6, 16, 16))
    assert is_mapped(load_tokens(str(tmp_path / "tokens.npy")).pixels)


def test_pictures_are_decoded_as_needed_and_what_is_wrong_is_named(large, folder, tmp_path) -> None:
    found = load(str(folder))
    broken = folder / "class1" / "4.png"
    broken.write_bytes(broken.read_bytes()[:-30])
    number = next(i for i in range(12) if "class1/4.png" in found.pixels._stamps(i))
    rows = torch.tensor([i for i in range(12) if i != number])
    assert len(found.pixels[rows]) == 11
    with pytest.raises(ValueError, match=r"class1/4\.png"):
        found.pixels[torch.tensor([number])]
    assert "class1/4.png" in refused("train", f"--data={folder}", *OPTIONS, f"--out={tmp_path / 'run'}")
    left = load(str(folder), skip_broken=True)
    assert isinstance(left.pixels, torch.Tensor)
    assert len(left) == 11
    Image.new("RGB", (9, 9)).save(broken)
    with pytest.raises(ValueError, match=r"expected one size or a resolution, got \[3, 8, 8\] and \[3, 9, 9\] .*4\.png"):
        load(str(folder)).pixels[:]
    assert load(str(folder), 4).pixels[:].shape == (12, 3, 4, 4)


def test_a_changed_file_is_other_data(large, folder, tmp_path) -> None:
    train = ["train", f"--data={folder}", *OPTIONS[1:], f"--out={tmp_path / 'run'}"]
    call(*train, "--steps=1")
    Image.new("RGB", (8, 8)).save(folder / "class0" / "0.png")
    assert "data.sha256 was" in refused(*train, "--steps=2")


def test_large_sets_are_evaluated_to_the_same_numbers(folder, tmp_path, monkeypatch) -> None:
    call("train", f"--data={folder}", *OPTIONS, f"--out={tmp_path / 'run'}")
    net = tmp_path / "run" / "snapshot-0000003.safetensors"
    call("sample", f"--net={net}", "--seeds=0-9", "--steps=1", f"--out={tmp_path / 'made'}", "--device=cpu")
    stats = lambda: call("data", "stats", f"--data={folder}").output
    numbers = stats()
    judge = lambda name: call(
        "eval", f"--data={tmp_path / 'made'}", f"--ref={folder}", "--metrics=mmd-pixels,label-match", f"--out={tmp_path / name}"
    )
    judge("small.json")
    monkeypatch.setattr(lazy, "LARGE", 0)
    for source in (folder, tmp_path / "made"):
        assert isinstance(load_set(str(source)).pixels, LazyPixels)
    judge("large.json")
    assert stats().partition("\nnote: a large set")[0] == numbers.rstrip()
    assert (tmp_path / "small.json").read_text() == (tmp_path / "large.json").read_text()


TRAIN = """
import sys
import torch
from imm.cli import main
from imm.data import lazy
from imm.training import Trainer

lazy.LARGE = 2**20
anonymous = lambda: sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssShmem")))
made = Trainer.__init__

def init(self, *args, **named):
    made(self, *args, **named)
    self.before = anonymous()

def step(self, *args, **named):
    out = stepped(self, *args, **named)
    print("anonymous", anonymous() - self.before, flush=True)
    return out

stepped, Trainer.__init__, Trainer._step = Trainer._step, init, None
Trainer._step = step
print("start", anonymous())
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_on_a_mapped_set_takes_no_memory_for_it(tmp_path) -> None:
    """256 MB of latents, each of which a step reads."""
    count, path = 2**15, tmp_path / "latents.npy"
    np.lib.format.open_memmap(path, "w+", np.float16, (count, 4, 32, 32))[:, 0, 0, 0] = np.arange(count) / count
    with zipfile.ZipFile(tmp_path / "latents.npz", "w") as archive:
        info = convert._aligned("latents.npy", 0)
        with archive.open(info, "w", force_zip64=True) as out, path.open("rb") as values:
            while part := values.read(2**22):
                out.write(part)
    path.unlink()
    options = ["--width=4", "--batch=64", "--steps=12", "--device=cpu", "--tick=100"]
    line = [sys.executable, "-c", TRAIN, "train", f"--data={tmp_path / 'latents.npz'}", *options, f"--out={tmp_path / 'run'}"]
    output = subprocess.run(line, capture_output=True, text=True, check=True, timeout=240).stdout
    grown = [int(text.split()[1]) for text in output.splitlines() if text.startswith("anonymous")]
    assert len(grown) == 12
    assert grown[-1] - grown[1] < 2**15, grown  # in KiB: 32 MB
