"""Checkpoints: round trips, atomicity, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
from unittest.mock import Mock

import parity
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import imm
from imm import FlowMap, checkpoints
from imm.checkpoints import CheckpointError, from_published
from imm.networks import DiT, UNet


def test_round_trip(small_flow_map, tmp_path) -> None:
    flow_map = FlowMap(small_flow_map.network, parametrization="simple_edm", second_time="identity", t_min=0.006, t_max=0.99)
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, flow_map, extra={"note": "x"})
    loaded = imm.load(path)
    assert not loaded.training
    assert loaded.settings == flow_map.settings
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x, 0.8, 0.1, torch.tensor([0, 2])), flow_map(x, 0.8, 0.1, torch.tensor([0, 2])))
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert checkpoints.read_file(path, "flow_map")[1]["extra"] == {"note": "x"}


def test_dtype_and_compiled_networks_survive(small_unet, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    for network in (small_unet.bfloat16(), torch.compile(small_unet)):
        checkpoints.save(path, FlowMap(network))
        loaded = checkpoints.load(path)
        assert type(loaded.network) is UNet
        assert loaded.network_dtype == torch.bfloat16


def test_what_a_killed_write_left_is_overwritten(small_flow_map, tmp_path) -> None:
    (tmp_path / ".a.safetensors.part").write_bytes(b"half")
    checkpoints.save(tmp_path / "a.safetensors", small_flow_map)
    assert os.listdir(tmp_path) == ["a.safetensors"]


class Own(nn.Module):
    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, t, s, labels):
        return self.layer(x)


def test_a_network_of_ones_own(tmp_path) -> None:
    flow_map, path = FlowMap(Own()), tmp_path / "own.safetensors"
    checkpoints.save(path, flow_map)
    with pytest.raises(CheckpointError, match="or the argument network=, got 'custom'"):
        checkpoints.load(path)
    loaded = checkpoints.load(path, network=Own())
    assert torch.equal(loaded.network.layer.weight, flow_map.network.layer.weight)
    with pytest.raises(CheckpointError, match="names do not fit"):
        checkpoints.load(path, network=_named())


def _named() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4))
    module.num_classes = 0
    return module


def test_wrong_files(small_flow_map, tmp_path) -> None:
    good = tmp_path / "good.safetensors"
    checkpoints.save(good, small_flow_map)
    data = good.read_bytes()

    def wrong(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load(path)
        message = str(caught.value)
        assert name in message
        assert "\n" not in message
        return message

    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        assert "expected a whole safetensors file" in wrong("cut.safetensors", data[:length])
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.pt")
    for content in (pickle.dumps({"a": 1}), (tmp_path / "zip.pt").read_bytes()):
        assert "expected a whole safetensors file, got a pickle; imm import" in wrong("net.pkl", content)
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    assert "without its settings" in wrong("foreign.safetensors", (tmp_path / "foreign.safetensors").read_bytes())

    tensors, settings = checkpoints.read_file(good, "flow_map")

    def rewritten(**changes) -> str:
        metadata = {"imm": json.dumps({**settings, **changes})}
        save_file(tensors, tmp_path / "t.safetensors", metadata=metadata)
        return wrong("changed.safetensors", (tmp_path / "t.safetensors").read_bytes())

    assert "expected format version 1 or older, got 99" in rewritten(format_version=99)
    assert "expected a checkpoint of kind 'flow_map', got 'other'" in rewritten(kind="other")
    assert "expected one of ['DDPMpp', 'DiT', 'TokenHead', 'TokenModel', 'UNet']" in rewritten(network={"name": "os.system"})
    assert "expected the settings of a flow map" in rewritten(flow_map={"schedule": "none"})
    assert "expected the settings of a flow map" in rewritten(network={"name": "UNet", "depth": 3})
    assert "names do not fit" in rewritten(network={**settings["network"], "blocks": 2})
    assert "expected [" in rewritten(network={**settings["network"], "num_classes": 4})
    # Sizes that no memory holds are refused before there is any.
    unet, dit = settings["network"], {"name": "DiT", "size": "XL", "patch": 1, "channels": 4, "num_classes": 10}
    huge = [{**unet, **sizes} for sizes in ({"width": 4 * 10**5}, {"width": 4 * 10**11}, {"blocks": 10**9})]
    huge += [{**unet, "multipliers": [1] * 10**6}, {**dit, "resolution": 10**6}, {**dit, "resolution": 2**40}]
    for network in (*huge, {**dit, "resolution": 8, "num_classes": 10**12}):
        message = rewritten(network=network)
        assert re.search("expected \\[|names do not fit|expected the settings of a flow map", message), message
    save_file(tensors, tmp_path / "t.safetensors", metadata={"imm": "{not json"})
    assert "readable settings" in wrong("json.safetensors", (tmp_path / "t.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="expected a checkpoint file, found none"):
        checkpoints.load(tmp_path / "absent.safetensors")


def test_only_what_shares_memory_is_copied(tmp_path, monkeypatch) -> None:
    whole, wide = torch.randn(3, 4), torch.randn(6, 4)
    tensors = {"whole": whole, "again": whole, "view": whole.view(12), "part": wide[2:4], "turned": wide.t(), "empty": wide[:0]}
    seen: dict[str, torch.Tensor] = {}
    monkeypatch.setattr("imm.checkpoints.format.save_file", lambda t, *args, **kw: seen.update(t) or save_file(t, *args, **kw))
    checkpoints.write_file(tmp_path / "a.safetensors", tensors, {"kind": "x"})
    assert seen["whole"].data_ptr() == whole.data_ptr()
    assert len({t.untyped_storage().data_ptr() for t in seen.values() if t.numel()}) == 5
    loaded, _ = checkpoints.read_file(tmp_path / "a.safetensors", "x")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_failed_write_leaves_the_old_file(small_flow_map, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, small_flow_map)
    before = path.read_bytes()

    monkeypatch.setattr("imm.checkpoints.format.save_file", Mock(side_effect=OSError("disk full")))
    with pytest.raises(CheckpointError, match="disk full"):
        checkpoints.save(path, small_flow_map)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


SETTINGS = parity.published_settings(parity.case("dit_s_2_stride_1step")[1])


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    return {f"model.{name}": value for name, value in DiT("S", 2).state_dict().items()}


def test_from_published(published) -> None:
    flow_map = from_published(published, {**SETTINGS, "unknown_attribute": 3})
    assert (flow_map.second_time, flow_map.t_max, flow_map.num_classes) == ("stride", 0.994, 1000)
    without = {name: value for name, value in published.items() if name != "model.pos_embed"}
    assert torch.equal(from_published(without, SETTINGS).network.pos_embed, published["model.pos_embed"])


def test_from_published_refuses_what_does_not_fit(published) -> None:
    missing = {k: v for k, v in published.items() if k != "model.blocks.3.attn.qkv.bias"}
    cases = [
        (missing, SETTINGS, r"missing \['blocks.3.attn.qkv.bias'\], unknown \[\]"),
        ({**published, "model.extra": torch.zeros(1)}, SETTINGS, r"unknown \['extra'\]"),
        ({**published, "ema.x": torch.zeros(1)}, SETTINGS, r"prefix 'model.', got \['ema.x'\]"),
        (published, {**SETTINGS, "noise_schedule": "ve"}, "unknown schedule 've'"),
        (published, {k: v for k, v in SETTINGS.items() if k != "temb_type"}, r"expected \['temb_type'\]"),
    ]
    for state, settings, text in cases:
        with pytest.raises(CheckpointError, match=text):
            from_published(state, settings)
