"""Presets: what the published checkpoints and the paper say, and ``imm train --preset``."""

from __future__ import annotations

import dataclasses

import numpy as np
import parity
import pytest
import torch
from command_line import call, refused, said

from imm import Sampler, checkpoints, presets
from imm.networks import DDPMpp, DiT, dit
from imm.objectives import OBJECTIVES
from imm.presets import PRESETS
from imm.training import TrainConfig
from imm.training.state import read_state

OTHERS = ["imagenet256-meanflow-b-4", "celebahq256-shortcut"]
SIZES = [f"dit-{size}-{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)]


def test_names() -> None:
    assert sorted(PRESETS) == sorted(["cifar10", "imagenet256-ts-a2", "imagenet256-s-a1", *OTHERS, *SIZES])
    with pytest.raises(ValueError, match=r"unknown preset 'cifar'; expected one of \['cifar10', "):
        presets.flow_map("cifar")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_its_flow_map_objective_and_sampler(name) -> None:
    preset = PRESETS[name]
    with torch.device("meta"):
        flow_map = presets.flow_map(name)
    assert flow_map.training
    assert flow_map.network.settings.items() >= preset.arguments.items()
    assert flow_map.settings.items() >= preset.flow_map.items()
    objective = OBJECTIVES[preset.loss](flow_map, **preset.objective)
    assert objective.settings.items() >= {"loss": preset.loss, **preset.objective}.items()
    assert dataclasses.asdict(TrainConfig(**preset.training)).items() >= preset.training.items()
    small = preset.arguments | ({"width": 8} if preset.network == "DDPMpp" else {"size": "S", "patch": 8})
    sampler = Sampler(presets.Preset(preset.network, small, preset.flow_map).build().eval(), **preset.sampling)
    assert len(sampler.table) == preset.sampling["steps"]


@pytest.mark.parametrize(
    ("name", "listing", "second_time"),
    [
        ("cifar10", "state_dict_ddpmpp_cifar10.txt", "identity"),
        ("imagenet256-ts-a2", "state_dict_dit_xl_2.txt", "stride"),
        ("imagenet256-s-a1", "state_dict_dit_xl_2.txt", "identity"),
    ],
)
def test_published_checkpoints_fit_their_presets(name, listing, second_time) -> None:
    with torch.device("meta"):
        flow_map = presets.flow_map(name)
    state = {f"model.{key}": tuple(value.shape) for key, value in flow_map.network.state_dict().items()}
    assert state == parity.names(listing)
    assert (flow_map.second_time, flow_map.t_max, flow_map.sigma_data) == (second_time, 0.994, 0.5)


def test_settings_of_the_paper() -> None:
    """Table 5, and 1.4 in section I.2."""
    cifar, best = PRESETS["cifar10"], PRESETS["imagenet256-ts-a2"]
    assert (cifar.objective["k"], cifar.objective["a"], cifar.objective["b"]) == (15, 1, 5.0)
    assert cifar.flow_map["parametrization"] == "simple_edm"
    assert (best.objective["k"], best.objective["a"], best.objective["b"], best.objective["min_gap"]) == (12, 2, 4.0, 1e-4)
    assert PRESETS["dit-xl-2"] == PRESETS["imagenet256-s-a1"]
    network = presets.Preset("DDPMpp", cifar.arguments | {"width": 8}, cifar.flow_map).build().eval()
    np.testing.assert_allclose(Sampler(network, **cifar.sampling).times, [0.994, 1.4 / 2.4, 0.006])


def test_training_of_the_paper() -> None:
    """Table 5; TF32 is the default of section I.6, half precision the best network's (table 8)."""
    for name, preset in PRESETS.items():
        if name in OTHERS:
            continue
        assert preset.loss == "imm"
        config = TrainConfig(**preset.training)
        cifar = name == "cifar10"
        assert (config.batch, config.lr, config.betas, config.weight_decay) == (4096, 1e-4, (0.9, 0.999), 0.0)
        assert (config.ema, config.warmup) == (0.9999, 0)
        assert config.optimizer == ("radam" if cifar else "adamw")
        assert config.precision == ("fp16" if name == "imagenet256-ts-a2" else "tf32")
        assert config.xflip is cifar
        assert config.augment == (0.12 if cifar else 0.0)
        assert preset.steps == (400_000 if cifar else 1_200_000)


def test_settings_of_other_papers() -> None:
    """Shortcut models, table 3; MeanFlow, table 1."""
    shortcut, meanflow = PRESETS["celebahq256-shortcut"], PRESETS["imagenet256-meanflow-b-4"]
    for preset, loss, patch, classes in ((shortcut, "shortcut", 2, 0), (meanflow, "meanflow", 4, 1000)):
        assert (preset.loss, preset.steps) == (loss, 400_000)
        assert preset.arguments == {"size": "B", "patch": patch, "channels": 4, "resolution": 32, "num_classes": classes}
        assert (preset.flow_map["second_time"], preset.flow_map["t_min"], preset.flow_map["t_max"]) == ("stride", 0.0, 1.0)
        assert preset.sampling["steps"] == 1
        assert "guidance" not in preset.sampling
    assert shortcut.objective == {"bootstrap": 0.25, "depth": 7}
    config = TrainConfig(**shortcut.training)
    assert (config.batch, config.optimizer, config.lr, config.betas) == (64, "adamw", 1e-4, (0.9, 0.999))
    assert (config.weight_decay, config.ema) == (0.1, 0.999)
    config = TrainConfig(**meanflow.training)
    assert (config.batch, config.optimizer, config.lr, config.betas) == (256, "adamw", 1e-4, (0.9, 0.95))
    assert (config.weight_decay, config.ema, config.decay) == (0.0, 0.9999, "none")
    assert meanflow.flow_map["time_scale"] == 1.0
    features = 4 * 32 * 32
    assert meanflow.objective["floor"] * features == pytest.approx(1e-3)


@pytest.mark.parametrize("name", OTHERS)
def test_train_with_the_presets_of_other_papers(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(dit.SIZES, "B", (32, 2, 2))
    preset = PRESETS[name]
    latents = np.random.default_rng(0).normal(0, 0.5, (8, 4, 32, 32)).astype(np.float16)
    labels = {"labels": np.arange(8)} if preset.arguments["num_classes"] else {}
    np.savez(tmp_path / "data.npz", latents=latents, **labels)
    output = said(*train(tmp_path / "data.npz", tmp_path / "run", f"--preset={name}", "--batch=8"))
    assert f"loss: {preset.loss}" in output
    path = tmp_path / "run" / "snapshot-0000001.safetensors"
    flow_map = checkpoints.load(path)
    assert flow_map.settings.items() >= preset.flow_map.items()
    kept = checkpoints.read_settings(path, "flow_map")["extra"]["objective"]
    assert kept.items() >= {"loss": preset.loss, **preset.objective}.items()
    samples = Sampler(flow_map, **preset.sampling).sample(torch.arange(2))
    assert samples.shape == (2, 4, 32, 32)
    assert torch.isfinite(samples).all()  # from t = 1, where alpha is 0


@pytest.fixture
def small_cifar10(monkeypatch) -> None:
    """The preset with a network of one narrow block a level."""
    cifar = PRESETS["cifar10"]
    monkeypatch.setitem(PRESETS, "cifar10", dataclasses.replace(cifar, arguments=cifar.arguments | {"width": 8, "blocks": 1}))


@pytest.fixture
def pixels(tmp_path):
    """Eight made-up 32x32 colour images of two classes."""
    path = tmp_path / "data.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8), labels=np.arange(8) % 2)
    return path


def train(data, outdir, *options: str) -> tuple:
    return "train", "--data", data, "--out", outdir, "--steps=1", "--batch=2", *options


def test_train_with_a_preset(pixels, tmp_path) -> None:
    output = said(*train(pixels, tmp_path / "run", "--preset=cifar10", "--width=8", "--particles=2", "-b", "4"))
    assert "network: DDPMpp" in output
    assert "preset: cifar10" in output
    flow_map = checkpoints.load(tmp_path / "run" / "snapshot-0000001.safetensors")
    assert isinstance(flow_map.network, DDPMpp)
    assert flow_map.network.settings["width"] == 8
    assert flow_map.network.settings["dropout"] == 0.2  # the preset's, not the option's default
    assert flow_map.settings == presets.flow_map("cifar10").settings
    _, settings = read_state(tmp_path / "run")
    objective = settings["settings"]["objective"]
    assert (objective["particles"], objective["k"], objective["a"], objective["b"]) == (2, 15, 1, 4.0)
    call("sample", "--net", tmp_path / "run" / "snapshot-0000001.safetensors", "--seeds", "0", "--out", tmp_path / "samples")


def test_train_takes_the_training_settings_of_a_preset(pixels, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("imm.cli.progress.run", lambda trainer, steps, seconds, quiet: asked.append(steps) or trainer.save())
    base = ("train", "--data", pixels, "--preset", "cifar10", "--width", "8", "--out")
    output = said(*base, tmp_path / "all")
    assert "'optimizer': 'radam'" in output
    assert "tf32; steps: 400000, batch 4096" in output
    own = ("--batch=64", "--steps=10000", "--no-xflip", "--precision=fp32", "--optimizer=adamw")
    call(*base, tmp_path / "some", *own)
    assert asked == [400_000, 10_000]

    def config(name: str) -> dict:
        return read_state(tmp_path / name)[1]["settings"]["config"]

    paper = {**PRESETS["cifar10"].training, "betas": [0.9, 0.999], "warmup": 0, "seed": 0, "compile": False}
    paper |= {"decay": "none", "decay_steps": None, "clip": None, "max_skipped": 0, "ema_lengths": []}
    assert config("all") == paper
    assert config("some") == {**paper, "batch": 64, "xflip": False, "precision": "fp32", "optimizer": "adamw"}


def test_an_option_equal_to_its_default_wins_too(pixels, small_cifar10, tmp_path) -> None:
    options = ("--preset=cifar10", "--particles=2", "--dropout=0.0", "--second-time=stride")
    call(*train(pixels, tmp_path / "run", *options))
    flow_map = checkpoints.load(tmp_path / "run" / "snapshot-0000001.safetensors")
    assert flow_map.second_time == "stride"
    assert flow_map.network.settings["dropout"] == 0.0


def test_train_from_a_checkpoint_with_a_preset(pixels, tmp_path) -> None:
    """The file must be what the preset says; the objective is the preset's."""
    path = tmp_path / "net.safetensors"
    preset = PRESETS["cifar10"]
    checkpoints.save(path, presets.Preset("DDPMpp", preset.arguments | {"width": 8}, preset.flow_map).build())
    options = ("--preset", "cifar10", "--init", path, "--particles", "2")
    assert "init: expected width = 128 for the preset cifar10, got 8" in refused(*train(pixels, tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_augmentation_of_a_preset(pixels, small_cifar10, tmp_path) -> None:
    """A fresh network gets the layer for it; without it, or from a file that has none, it trains without."""
    small = ("--preset", "cifar10", "--particles", "2")

    def result(name: str, *options: str) -> tuple[int, float]:
        call(*train(pixels, tmp_path / name, *small, *options))
        flow_map = checkpoints.load(tmp_path / name / "snapshot-0000001.safetensors")
        settings = read_state(tmp_path / name)[1]["settings"]
        return flow_map.network.settings["augment_dim"], settings["config"]["augment"]

    assert result("paper") == (9, 0.12)
    assert result("other", "--augment", "0.5") == (9, 0.5)
    assert result("none", "--augment", "0") == (0, 0.0)
    for name, file, expected in (("from-none", "none", (0, 0.0)), ("from-paper", "paper", (9, 0.12))):
        assert result(name, "--init", tmp_path / file / "snapshot-0000001.safetensors") == expected
    told, untold = (str(tmp_path / name / "snapshot-0000001.safetensors") for name in ("paper", "none"))
    base = ("train", "--data", pixels, "--steps", "1", "--batch", "2", "--particles", "2", "--out", tmp_path / "tuned")
    refusal = refused(*base, "--init", untold, "--augment", "0.1")
    assert "augment: expected a network that is conditioned on it (DDPMpp with augment_dim = 9), got DDPMpp with 0" in refusal
    call(*base, "--init", told, "--augment", "0.1")
    refusal = refused(*base[:-1], tmp_path / "refused", "--augment", "0.1")
    assert "got UNet with 0" in refusal
    assert not (tmp_path / "refused").exists()


def test_help_lists_every_preset() -> None:
    words = said("train", "--help").replace(",", " ").split()
    joined = "".join(words)  # a name may be broken at its dash
    assert all(name in joined for name in PRESETS)


def test_refusals(pixels, tmp_path) -> None:
    for options, *texts in (
        (["--preset=cifar"], "is not one of 'cifar10'"),
        (["--preset=cifar10", "--size=S"], "size: expected no such option beside --preset=cifar10"),
        (["--preset=cifar10", "--network=unet"], "whose network is DDPMpp with width, dropout, got unet"),
        (["--preset=dit-s-2"], "data: expected latents of 4 channels and 32x32 for the preset dit-s-2", "got [3, 32, 32]"),
        (["--preset=cifar10", "--resolution=16"], "(--resolution=32 resizes), got [3, 16, 16]"),
    ):
        line = refused(*train(pixels, tmp_path / "run", *options))
        assert all(text in line for text in texts)
    assert not (tmp_path / "run").exists()


def test_labels_are_checked_before_the_network_is_made() -> None:
    from imm.cli.train import _check_fit
    from imm.data import ImageData

    images = torch.zeros(2, 4, 32, 32)
    preset = PRESETS["imagenet256-s-a1"]
    assert DiT.__name__ == preset.network
    _check_fit("x", preset, ImageData(images, torch.tensor([0, 999]), 1000, "here"))
    for labels, classes in ((None, 0), (torch.tensor([0, 1000]), 1001)):
        with pytest.raises(ValueError, match=rf"expected labels of at most 1000 classes for x, got {classes} \(here\)"):
            _check_fit("x", preset, ImageData(images, labels, classes, "here"))
