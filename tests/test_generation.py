"""imm sample at scale: the same files from any number of processes and after any kill; what a folder refuses; the array."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call, refused

from imm import FlowMap, checkpoints
from imm.cli import sample
from imm.distributed import Processes
from imm.evaluation.sets import GENERATION_FILE, load_set
from imm.files import sha256_of
from imm.networks import DiT, UNet
from imm.sampling import Sampler
from imm.sampling.folder import ImageFolder, batches, generate
from imm.seeds import format_integers, parse_integers

IMM = [sys.executable, "-m", "imm", "sample"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "imm", "sample"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(command: list[str], *arguments: Any) -> str:
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def net(small_flow_map, tmp_path):
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, small_flow_map)
    return path


@pytest.mark.parametrize("count", [40, pytest.param(256, marks=pytest.mark.full)])
def test_two_processes_and_a_killed_run_write_the_same_files(count, net, tmp_path) -> None:
    options = ("--net", net, "--seeds", f"0-{count - 1}", "--steps", "2", "--cfg", "1.5", "--batch", "7", "--subdirs")
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    extra = ("--grid", "4x2", "--npz")
    call("sample", *options, "--out", one, *extra, tmp_path / "one.npz")
    output = run(TORCHRUN, *options, "--out", two, *extra, tmp_path / "two.npz")
    assert f"wrote {count} images to {two}, and grid.png and {tmp_path / 'two.npz'}\n" in output
    assert files(two) == files(one)
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()

    process = subprocess.Popen([*IMM, *map(str, (*options, "--out", killed))], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(killed.glob("000000/0*.png"))) < 3 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("000000/0*.png")}
    assert 3 <= len(kept) < count
    (killed / "000000" / ".000039.png.1.part").write_bytes(b"half")
    call("sample", *options, "--out", killed, *extra, tmp_path / "killed.npz")
    assert files(killed) == files(one)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # no image was made twice


def test_batches_do_not_depend_on_the_number_of_processes() -> None:
    whole = [(part.start, part.stop) for part in batches(23, 5, Processes())]
    assert whole == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    for world in (2, 3, 9):
        shares = [list(batches(23, 5, Processes(rank, world))) for rank in range(world)]
        assert sorted((part.start, part.stop) for share in shares for part in share) == whole


def test_an_image_that_was_lost_is_made_again_and_nothing_else(net, tmp_path) -> None:
    options = ("sample", "--net", net, "--seeds", "0-9", "--batch", "4", "--out", tmp_path / "out")
    assert f"wrote 10 images to {tmp_path / 'out'}\n" in call(*options).output
    before = files(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    lost = tmp_path / "out" / "000006.png"
    lost.unlink()
    assert f"wrote 1 images to {tmp_path / 'out'} (9 were there already)\n" in call(*options).output
    again = call(*options, "--grid", "2x2").output
    assert f"wrote 0 images to {tmp_path / 'out'} (10 were there already), and grid.png\n" in again
    (tmp_path / "out" / "grid.png").unlink()
    assert files(tmp_path / "out") == before
    assert {path for path, time_ns in times.items() if path.stat().st_mtime_ns != time_ns} == {lost}


@pytest.mark.parametrize("latents", [False, True])
def test_files_that_were_cut_short_are_made_again(latents, net, tmp_path) -> None:
    """What a machine leaves that lost its power."""
    if latents:
        checkpoints.save(net, FlowMap(DiT("S", patch=4, resolution=8, num_classes=2)))
    options = ("sample", "--net", net, "--seeds", "0-3", "--steps", "1", "--out", tmp_path / "out")
    call(*options)
    before = files(tmp_path / "out")
    whole, *paths = sorted((tmp_path / "out").glob("0*"))
    kept = whole.stat().st_mtime_ns
    for path, size in zip(paths, (0, 5, 60), strict=True):
        assert path.stat().st_size > size
        path.write_bytes(path.read_bytes()[:size])
    call(*options)
    assert files(tmp_path / "out") == before
    assert whole.stat().st_mtime_ns == kept
    paths[0].write_bytes(bytes(len(before[paths[0].name])))  # blocks that were never written
    call(*options)
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("pictures", [False, True])
def test_a_file_is_on_the_disk_before_it_has_its_name(pictures, tmp_path, monkeypatch) -> None:
    folder, order = ImageFolder(tmp_path, pictures=pictures), []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: order.append(("sync", os.fstat(file).st_size)) or sync(file))
    monkeypatch.setattr(os, "replace", lambda part, path: order.append(("name", path)) or replace(part, path))
    folder.write(3, torch.zeros(3, 8, 8))
    assert order == [("sync", folder.path(3).stat().st_size), ("name", folder.path(3))]
    assert folder.has(3)
    assert not folder.has(4)


def test_a_folder_of_other_images_is_refused(net, tmp_path) -> None:
    base = ("sample", "--net", net, "--out", tmp_path / "out")
    call(*base, "--seeds", "0-3")
    before = files(tmp_path / "out")
    assert "seeds '0-3' there, '0-4' here" in refused(*base, "--seeds", "0-4")
    assert "steps 2 there, 3 here" in refused(*base, "--seeds", "0-3", "--steps", "3")
    assert "guidance None there, 2.0 here" in refused(*base, "--seeds", "0-3", "--cfg", "2")
    torch.manual_seed(7)
    other = FlowMap(UNet(resolution=8, num_classes=3, width=8, multipliers=(1, 2)))
    checkpoints.save(net, other)
    assert "net {'name': 'net.safetensors', 'sha256': '" in refused(*base, "--seeds", "0-3")
    assert files(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000002.png").write_bytes(b"mine")
    for name in ("000002.png", "000002.npy"):
        (tmp_path / "mine" / "000002.png").rename(tmp_path / "mine" / name)
        line = refused("sample", "--net", net, "--out", tmp_path / "mine", "--seeds", "0-3")
        assert f"no images of another origin in {tmp_path / 'mine'}, got {name}" in line
        assert files(tmp_path / "mine") == {name: b"mine"}
    for text, what in (("{", "Expecting property name"), ("[1]", "got: a JSON list"), ("3", "got: a JSON int")):
        (tmp_path / "out" / GENERATION_FILE).write_text(text)
        line = refused(*base, "--seeds", "0-3")
        assert "out: expected a readable" in line
        assert what in line


def test_a_checkpoint_is_its_bytes_and_not_its_name(net, tmp_path) -> None:
    options = ("--seeds", "0-3", "--out", tmp_path / "out")
    call("sample", "--net", net, *options)
    renamed = net.rename(tmp_path / "renamed.safetensors")
    call("sample", "--net", renamed, *options)


def test_the_manifest_says_how_the_images_were_made(net, tmp_path) -> None:
    call("sample", "--net", net, "--seeds", "3,0-1", "--cfg", "2", "--class", "1", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / GENERATION_FILE).read_text())
    assert found["net"] == {"name": "net.safetensors", "sha256": sha256_of(net)}
    expected = {
        "seeds": "3,0-1",
        "labels": "1",
        "steps": 2,
        "guidance": 2.0,
        "nfe": 4,
        "kind": "uniform",
        "method": "pushforward",
    }
    assert {key: found[key] for key in expected} == expected


def test_the_manifest_lists_what_took_part(net, tmp_path, monkeypatch) -> None:
    options = ("sample", "--net", net, "--seeds", "0-3", "--out", tmp_path / "out")
    made_with = lambda: json.loads((tmp_path / "out" / GENERATION_FILE).read_text())["made_with"]
    call(*options)
    first = made_with()
    assert [one["torch"] for one in first] == [torch.__version__]
    assert first[0]["device"].startswith("CPU (")
    monkeypatch.setattr(sample, "note", lambda device: {"made_with": [{**first[0], "device": "other"}]})
    call(*options)
    assert made_with() == first  # nothing was left to make
    for _ in range(2):
        (tmp_path / "out" / "000002.png").unlink()
        call(*options)
        assert made_with() == [*first, {**first[0], "device": "other"}]


@pytest.mark.parametrize("folder", ["", "out"])
def test_the_array_is_in_the_evaluators_layout(folder, net, tmp_path) -> None:
    path = tmp_path / folder / "all.npz"
    call("sample", "--net", net, "--seeds", "5,2", "--labels", "2,0", "--out", tmp_path / "out", "--npz", path)
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1"]
        assert archive["arr_0"].shape == (2, 8, 8, 1)
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [2, 0]
        for image, seed in zip(archive["arr_0"], (5, 2), strict=True):
            assert np.array_equal(image[:, :, 0], np.asarray(Image.open(tmp_path / "out" / f"{seed:06d}.png")))
    assert [p.name for p in tmp_path.rglob(".*")] == []
    assert len(load_set(str(tmp_path / "out"))) == 2


def test_one_class_is_the_label_of_every_image(net, tmp_path) -> None:
    call("sample", "--net", net, "--seeds", "0-2", "--class", "2", "--out", tmp_path / "a")
    call("sample", "--net", net, "--seeds", "0-2", "--labels", "2", "--out", tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert "got both" in refused("sample", "--net", net, "--class", "1", "--labels", "1", "--out", tmp_path / "c")


def test_no_class_is_a_word_and_one_class_too_many_is_refused(net, tmp_path) -> None:
    call("sample", "--net", net, "--seeds", "0-1", "--class", "none", "--out", tmp_path / "a")
    call("sample", "--net", net, "--seeds", "0-1", "--labels", "3", "--out", tmp_path / "b")
    assert json.loads((tmp_path / "a" / GENERATION_FILE).read_text())["labels"] == "none"
    a, b = ({name: data for name, data in files(tmp_path / one).items() if name != GENERATION_FILE} for one in "ab")
    assert a == b
    message = refused("sample", "--net", net, "--class", "3", "--out", tmp_path / "c")
    assert "class: expected 0..2, a class's name or none, got 3" in message
    plain = tmp_path / "plain.safetensors"
    checkpoints.save(plain, FlowMap(UNet(resolution=8, num_classes=0, width=8, multipliers=(1, 2))))
    call("sample", "--net", plain, "--seeds", "0", "--out", tmp_path / "d")
    call("sample", "--net", plain, "--seeds", "0", "--class", "none", "--out", tmp_path / "d")  # the same run
    for name in ("0", "dog"):
        assert "one without classes" in refused("sample", "--net", plain, "--class", name, "--out", tmp_path / "e")


def test_sixteen_bits_are_other_networks(net, tmp_path) -> None:
    images = {}
    for name in ("fp32", "bf16", "fp16"):
        call("sample", "--net", net, "--seeds", "0-63", "--precision", name, "--out", tmp_path / name)
        files = [tmp_path / name / f"{i:06d}.png" for i in range(64)]
        images[name] = np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)
    differences = [np.abs(images["fp32"] - images[name]).mean() for name in ("fp16", "bf16")]
    assert 0 < differences[0] < differences[1] < 4


def test_latents_are_kept_as_numbers(tmp_path) -> None:
    path = tmp_path / "dit.safetensors"
    checkpoints.save(path, FlowMap(DiT("S", patch=4, resolution=8, num_classes=2)))
    npz = tmp_path / "all.npz"
    output = call("sample", "--net", path, "--seeds", "3,5", "--out", tmp_path / "out", "--npz", npz).output
    assert "wrote 2 latents to" in output
    assert 'the same command with --vae=PATH makes pictures of them; it needs the diffusers library: pip install "imm' in output
    with pytest.raises(ValueError, match=r"expected pictures in .*, got latents; imm sample once more with --vae=PATH"):
        load_set(str(tmp_path / "out"))
    one = np.load(tmp_path / "out" / "000005.npy")
    assert one.shape == (4, 8, 8)
    assert one.dtype == np.float32
    with np.load(npz) as archive:
        assert np.array_equal(archive["arr_0"][1], one)
    base = ("sample", "--net", path, "--seeds", "3,5", "--out", tmp_path / "other")
    assert "expected pictures, got latents of 4 channels" in refused(*base, "--grid", "2x1")
    assert "ends in .npz" in refused(*base, "--npz", tmp_path / "absent" / "all.npz")
    assert not (tmp_path / "other").exists()


def sampler_of_latents(rows: int, **settings: Any) -> Sampler:
    torch.manual_seed(0)
    return Sampler(FlowMap(DiT("S", patch=4, resolution=8, num_classes=2)).eval(), steps=1, rows=rows, **settings)


def test_only_absent_images_are_decoded(tmp_path) -> None:
    folder, seeds, decoded = ImageFolder(tmp_path, pictures=True), range(10), []
    decode = lambda x: decoded.append(len(x)) or x[:, :3]
    for _ in range(2):
        generate(sampler_of_latents(4), seeds, None, folder, Processes(), decode=decode)
    before = files(tmp_path)
    assert (decoded, len(before)) == ([4, 4, 2], 10)
    for seed in (2, 3, 6):
        folder.path(seed).unlink()
    generate(sampler_of_latents(4), seeds, None, folder, Processes(), decode=decode)
    assert decoded[3:] == [2, 1]
    assert files(tmp_path) == before


def test_images_that_are_not_finite_are_refused(net, small_flow_map, tmp_path) -> None:
    with torch.no_grad():
        list(small_flow_map.parameters())[-1].fill_(1e6)  # of what fp32 holds and fp16 does not
    checkpoints.save(net, small_flow_map)
    options = ("sample", "--net", net, "--seeds", "0-2", "--out", tmp_path / "out", "--precision")
    line = refused(*options, "fp16")
    assert f"images: expected finite numbers, got NaN or infinity from {net} in fp16, for 3 of 3 images" in line
    assert not list((tmp_path / "out").glob("*.png"))
    call(*options[:-3], "--out", tmp_path / "other")
    broken = lambda x: torch.where(torch.arange(len(x))[:, None, None, None] == 1, torch.nan, x[:, :3])
    folder = ImageFolder(tmp_path, pictures=True)
    with pytest.raises(ValueError, match=r"from the autoencoder, of latents that are, by the network, for 1 of 4 images .* 6"):
        generate(sampler_of_latents(4), range(5, 9), None, folder, Processes(), decode=broken)


def test_a_seed_twice_is_refused(net, tmp_path) -> None:
    assert "expected every seed once" in refused("sample", "--net", net, "--seeds", "0-3,2", "--out", tmp_path / "out")


@pytest.mark.parametrize("values", [[0], [0, 1, 2, 7], [3, 0, 1], [5, 4]])
def test_seeds_as_text(values) -> None:
    assert parse_integers(format_integers(values), "seeds") == values
    assert format_integers(range(50000)) == "0-49999"


def test_a_second_run_in_a_folder_is_refused_and_breaks_nothing(net, tmp_path, monkeypatch) -> None:
    out, options = tmp_path / "out", ("sample", "--net", net, "--seeds", "0-3", "--steps", "1", "--out", tmp_path / "out")
    write, said = ImageFolder.write, []

    def write_beside_another(self, seed: int, image: torch.Tensor) -> None:
        if not said:
            said.append("")
            said[0] = refused(*options)
        write(self, seed, image)

    monkeypatch.setattr(ImageFolder, "write", write_beside_another)
    call(*options)
    assert said == [f"Error: out: expected a folder that no other run writes to, got {out}, where process {os.getpid()} does"]
    assert sorted(files(out)) == ["000000.png", "000001.png", "000002.png", "000003.png", GENERATION_FILE]
    (out / "000001.png").unlink()
    assert "3 were there" in call(*options).output  # the lock went with the command


def test_a_folder_with_a_manifest_and_no_image_is_free(net, tmp_path) -> None:
    options = ("sample", "--net", net, "--seeds", "0-1", "--steps", "1", "--out", tmp_path / "out")
    call(*options, "--cfg", "3")
    for path in (tmp_path / "out").glob("*.png"):
        path.unlink()
    call(*options, "--cfg", "1.5")
    assert json.loads((tmp_path / "out" / GENERATION_FILE).read_text())["guidance"] == 1.5
    assert "holds images of another run (guidance 1.5 there, 3.0 here)" in refused(*options, "--cfg", "3")
