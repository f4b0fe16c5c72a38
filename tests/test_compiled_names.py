"""Names of weights are those of the network, whatever of it torch.compile wrapped: in snapshots, states and folders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from imm import FlowMap, IMMObjective, checkpoints
from imm.checkpoints import CheckpointError
from imm.checkpoints.format import describe, load_state, write_file
from imm.data import ImageData
from imm.networks import DiT, UNet
from imm.training import TrainConfig, Trainer
from imm.weights import own_names, plain_names, unwrapped


@pytest.fixture(autouse=True)
def _names_alone() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def wrapped(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def twice(network: nn.Module) -> nn.Module:
    network.t_embedder = wrapped(network.t_embedder)
    return wrapped(network)


def part(network: nn.Module) -> nn.Module:
    network.t_embedder.mlp[0] = wrapped(network.t_embedder.mlp[0])
    return network


def in_place(network: nn.Module) -> nn.Module:
    network.compile(backend="eager")
    return network


def none(network: nn.Module) -> nn.Module:
    return network


FORMS: list[Callable[[nn.Module], nn.Module]] = [none, wrapped, twice, part, in_place]


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(channels=1, resolution=8, num_classes=0, width=8)


def train(network: nn.Module, folder: Path, steps: int) -> None:
    data = ImageData(torch.randint(0, 256, (8, 1, 8, 8), generator=torch.manual_seed(1)).byte(), None, 0, "x")
    trainer = Trainer(IMMObjective(FlowMap(network)), data, folder, TrainConfig(batch=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.run(steps)
    trainer.close()


def test_names() -> None:
    state = {"_orig_mod.a._orig_mod.b": 1, "a._orig_mod_.c": 2, "_orig_mod": 3}
    assert plain_names(state) == {"a.b": 1, "a._orig_mod_.c": 2, "": 3}
    network = twice(unet())
    names = nn.Module.state_dict(network).keys()
    assert own_names(network, plain_names(dict.fromkeys(names, 0))).keys() == names
    assert type(unwrapped(network)) is UNet


@pytest.mark.parametrize("form", [twice, *(pytest.param(f, marks=pytest.mark.full) for f in (wrapped, part, in_place))])
def test_runs_follow_each_other(form, tmp_path) -> None:
    """A compiled run goes on as a plain one, and a plain one compiled; the files are those of a plain run."""
    for first, second, folder in ((form, none, tmp_path / "a"), (none, form, tmp_path / "b"), (none, none, tmp_path / "c")):
        train(first(unet()), folder, 1)
        train(second(unet()), folder, 2)
    files = sorted(path.relative_to(tmp_path / "c") for path in (tmp_path / "c").rglob("*.safetensors"))
    plain = {path: load_file(tmp_path / "c" / path) for path in files}
    assert [path.parts[0] for path in files] == ["snapshot-0000002.safetensors", "training-state-0000002"]
    for other in ("a", "b"):
        for name, tensors in plain.items():
            found = load_file(tmp_path / other / name)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert type(checkpoints.load(tmp_path / "a" / "snapshot-0000002.safetensors").network) is UNet


@pytest.mark.parametrize("form", FORMS)
def test_snapshots_of_earlier_versions_load(form, tmp_path) -> None:
    """Their names may be torch.compile's."""
    network, path = form(unet()).eval(), tmp_path / "a.safetensors"
    write_file(path, network.state_dict(), {"kind": "flow_map", **describe(FlowMap(network)), "extra": {}})
    for other in (checkpoints.load(path).network, checkpoints.load(path, network=part(unet())).network):
        assert torch.equal(next(other.parameters()), next(network.parameters()))
    with pytest.raises(CheckpointError, match=r"names do not fit the network: missing \['odd'\]"):
        load_state(nn.ParameterDict({"odd": nn.Parameter(torch.ones(1))}), {}, "x")


@pytest.mark.parametrize("name", ["small_ddpmpp", "small_dit"])
def test_one_block_compiled(name, request, tmp_path) -> None:
    flow_map = request.getfixturevalue(name)
    network = flow_map.network
    x, labels = torch.randn(2, *flow_map.image_shape), None if not flow_map.num_classes else torch.tensor([0, 1])
    expected = flow_map(x, 0.8, 0.2, labels).detach()
    if isinstance(network, DiT):
        network.blocks[0] = wrapped(network.blocks[0])
    else:
        for name in ("8x8_block0", "4x4_down"):
            network.enc[name] = wrapped(network.enc[name])
        network.dec["8x8_up"] = wrapped(network.dec["8x8_up"])
        network.dec["8x8_aux_norm"] = wrapped(network.dec["8x8_aux_norm"])
    torch.testing.assert_close(flow_map(x, 0.8, 0.2, labels), expected)
    checkpoints.save(tmp_path / "a.safetensors", flow_map)
    torch.testing.assert_close(checkpoints.load(tmp_path / "a.safetensors")(x, 0.8, 0.2, labels), expected)


def test_folders_of_diffusers(small_flow_map, tmp_path) -> None:
    pytest.importorskip("diffusers")
    from imm.integrations.diffusers import IMMNetwork, IMMPipeline

    pipeline = IMMPipeline.from_flow_map(small_flow_map)
    expected = small_flow_map.network.state_dict()
    network = pipeline.network
    network.net.t_embedder = wrapped(network.net.t_embedder)
    network.load_state_dict(network.state_dict())
    pipeline.network = wrapped(network)
    assert pipeline.flow_map.network is network.net
    pipeline.save_pretrained(tmp_path)
    loaded = IMMNetwork.from_pretrained(tmp_path / "network").net.state_dict()
    assert loaded.keys() == plain_names(expected).keys()
    network.load_state_dict({f"net.{name}": torch.zeros_like(value) for name, value in loaded.items()})
    assert not any(parameter.any() for parameter in network.parameters())
