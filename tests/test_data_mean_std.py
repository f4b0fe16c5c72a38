"""Latents in EDM2's layout: files of means and deviations, unscaled, with their labels."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from command_line import refused, said
from test_data_layouts import write_folder, write_zip

from imm import data, latents

COUNT, SIDE = 6, 8
RNG = np.random.default_rng(0)
MEAN = RNG.normal(0, 4, (COUNT, 4, SIDE, SIDE)).astype(np.float32)
STD = RNG.uniform(0, 0.1, MEAN.shape).astype(np.float32)
NAMES = [f"0000{i // 4}/img-mean-std-{i:08d}.npy" for i in range(COUNT)]
LABELS = [[name, i % 3] for i, name in enumerate(NAMES)]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def written(path, labels=LABELS, dtype=np.float32, **changes):
    """The set as a zip or a folder; ``changes``: contents by number, or other names."""
    files = {name: npy(np.concatenate([MEAN[i], STD[i]]).astype(dtype)) for i, name in enumerate(NAMES)}
    files |= {NAMES[int(key[1:])] if key.startswith("_") else key: value for key, value in changes.items()}
    if labels is not None:
        files["dataset.json"] = json.dumps({"labels": labels} if labels != "none" else {"labels": None}).encode()
    write = write_zip if path.suffix == ".zip" else write_folder
    return write(path, sorted(files.items(), reverse=True))


@pytest.mark.parametrize("name", ["a.zip", "folder"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_they_are_posteriors_in_the_scale_that_is_learned(name, dtype, tmp_path) -> None:
    found = data.load(str(written(tmp_path / name, dtype=dtype)), latents=True)
    shape = (1, 4, 1, 1)
    mean, std = (torch.tensor(v).reshape(shape) for v in (latents.SD_VAE_MEAN, latents.SD_VAE_STD))
    bound = {"atol": 1e-6, "rtol": 1e-6} if dtype == np.float32 else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(found.pixels.float(), (torch.from_numpy(MEAN) - mean) * 0.5 / std, **bound)
    torch.testing.assert_close(found.deviations.float(), torch.from_numpy(STD) * 0.5 / std, **bound)
    assert found.pixels.dtype == found.deviations.dtype == (torch.float32 if dtype == np.float32 else torch.float16)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (found.num_classes, found.shape, found.source) == (
        3,
        (4, 8, 8),
        f"6 posteriors of latents in {tmp_path / name}",
    )


@pytest.mark.parametrize("labels", [None, "none"])
def test_without_labels(labels, tmp_path) -> None:
    found = data.load(str(written(tmp_path / "a.zip", labels)), latents=True)
    assert (found.labels, found.num_classes) == (None, 0)


def test_a_network_trains_on_them_and_nothing_else_takes_them(tmp_path) -> None:
    path = written(tmp_path / "a.zip")
    options = ["--steps=1", "--batch=4", "--network=unet", "--width=8", f"--out={tmp_path / 'run'}"]
    assert "6 posteriors of latents" in said("train", "--data", path, *options)
    for command in (["stats"], ["convert", f"--out={tmp_path / 'b.zip'}"]):
        assert "data: expected images" in refused("data", *command, "--data", path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"_3": npy(np.zeros((8, 4, 4), np.float32))}, r"expected \[8, 8, 8\] of float32 as in .*0.npy, got \[8, 4, 4\]"),
        ({"_3": npy(np.zeros((8, 8, 8), np.float16))}, "got .* of float16 in 00000/img-mean-std-00000003.npy"),
        ({"_0": npy(np.zeros((32, 8, 8), np.float32))}, r"expected \[8, h, h\] of float16 or float32, .*: \[32, 8, 8\]"),
        ({"_0": npy(np.zeros((8, 8, 4), np.float32))}, r"expected \[8, h, h\]"),
        ({"_0": npy(np.zeros((8, 8, 8)))}, "of float64"),
        ({"_0": npy(np.zeros((8, 8, 8), object))}, "of object"),
        ({"_1": npy(np.zeros((8, 8, 8), np.float32))[:-4]}, r"expected \[8, h, h\].*1.npy of"),
        ({"_1": b"no array"}, r"expected \[8, h, h\].*1.npy of"),
        ({"_1": npy(np.full((8, 8, 8), np.nan, np.float32))}, "expected finite means .* in 00000/img-mean-std-00000001.npy"),
        ({"_1": npy(np.full((8, 8, 8), -1, np.float32))}, "deviations >= 0"),
        ({"00000/img00000000.png": b"x"}, "expected images or latents in .*, got 00000/img00000000.png beside"),
        ({"labels": LABELS[:5]}, "a label for each of the 6 images in dataset.json of .*, got 5 labels; one of the two lacks"),
        ({"labels": [*LABELS, LABELS[0]]}, "expected one label for each image in .*, got two for"),
        ({"labels": [*LABELS[:5], [NAMES[5], -1]]}, "classes from 0 to 999999 in .*, got "),
        ({"labels": [*LABELS[:5], [NAMES[5], [1]]]}, "classes from 0 to 999999 in .*, got "),
        ({"labels": None, "set/dataset.json": b"{}"}, "expected dataset.json at the top of .*, got set/dataset.json"),
        ({"labels": 3}, r'expected \{"labels": \[\[name, class\], ...\]\}'),
        ({"labels": [[[1], 2]]}, r"expected rows \[name, class\]"),
        ({"labels": [[1, 2, 3]]}, r"expected rows \[name, class\]"),
    ],
)
def test_what_is_refused(changes, text, tmp_path) -> None:
    path = written(tmp_path / "a.zip", **changes)
    with pytest.raises(ValueError, match=text):
        data.load(str(path), latents=True)
