"""Published snapshots: read without running anything, imported to the same numbers, and hostile files refused in one line."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import parity
import published_files as files
import pytest
import torch
from published_files import Call, New, Persistent
from test_cli import call, refused

from imm import FlowMap, Sampler, checkpoints, sampling
from imm.networks import DDPMpp, DiT, dit


@pytest.fixture
def flow_map(monkeypatch: pytest.MonkeyPatch) -> FlowMap:
    """A DiT of a few weights, none of them zero."""
    monkeypatch.setitem(dit.SIZES, "tiny", (16, 1, 2))
    torch.manual_seed(0)
    made = FlowMap(DiT("tiny", 4, channels=1, resolution=8, num_classes=2), second_time="identity")
    for parameter in made.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def write(path: Path, tree: Any, protocol: int = 4) -> Path:
    path.write_bytes(files.dumps(tree, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_round_trip_is_bit_for_bit(protocol, flow_map, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("IMM_TEST_RAN", raising=False)
    tree = files.flow_map_snapshot(flow_map, "DiT_tiny_4", mixed_precision=torch.float16)
    source = write(tmp_path / "published.pkl", tree, protocol)
    dest = tmp_path / "ours.safetensors"
    imported = checkpoints.import_published(source, dest)
    assert "IMM_TEST_RAN" not in os.environ  # what module_src would have done
    assert "torch_utils" not in sys.modules
    loaded = checkpoints.load(dest)
    assert loaded.settings == imported.settings == flow_map.settings
    seeds, labels = [1, 2, 3], [0, 1, 2]
    expected = Sampler(flow_map, steps=2, guidance=1.5).sample(seeds, labels)
    for other in (imported, loaded):
        assert torch.equal(Sampler(other, steps=2, guidance=1.5).sample(seeds, labels), expected)
    found = checkpoints.format.read_settings(dest, "flow_map")["extra"]["source"]
    assert found["name"] == "published.pkl"
    assert len(found["sha256"]) == 64
    assert found["mixed_precision"] == "float16"


def test_the_second_time_can_be_given(flow_map, tmp_path) -> None:
    source = write(tmp_path / "published.pkl", files.flow_map_snapshot(flow_map, "DiT_tiny_4", temb_type="stride"))
    assert checkpoints.import_published(source, tmp_path / "a.safetensors").settings["second_time"] == "stride"
    given = checkpoints.import_published(source, tmp_path / "b.safetensors", second_time="identity")
    assert given.settings["second_time"] == "identity"
    with pytest.raises(ValueError, match="second_time"):
        checkpoints.import_published(source, tmp_path / "c.safetensors", second_time="late")


def test_a_unet_with_persistent_layers(tmp_path) -> None:
    torch.manual_seed(0)
    network = DDPMpp(
        channels=3, resolution=8, num_classes=0, width=32, multipliers=(1, 2), blocks=1, attention=(4,), augment_dim=0
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    made = FlowMap(network.eval(), parametrization="simple_edm")
    tree = files.flow_map_snapshot(made, "SongUNet")
    keywords = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 0}
    attributes = dict(tree["ema"].call.args[0]["state"])
    given = {**attributes["_init_kwargs"], **keywords, "dropout": network.settings["dropout"]}
    settings = {name: value for name, value in attributes.items() if not name.startswith("_")}
    tree = {"ema": files.precond(files.module(network, persistent=True), settings, given), "augment_pipe": None}
    imported = checkpoints.import_published(write(tmp_path / "unet.pkl", tree), tmp_path / "unet.safetensors")
    expected = Sampler(made, steps=1).sample([4, 5])
    assert torch.equal(Sampler(imported, steps=1).sample([4, 5]), expected)


@pytest.mark.parametrize("name", ["dit_s_4_identity_2step_nocfg", "dit_s_2_stride_1step"])
def test_parity_through_an_imported_file(name, tmp_path) -> None:
    arrays, meta = parity.case(name)
    size, patch = meta["network"].split("_")[1:]
    network = DiT(size, int(patch), channels=4, resolution=32, num_classes=1000)
    weights = {k: parity.weight(f"model.{k}", v.shape) for k, v in network.state_dict().items() if "pos_embed" not in k}
    network.load_state_dict({**network.state_dict(), **weights})
    settings = parity.published_settings(meta)
    keywords = {"model_type": settings.pop("model_type")}
    tree = {"ema": files.precond(files.module(network), settings, keywords)}
    checkpoints.import_published(write(tmp_path / "parity.pkl", tree), tmp_path / "parity.safetensors")
    flow_map = checkpoints.load(tmp_path / "parity.safetensors")
    times = sampling.time_grid(flow_map, meta["num_steps"], meta["discretization"], meta["mid_eta"] or ())
    labels = torch.tensor(meta["labels"])
    x = torch.from_numpy(arrays["x_T"])
    guidance = meta["cfg_scale"] if meta["cfg_scale"] not in (None, 1.0) else None
    run = sampling.pushforward if "restart" not in meta["sampler"] else sampling.restart
    out = run(flow_map, x.float(), times, labels, guidance, dtype=torch.float64)
    assert parity.relative(out, arrays["samples"]) < 1e-4


def test_an_edm_snapshot_is_read_and_is_no_flow_map(tmp_path) -> None:
    layer = Persistent(
        "Linear", {**torch.nn.Module().__dict__, "_parameters": {"weight": torch.nn.Parameter(torch.ones(2, 3))}}
    )
    net = files.precond(layer, {"img_resolution": 32, "sigma_min": 0.002}, {"model_type": "SongUNet"}, "EDMPrecond")
    source = write(tmp_path / "edm.pkl", {"ema": net, "loss_fn": Persistent("EDMLoss", {"P_mean": -1.2}), "dataset_kwargs": {}})
    state, settings = checkpoints.read_published(source)
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"model.weight": [[1.0] * 3] * 2}
    assert settings == {
        "class_name": "EDMPrecond",
        "img_resolution": 32,
        "sigma_min": 0.002,
        "model_type": "SongUNet",
        "training": True,
    }
    with pytest.raises(checkpoints.CheckpointError, match="expected an IMM network, which takes a second time, got EDMPrecond"):
        checkpoints.import_published(source, tmp_path / "edm.safetensors")
    assert not (tmp_path / "edm.safetensors").exists()


DEEP: Any = None
for _ in range(100):
    DEEP = [DEEP]

HOSTILE = {
    "os.system": Call("os.system", "touch ran"),
    "posix.system": Call("posix.system", "touch ran"),
    "builtins.eval": Call("builtins.eval", "open('ran', 'w')"),
    "builtins.getattr": Call("builtins.getattr", {}, "pop"),
    "builtins.__import__": Call("builtins.__import__", "os"),
    "operator.attrgetter": Call("operator.attrgetter", "system"),
    "copyreg._reconstructor": Call("copyreg._reconstructor", 1, 2, 3),
    "subprocess.Popen": New("subprocess.Popen", {}),
    "torch.load": Call("torch.load", "x"),
    "numpy.load": Call("numpy.load", "x"),
    "torch_utils.persistence.import_hook": Call("torch_utils.persistence.import_hook", "x"),
    "torch.nn.modules.container.Sequential": Call("torch.nn.modules.container.Sequential", 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_global_is_named_and_not_called(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "bad.pkl", {"ema": HOSTILE[name]})
    line = refused("import", "--pkl", source, "--dest", tmp_path / "out.safetensors")
    assert name in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pkl"]


def storage(data: bytes) -> Call:
    return Call("torch.storage._load_from_bytes", data)


def one_number() -> bytes:
    """A storage of one float, as it lies in a snapshot."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a storage with a dtype is deprecated, and what a snapshot holds
        torch.save(torch.ones(1).storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def claimed(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> dict[str, Any]:
    """A network whose weight, in a storage of one number, says that it is of this shape."""
    weight = Call("torch._utils._rebuild_tensor_v2", storage(one_number()), offset, shape, stride, False, None)
    return {"ema": New("torch.nn.modules.linear.Linear", {"_parameters": {"weight": weight}})}


OTHER = {
    "a nested pickle in a storage": {"ema": storage(files.dumps(Call("os.system", "touch ran")))},
    "a huge tensor": claimed((2**40,), (1,)),
    "a huge tensor by strides": claimed((2**20, 2**20), (0, 0)),
    "a tensor outside its storage": claimed((1,), (1,), offset=1),
    "a negative offset": claimed((1,), (1,), offset=-1),
    "a dunder attribute": {"ema": New("torch.nn.modules.linear.Linear", {"__class__": 1})},
    "a setstate": {"ema": New("torch.nn.modules.linear.Linear", {"__setstate__": 1})},
    "attributes of a dict": {"ema": Call("collections.OrderedDict", state={"a": 1})},
    "no network": {"ema": {"_modules": {}}},
    "no ema": {"model": 1},
    "a list": [1, 2],
    "a deep list": {"ema": New("torch.nn.modules.linear.Linear", {"_modules": DEEP})},
    "a module that is a number": {"ema": New("torch.nn.modules.linear.Linear", {"_modules": {"a": 3}})},
}


def test_a_tensor_that_says_the_truth_is_read(tmp_path) -> None:
    source = write(tmp_path / "good.pkl", claimed((1, 1), (1, 1)))
    assert checkpoints.read_published(source)[0]["weight"].tolist() == [[1.0]]


@pytest.mark.parametrize("name", OTHER)
def test_a_malformed_tree_is_refused(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "bad.pkl", OTHER[name])
    refused("import", "--pkl", source, "--dest", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pkl"]


def laughs() -> bytes:
    """Lists that hold the one before ten times, by reference: 10^30 objects where they are walked."""
    out = b"\x80\x04]\x94"
    for level in range(30):
        out += b"]\x94(" + b"h" + bytes([level]) * 1 + (b"h" + bytes([level])) * 9 + b"e"
    return b"\x80\x04}\x8c\x03ema" + files.dumps(1)[2:0] + out[2:] + b"s."


RAW = {
    "empty": b"",
    "truncated": files.dumps({"ema": list(range(100))})[:-20],
    "a huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
    "a huge string": b"\x80\x04\x8d" + struct.pack("<Q", 2**50) + b".",
    "a cycle": b"\x80\x04}\x94\x8c\x03emah\x00s.",
    "protocol 0 code": b"cos\nsystem\n(S'touch ran'\ntR.",
    "an instance opcode": b"(iposix\nsystem\n.",
    "many references": laughs(),
    "deeply nested": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "text": b"not a pickle",
    "after the end": files.dumps({"ema": 1}) + b"more",
}


@pytest.mark.parametrize("name", RAW)
def test_a_malformed_file_is_refused(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(RAW[name])
    refused("import", "--pkl", tmp_path / "bad.pkl", "--dest", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pkl"]


def test_settings_that_no_network_has_are_refused(flow_map, tmp_path) -> None:
    for change, message in (
        ({"img_resolution": 10**9}, "img_resolution: expected"),
        ({"T": float("nan")}, "T: expected a finite number"),
        ({"f_type": "other"}, "f_type|parametrization|unknown"),
        ({"label_dim": 5}, "embedding_table"),
    ):
        source = write(tmp_path / "bad.pkl", files.flow_map_snapshot(flow_map, "DiT_tiny_4", **change))
        with pytest.raises(checkpoints.CheckpointError, match=message):
            checkpoints.import_published(source, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_command_line(flow_map, tmp_path) -> None:
    source = write(tmp_path / "published.pkl", files.flow_map_snapshot(flow_map, "DiT_tiny_4"))
    dest = tmp_path / "out.safetensors"
    output = call("import", "--pkl", source, "--dest", dest, "--second-time", "stride").output
    assert "network: DiT" in output
    assert "second_time stride" in output
    assert f"wrote {dest}" in output
    call("sample", "--net", dest, "--seeds", "0-3", "--outdir", tmp_path / "images")
    assert "found none" in refused("import", "--pkl", tmp_path / "absent.pkl", "--dest", dest)


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.full)])
def test_mutated_files_are_imported_or_refused_and_do_nothing_else(count, tmp_path) -> None:
    """In a process that ends at any audited event but reading the file and writing the destination."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / "fuzz_import.py"), str(tmp_path), str(count), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["files"] == counts["accepted"] + counts["refused"] == count
    assert counts["refused"] > count / 2
    assert counts["accepted"] > 0
