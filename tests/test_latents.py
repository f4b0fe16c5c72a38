"""Decoding latents: the published scale, other autoencoders' own, parts, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from command_line import call, refused

from imm import FlowMap, checkpoints, latents
from imm.evaluation import load_set
from imm.integrations.autoencoder import load_vae
from imm.networks import DiT
from imm.sampling import Sampler

diffusers = pytest.importorskip("diffusers")


def tiny_vae(**settings) -> diffusers.AutoencoderKL:
    four = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4, 4, 4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    return diffusers.AutoencoderKL(**four, **sizes, **settings).eval()


def test_an_sd_vae_gets_latents_of_the_published_scale(vae) -> None:
    x = torch.randn(3, 4, 4, 4) * 0.5
    images = latents.decode(x, vae)
    assert (images.shape, images.dtype) == ((3, 3, 32, 32), torch.float32)
    assert not images.requires_grad
    mean = torch.tensor([0.86488, -0.27787343, 0.21616915, 0.3738409])[:, None, None]
    std = torch.tensor([4.85503674, 5.31922414, 3.93725398, 3.9870003])[:, None, None]
    with torch.no_grad():
        expected = vae.decode(mean + x * std / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - images.mean()).abs().max()) > 0.01  # the network says something


@pytest.mark.parametrize(
    ("settings", "scale", "shift"),
    [
        ({"scaling_factor": 0.25}, 4.0, 0.0),
        ({"scaling_factor": 0.5, "shift_factor": 0.125}, 2.0, 0.125),
        ({"scaling_factor": 0.5, "latents_mean": (1.0, 2.0, 3.0, 4.0), "latents_std": (2.0,) * 4}, 4.0, None),
        ({"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}, 1 / 0.18215, 0.0),
        ({"latent_channels": 8}, 1 / 0.18215, 0.0),
    ],
)
def test_other_autoencoders_have_their_own_scale(settings, scale, shift) -> None:
    vae = tiny_vae(**settings)
    x = torch.randn(2, vae.config.latent_channels, 2, 2)
    offset = torch.arange(1.0, 5.0)[:, None, None] if shift is None else shift
    with torch.no_grad():
        expected = vae.decode(x * scale + offset).sample.clamp(-1, 1)
    torch.testing.assert_close(latents.decode(x, vae), expected, rtol=1e-5, atol=1e-5)


def test_in_parts(vae, monkeypatch) -> None:
    x, seen = torch.randn(5, 4, 2, 2), []
    whole, own = latents.decode(x, vae), vae.decode
    monkeypatch.setattr(vae, "decode", lambda part: seen.append(len(part)) or own(part))
    torch.testing.assert_close(latents.decode(x, vae, batch=2), whole, rtol=1e-5, atol=1e-5)
    assert seen == [2, 2, 1]
    assert latents.decode(x[:0], vae).shape == (0, 3, 16, 16)


def test_it_computes_in_the_dtype_of_the_autoencoder(vae) -> None:
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    expected = latents.decode(x, vae)
    out = latents.decode(x, vae.to(torch.bfloat16))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    assert not torch.equal(out, expected)


def test_bad_latents_are_refused(vae) -> None:
    for x in (torch.randn(2, 3, 4, 4), torch.randn(4, 4, 4), torch.ones(1, 4, 4, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"latents: expected floating \[B, 4, h, w\], got "):
            latents.decode(x, vae)
    with pytest.raises(ValueError, match="batch: expected a count >= 1, got 0"):
        latents.decode(torch.randn(1, 4, 2, 2), vae, batch=0)


def test_from_a_folder(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path)
    loaded, x = load_vae(tmp_path), torch.randn(1, 4, 2, 2)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(latents.decode(x, loaded), latents.decode(x, vae))


def test_the_fingerprint_is_of_weights_and_scale(vae, tmp_path) -> None:
    first = latents.fingerprint(vae)
    assert len(first) == 64
    vae.save_pretrained(tmp_path / "a")
    assert latents.fingerprint(load_vae(tmp_path / "a")) == first
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scaling_factor": 0.5}))
    assert latents.fingerprint(load_vae(tmp_path / "a")) != first
    assert latents.fingerprint(vae.to(torch.bfloat16)) != first
    assert latents.fingerprint(tiny_vae()) != first  # other random weights


@pytest.fixture
def net(size_t, tmp_path) -> Path:
    """A file with a DiT on latents."""
    path = tmp_path / "dit.safetensors"
    checkpoints.save(path, FlowMap(DiT("T", patch=4, resolution=8, num_classes=2)))
    return path


def test_sampling_names_an_autoencoder_by_its_weights(vae, net, tmp_path) -> None:
    out = tmp_path / "out"
    options = ("sample", "--net", net, "--seeds", "0-1", "--steps", "1", "--out", out)
    vae.save_pretrained(tmp_path / "vae")
    call(*options, "--vae", tmp_path / "vae")
    record = json.loads((out / "generation.json").read_text())["vae"]
    assert record == {"name": str(tmp_path / "vae"), "sha256": latents.fingerprint(vae)}
    assert json.loads((out / "generation.json").read_text())["quantisation"] == "127.5 x + 127.5, clipped"
    images = latents.decode(Sampler(checkpoints.load(net), steps=1, rows=2).sample([0, 1], [0, 1]), vae, batch=1)
    pixels = (images * 127.5 + 127.5).floor().clamp(0, 255).byte()  # the published decoder's
    assert torch.equal(load_set(str(out)).pixels, pixels)
    assert load_set(str(out)).generation["quantisation"] == "127.5 x + 127.5, clipped"
    (tmp_path / "vae").rename(tmp_path / "moved")
    call(*options, "--vae", tmp_path / "moved")  # the same
    tiny_vae().save_pretrained(tmp_path / "vae")
    assert "holds images of another run (vae {" in refused(*options, "--vae", tmp_path / "vae")


def test_latents_are_decoded_later_without_sampling_again(vae, net, tmp_path, monkeypatch) -> None:
    vae.save_pretrained(tmp_path / "vae")
    decoding = ("--vae", tmp_path / "vae")
    options = ("sample", "--net", net, "--seeds", "0-5", "--steps", "1", "--batch", "4", "--out")
    call(*options, tmp_path / "once", *decoding)
    call(*options, tmp_path / "later")
    read = lambda name: {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
    before = read("later")
    assert [name for name in before if name.endswith(".png")] == []
    (tmp_path / "later" / "000005.npy").unlink()  # of the second batch, which is then sampled
    sampled, sample = [], Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda self, seeds, *rest: sampled.append(seeds) or sample(self, seeds, *rest))
    output = call(*options, tmp_path / "later", *decoding, "--grid", "3x2").output
    assert f"wrote 6 images to {tmp_path / 'later'}, and grid.png\n" in output
    assert sampled == [[4, 5]]
    after = read("later")
    assert {name: after[name] for name in after if name.endswith(".npy")} == {
        name: before[name] for name in before if name in after and name.endswith(".npy")
    }
    for name, content in read("once").items():
        assert after[name] == content, name
    assert "(quantisation '127.5 x + 127.5, clipped' there, None here; vae {" in refused(*options, tmp_path / "later")
    assert "steps 1 there, 2 here" in refused(*options[:6], "2", *options[7:], tmp_path / "later", *decoding)
    assert read("later") == after


def test_folders_without_safetensors_are_refused(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path, safe_serialization=False)  # a pickle
    with pytest.raises(OSError, match="safetensors"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({}))
    for source in (tmp_path / "absent", "absent", "../vae", "a/b/c", ""):
        with pytest.raises((FileNotFoundError, OSError), match=r"vae: expected a folder|safetensors|config.json"):
            load_vae(source)


def test_a_name_that_the_hub_does_not_give(monkeypatch) -> None:
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", Mock(side_effect=OSError("no such file")))
    text = r"vae: expected config.json .* in a/b, which is no folder here, on the hub, got: no such"
    with pytest.raises(OSError, match=text):
        load_vae("a/b")


def test_without_diffusers(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'vae: expected the diffusers library .* pip install "imm-kernels\[diffusers\]"'):
        load_vae(tmp_path)
