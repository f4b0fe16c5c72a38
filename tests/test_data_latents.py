"""Latents as training data: the files, what refuses them, the autoencoder's posteriors, and training on them."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from command_line import call, refused, said

from imm import FlowMap, IMMObjective, data, latents
from imm.data import ImageData, digest
from imm.networks import UNet, dit
from imm.training import TrainConfig, Trainer

MEAN = np.random.default_rng(0).normal(0, 0.5, (12, 4, 8, 8)).astype(np.float16)
STD = np.full_like(MEAN, 0.25)
LABELS = np.arange(12) % 3


def written(path, **arrays):
    np.savez(path, **arrays)
    return path


def broken(values: np.ndarray, value: float) -> np.ndarray:
    out = values.copy()
    out[7, 1, 2, 3] = value
    return out


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_values_and_labels_are_read_as_they_are(dtype, tmp_path) -> None:
    found = data.load(str(written(tmp_path / "a.npz", latents=MEAN.astype(dtype), labels=LABELS)), latents=True)
    assert torch.equal(found.pixels, torch.from_numpy(MEAN.astype(dtype)))
    assert (found.num_classes, found.shape, found.deviations) == (3, (4, 8, 8), None)
    assert found.images.dtype == torch.float32
    assert torch.equal(found.images, torch.from_numpy(MEAN).float())
    assert digest(found) == digest(found.pixels, found.labels)


def test_posteriors_are_read_and_count_in_the_digest(tmp_path) -> None:
    one = data.load(str(written(tmp_path / "a.npz", latents_mean=MEAN, latents_std=STD)), latents=True)
    other = data.load(str(written(tmp_path / "b.npz", latents_mean=MEAN, latents_std=2 * STD)), latents=True)
    assert one.deviations is not None
    assert torch.equal(one.deviations, torch.from_numpy(STD))
    assert (one.labels, one.num_classes) == (None, 0)
    assert len({digest(one), digest(other), digest(one.pixels)}) == 3


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        (
            {"latents": MEAN, "latents_mean": MEAN, "latents_std": STD},
            "expected an .npz file with latents, or .*, got latents and latents_mean and latents_std in ",
        ),
        ({"latents_mean": MEAN}, "latents_mean and latents_std, got latents_mean in "),
        ({"latents_std": STD}, "latents_mean and latents_std, got latents_std in "),
        ({"latents": MEAN, "images": MEAN}, "latents_mean and latents_std, got images and latents in "),
        ({"latents_mean": MEAN, "latents_std": STD, "arr_0": MEAN}, "got arr_0 and latents_mean and latents_std in "),
        ({"latents": MEAN.astype(np.float64)}, "of float16 or float32, got .* of float64"),
        ({"latents": MEAN[..., :4]}, r"latents \[N, C, h, h\]"),
        ({"latents": MEAN[0]}, r"latents \[N, C, h, h\]"),
        ({"latents": MEAN[:0]}, r"latents \[N, C, h, h\]"),
        ({"latents": np.array([object()])}, "expected a whole .npz file of numbers, got .*: Object arrays"),
        ({"latents": broken(MEAN, np.inf)}, "expected finite values in latents, got inf in number 7 "),
        ({"latents_mean": broken(MEAN, np.nan), "latents_std": STD}, "finite values in latents_mean, got nan in number 7 "),
        ({"latents_mean": MEAN, "latents_std": broken(STD, np.nan)}, "finite values >= 0 in latents_std, got nan in number 7 "),
        ({"latents_mean": MEAN, "latents_std": broken(STD, -1)}, "finite values >= 0 in latents_std, got -1.0 in number 7 "),
        (
            {"latents_mean": MEAN, "latents_std": STD[:5]},
            r"latents_std like latents_mean, \[12, 4, 8, 8\] of float16, got \[5, 4, 8, 8\] of float16",
        ),
        ({"latents_mean": MEAN, "latents_std": STD.astype(np.float32)}, "like latents_mean, .* of float16, got .* of float32"),
        ({"latents": MEAN, "labels": LABELS[:5]}, r"expected labels \[12\] of integers, got \[5\]"),
        ({"latents": MEAN, "labels": LABELS - 1}, "expected labels from 0 to 999999, got -1"),
    ],
)
def test_bad_files_are_refused(arrays, text, tmp_path) -> None:
    with pytest.raises(ValueError, match=text):
        data.load(str(written(tmp_path / "a.npz", **arrays)), latents=True)


def test_damaged_files_are_refused(tmp_path) -> None:
    path = written(tmp_path / "a.npz", latents=MEAN)
    whole = path.read_bytes()
    for content in (b"", b"latents", whole[: len(whole) // 2], whole[:3000] + b"?" + whole[3001:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected a whole .npz file"):
            data.load(str(path), latents=True)
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("latents.npy", b"")
    with pytest.raises(ValueError, match=r"expected every name once in .*, got 'latents' twice"):
        data.load(str(path), latents=True)
    with zipfile.ZipFile(path, "w") as archive:  # no array for numpy, which would give its bytes
        archive.writestr("latents", b"anything")
        archive.writestr("latents.npy", b"nothing that numpy wrote")
    with pytest.raises(ValueError, match=r"expected a whole .npz file of numbers"):
        data.load(str(path), latents=True)


def test_they_are_not_images(tmp_path) -> None:
    path = written(tmp_path / "a.npz", latents=MEAN, labels=LABELS)
    for command in (
        ("data", "stats", "--data", path),
        ("data", "convert", "--data", path, "--out", tmp_path / "b.zip"),
        ("eval", "--data", path, "--ref", path, "--metrics", "mmd-pixels", "--out", tmp_path / "b.json"),
    ):
        assert f"data: expected images, got the latents in {path}" in refused(*command)
    with pytest.raises(ValueError, match="resolution: expected 8 or none, latents cannot be resized, got 16"):
        data.load(str(path), 16, latents=True)
    with pytest.raises(ValueError, match="split: expected all"):
        data.load(str(path), None, "test", latents=True)
    assert len(data.load(str(path), 8, "all", latents=True)) == 12


def seen_by(trainer: Trainer, steps: int) -> list[torch.Tensor]:
    """The images of the steps from the trainer's on."""
    images: list[torch.Tensor] = []
    update = trainer.update
    trainer.update = lambda x, *rest, **_: images.append(x) or update(x, *rest)  # type: ignore[method-assign]
    trainer.run(trainer.step + steps)
    return images


def trainer(found: ImageData, folder) -> Trainer:
    torch.manual_seed(0)
    network = UNet(channels=4, resolution=8, num_classes=3, width=8, multipliers=(1, 2))
    return Trainer(IMMObjective(FlowMap(network)), found, folder, TrainConfig(batch=12))


def test_a_posterior_is_sampled_anew_at_every_step_and_alike_after_a_stop(tmp_path) -> None:
    mean, std = torch.from_numpy(MEAN), torch.from_numpy(STD)
    std[:6] = 0.0
    found = ImageData(mean, torch.from_numpy(LABELS), 3, "made up", std)
    whole = trainer(found, tmp_path / "whole")
    order = [torch.argsort(whole._batches.indices(step)) for step in range(4)]
    images = [x[index] for x, index in zip(seen_by(whole, 4), order, strict=True)]  # an epoch a step
    for x in images:
        assert torch.equal(x[:6], mean[:6].float())
        normal = (x[6:] - mean[6:]) / std[6:]
        assert abs(float(normal.mean())) < 0.1
        assert abs(float(normal.std()) - 1.0) < 0.1
    assert not torch.equal(images[0], images[1])
    trainer(found, tmp_path / "parts").run(2)
    rest = [x[index] for x, index in zip(seen_by(trainer(found, tmp_path / "parts"), 2), order[2:], strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(images[2:], rest, strict=True))


def test_deviations_that_are_not_finite_are_refused(tmp_path) -> None:
    std = torch.from_numpy(STD).clone()
    std[3] = float("nan")
    with pytest.raises(ValueError, match="expected finite images"):
        trainer(ImageData(torch.from_numpy(MEAN), torch.from_numpy(LABELS), 3, "made up", std), tmp_path)


def test_imm_train_takes_them_with_a_preset(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(dit.SIZES, "S", (32, 2, 2))
    mean = np.random.default_rng(0).normal(0, 0.5, (8, 4, 32, 32)).astype(np.float16)
    path = written(tmp_path / "a.npz", latents_mean=mean, latents_std=np.abs(mean), labels=np.arange(8))
    options = ("train", "--out", tmp_path / "run", "--preset=dit-s-8", "--steps=1", "--batch=4", "--precision=fp32")
    output = said(*options, "--data", path)
    assert "8 posteriors of latents in" in output
    assert "standard deviation 0.50 (expected near 0.5)" in output
    images = written(tmp_path / "b.npz", images=np.zeros((8, 32, 32, 3), np.uint8), labels=np.arange(8))
    assert "expected latents of 4 channels and 32x32 for the preset dit-s-8 (imm data encode makes them" in refused(
        *options, "--data", images
    )


def test_posteriors_in_the_published_scale(vae) -> None:
    """(z - mean) * 0.5 / std of each channel (section I.1), which decoding undoes."""
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    mean, std = latents.encode(images, vae, batch=2)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    shift, scale = (torch.tensor(v).reshape(4, 1, 1) for v in (latents.SD_VAE_MEAN, latents.SD_VAE_STD))
    torch.testing.assert_close(mean, (posterior.mean - shift) * 0.5 / scale)
    torch.testing.assert_close(std, posterior.std * 0.5 / scale)
    with torch.no_grad():
        torch.testing.assert_close(latents.decode(mean, vae), vae.decode(posterior.mean).sample.clamp(-1, 1))
    for bad in (images[:, :1], images[..., :7], images.byte(), images[:0]):
        with pytest.raises(ValueError, match=r"images: expected floating \[B, 3, H, W\] with H and W multiples of 8"):
            latents.encode(bad, vae)
    with pytest.raises(ValueError, match="batch: expected a count >= 1"):
        latents.encode(images, vae, batch=0)


def test_imm_data_encode(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    source = written(tmp_path / "images.npz", images=pixels, labels=np.arange(5))
    options = ("data", "encode", "--data", source, "--vae", tmp_path / "vae", "--device", "cpu")
    call(*options, "--out", tmp_path / "a.npz", "--batch", "2")
    call(*options, "--out", tmp_path / "b.npz", "--batch", "2")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = data.load(str(tmp_path / "a.npz"), latents=True)
    mean, std = latents.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, vae)
    torch.testing.assert_close(found.pixels, mean.half(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.deviations, std.half(), rtol=1e-3, atol=1e-3)
    assert found.labels.tolist() == list(range(5))
    assert "expected an .npz file for latents" in refused(*options, "--out", tmp_path / "a.zip")
    grey = written(tmp_path / "grey.npz", images=pixels[..., 0])
    repeated = written(tmp_path / "repeated.npz", images=np.repeat(pixels[..., :1], 3, axis=3))
    for source, dest in ((grey, "c.npz"), (repeated, "d.npz")):
        call("data", "encode", "--data", source, "--vae", tmp_path / "vae", "--out", tmp_path / dest, "--device", "cpu")
    assert (tmp_path / "c.npz").read_bytes() == (tmp_path / "d.npz").read_bytes()
