"""Published networks: an imported snapshot is the network that was published, with its settings and its samples."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import parity
import pytest
import torch
from published_files import (
    New,
    Persistent,
    ddpmpp_snapshot,
    flow_map_snapshot,
    module,
    precond,
    written,
)
from test_import import refusal

from imm import FlowMap, Sampler, checkpoints, sampling, unpickling
from imm.checkpoints import CheckpointError, from_published, import_published, read_published
from imm.networks import DiT, dit


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_an_imported_file_is_the_network_that_was_published(protocol, small_dit, tmp_path) -> None:
    tree = flow_map_snapshot(small_dit, "DiT_T_4", mixed_precision=torch.float16)
    source, dest = written(tmp_path / "a.pkl", tree, protocol), tmp_path / "a.safetensors"
    imported = import_published(source, dest)
    loaded = checkpoints.load(dest)
    seeds, labels = [3, 4], torch.tensor([0, 4])
    x = torch.randn(2, 4, 8, 8)
    image = Sampler(small_dit, steps=2, guidance=1.5).sample(seeds, labels)
    assert float(image.std()) > 0.1
    for other in (imported, loaded):
        assert other.settings == small_dit.settings
        assert not other.training
        assert torch.equal(other(x, 0.8, 0.1, labels), small_dit(x, 0.8, 0.1, labels))
        assert torch.equal(Sampler(other, steps=2, guidance=1.5).sample(seeds, labels), image)
    assert "IMM_TEST_RAN" not in os.environ
    assert sorted(os.listdir(tmp_path)) == ["a.pkl", "a.safetensors"]
    digest = subprocess.run(["sha256sum", source], capture_output=True, text=True, check=True).stdout.split()[0]
    extra = checkpoints.read_file(dest, "flow_map")[1]["extra"]
    assert extra == {"source": {"name": "a.pkl", "sha256": digest, "mixed_precision": "float16"}}


def test_the_settings_and_the_state_of_a_file(small_dit, tmp_path) -> None:
    tree = flow_map_snapshot(small_dit, "DiT_T_4", mixed_precision=torch.bfloat16, T=np.float64(0.97), use_x=np.bool_(True))
    state, settings = read_published(written(tmp_path / "a.pkl", tree))
    expected = {f"model.{name}": tensor for name, tensor in small_dit.network.state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    found = {name: settings[name] for name in ("model_type", "s_embed", "mixed_precision", "T", "use_x", "class_name")}
    assert found == {
        "model_type": "DiT_T_4",
        "s_embed": True,
        "mixed_precision": torch.bfloat16,
        "T": 0.97,
        "use_x": True,
        "class_name": "Precond",
    }


def test_a_file_of_the_published_size_in_names(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(dit.SIZES, "XL", (16, 28, 2))
    path = written(tmp_path / "a.pkl", flow_map_snapshot(FlowMap(DiT("XL", 2)), "DiT_XL_2"))
    state, _ = read_published(path)
    assert state.keys() == parity.names("state_dict_dit_xl_2.txt").keys()
    _, text, *_ = unpickling.answer(path.open("rb"), memoryview(path.read_bytes()), ["ema"])
    assert len(text) < unpickling.MAX_ANSWER / 4


def test_the_second_time_can_be_overridden(small_dit, tmp_path) -> None:
    source = written(tmp_path / "a.pkl", flow_map_snapshot(small_dit, "DiT_T_4"))
    assert import_published(source, tmp_path / "a.safetensors").second_time == "stride"
    assert import_published(source, tmp_path / "a.safetensors", second_time="identity").second_time == "identity"
    assert checkpoints.load(tmp_path / "a.safetensors").second_time == "identity"
    with pytest.raises(ValueError, match=r"second_time: expected one of \['stride', 'identity', 'none'\], got 's'"):
        import_published(source, tmp_path / "b.safetensors", second_time="s")
    for wrong in (source, tmp_path, tmp_path / "no" / "a.safetensors"):
        with pytest.raises(CheckpointError, match="out: expected another file"):
            import_published(source, wrong)


@pytest.mark.parametrize(
    "name",
    [
        "dit_s_4_identity_2step_nocfg",
        pytest.param("dit_s_2_stride_1step", marks=pytest.mark.full),
        pytest.param("dit_s_2_stride_4step", marks=pytest.mark.full),
    ],
)
def test_parity_with_recorded_samples(name, tmp_path) -> None:
    arrays, meta = parity.case(name)
    network = DiT("S", int(meta["network"][-1]))
    for key, tensor in network.named_parameters():
        tensor.data = parity.weight(f"model.{key}", tuple(tensor.shape))
    settings = parity.published_settings(meta)
    tree = {"ema": precond(module(network), settings, {"model_type": settings.pop("model_type")})}
    flow_map = import_published(written(tmp_path / "a.pkl", tree), tmp_path / "a.safetensors")
    x, labels = torch.from_numpy(arrays["x_T"]), torch.tensor(meta["labels"])
    grid = sampling.time_grid(flow_map, meta["num_steps"], meta["discretization"])
    out = sampling.pushforward(flow_map, x, grid, labels, meta["cfg_scale"], torch.float64)
    assert parity.relative(out, arrays["samples"]) < 1e-4


def test_parity_of_the_published_unet_with_recorded_samples(tmp_path) -> None:
    arrays, meta = parity.case("ddpmpp_cifar_1step")
    settings = parity.published_settings(meta)
    names = parity.names("state_dict_ddpmpp_cifar10.txt")
    state = {name: parity.weight(name, shape) for name, shape in names.items() if "resample" not in name}
    network = from_published(state, settings).network
    tree = {"ema": precond(module(network, persistent=True), settings, {"model_type": settings.pop("model_type")})}
    flow_map = import_published(written(tmp_path / "a.pkl", tree), tmp_path / "a.safetensors")
    out = sampling.pushforward(flow_map, torch.from_numpy(arrays["x_T"]), sampling.time_grid(flow_map, 1), dtype=torch.float64)
    assert parity.relative(out, arrays["samples"]) < 1e-4


def test_a_unet_whose_layers_are_persistent_objects(small_ddpmpp, tmp_path) -> None:
    imported = import_published(written(tmp_path / "a.pkl", ddpmpp_snapshot(small_ddpmpp)), tmp_path / "a.safetensors")
    expected = Sampler(small_ddpmpp, steps=1).sample([4, 5])
    for other in (imported, checkpoints.load(tmp_path / "a.safetensors")):
        assert torch.equal(Sampler(other, steps=1).sample([4, 5]), expected)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"channel_mult": [10**30]}, "settings: "),
        ({"channel_mult": [1.5, 2.0]}, "settings: "),
        ({"channel_mult": [1] * 100_000}, "names do not fit the network"),
        (
            {"attn_resolutions": list(range(10**9, 10**9 + 100_000)), "channel_mult": [1] * 100_000},
            "names do not fit the network",
        ),
        ({"attn_resolutions": 5}, "settings: "),
        ({"num_blocks": 64}, "names do not fit the network"),
        ({"num_blocks": 10**9}, "num_blocks: expected 0..64, got 1000000000"),
        ({"augment_dim": 10**30}, "settings: "),
        ({"augment_dim": 10**15}, "missing ['map_augment.weight']"),
        ({"dropout": float("nan")}, "dropout: expected 0..1, got nan"),
        ({"resample_filter": ["x" * 100] * 900}, "resample_filter: expected [1, 1], as DDPM++ has it, got ['xxx"),
    ],
)
def test_keywords_that_lie(keywords, text, small_ddpmpp, tmp_path) -> None:
    assert text in refusal(tmp_path / "a.pkl", ddpmpp_snapshot(small_ddpmpp, **keywords))


def test_a_snapshot_of_another_network_is_read_and_not_imported(small_unet, tmp_path) -> None:
    small_unet.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))
    attributes = {"img_resolution": 8, "use_fp16": False, "sigma_max": float("inf"), "sigma_data": np.float64(0.5)}
    keywords = {
        "model_type": "SongUNet",
        "channel_mult": [1, 2],
        "label_dim": np.int64(3),
        "nested": New("dnnlib.util.EasyDict", None, {"a": 1}),
    }
    tree = {
        "ema": precond(module(small_unet, persistent=True), attributes, keywords, "EDMPrecond"),
        "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "sigma": np.float32(0.5)}),
        "augment_pipe": Persistent("AugmentPipe", {"_buffers": {"Hz": torch.ones(3, 3, dtype=torch.float64)}, "xflip": 1e8}),
        "dataset_kwargs": New("dnnlib.util.EasyDict", None, {"class_name": "training.dataset.ImageFolderDataset", "n": None}),
    }
    state, settings = read_published(written(tmp_path / "a.pkl", tree))
    expected = small_unet.state_dict()
    assert state.keys() == {f"model.{name}" for name in expected}
    assert all(torch.equal(state[f"model.{name}"], tensor) for name, tensor in expected.items())
    assert (settings["channel_mult"], settings["label_dim"], settings["nested"]) == ([1, 2], 3, {"a": 1})
    assert (settings["class_name"], settings["sigma_max"], settings["sigma_data"]) == ("EDMPrecond", float("inf"), 0.5)
    assert "expected an IMM network, which takes a second time, got EDMPrecond without" in refusal(tmp_path / "a.pkl", tree)
