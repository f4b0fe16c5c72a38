"""Others' two-time networks: tiny random ones of diffusers, sampled here and by diffusers' own loop; checkpoints on a hub."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import spread
from torch import Tensor

import imm
from imm.checkpoints import CheckpointError, model_card, push_to_hub

diffusers = pytest.importorskip("diffusers")
from_two_time = pytest.importorskip("imm.integrations.two_time")

PROMPTS, WORDS = 2, 3


def hunyuan() -> tuple[Any, tuple[int, ...], dict[str, Tensor]]:
    """A HunyuanImage transformer with a second time, the shape of its latents, conditions of two prompts and "none"."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "rope_axes_dim": (8, 8)}
    layers = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    network = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, patch_size=(1, 1), text_embed_dim=12, use_meanflow=True, **heads, **layers
    )
    texts = torch.randn(PROMPTS + 1, WORDS, 12)
    masks = torch.ones(PROMPTS + 1, WORDS, dtype=torch.int64)
    return network, (4, 6, 6), {"encoder_hidden_states": texts, "encoder_attention_mask": masks}


def anyflow() -> tuple[Any, tuple[int, ...], dict[str, Tensor]]:
    """An AnyFlow transformer of videos ``[F, C, H, W]``."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32}
    network = diffusers.AnyFlowTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=12, freq_dim=16, num_layers=1, rope_max_seq_len=32, **heads
    )
    return network, (3, 4, 4, 4), {"encoder_hidden_states": torch.randn(PROMPTS + 1, WORDS, 12)}


def diffusers_loop(
    network: Any, scheduler: Any, x: Tensor, given: dict[str, Tensor], labels: Tensor, w: float | None, steps: int
) -> Tensor:
    """Diffusers' own pipelines' loop, written with its scheduler."""
    scheduler.set_timesteps(steps)
    video = isinstance(network, diffusers.AnyFlowTransformer3DModel)
    second = "r_timestep" if video else "timestep_r"
    with torch.no_grad():
        for index, t in enumerate(scheduler.timesteps):
            r = scheduler.timesteps[index + 1] if index + 1 < steps else torch.zeros((), dtype=torch.float64)
            outputs = []
            for rows in (labels, torch.full_like(labels, PROMPTS)):
                times = {name: time.to(x.dtype).expand(len(x)) for name, time in (("timestep", t), (second, r))}
                if video:
                    times = {name: time[:, None].expand(-1, x.shape[1]) for name, time in times.items()}
                chosen = {name: condition[rows] for name, condition in given.items()}
                outputs.append(network(hidden_states=x, return_dict=False, **times, **chosen)[0])
            u = outputs[0] if w is None else outputs[1] + w * (outputs[0] - outputs[1])
            x = scheduler.step(u, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("make", [hunyuan, anyflow])
@pytest.mark.parametrize(("steps", "shift", "guidance"), [(1, 1.0, None), (4, 5.0, 2.5)])
def test_a_two_time_transformer_samples_as_in_diffusers(make, steps, shift, guidance) -> None:
    torch.manual_seed(0)
    network, shape, conditions = make()
    spread(network, 0.2).eval()
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=shift)
    flow_map = from_two_time.flow_map(network, scheduler, shape, conditions)
    sampler = imm.Sampler(flow_map, steps=steps, shape=shape, guidance=guidance, **from_two_time.grid(scheduler, steps))
    x, labels = torch.randn(2, *shape), torch.tensor([1, 0])
    ours = sampler.sample([0, 1], labels, x=x)
    theirs = diffusers_loop(network, scheduler, x, conditions, labels, guidance, steps)
    assert float((theirs - x).abs().max()) > 0.1  # it goes somewhere
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    others = sampler.sample([0, 1], labels.flip(0), x=x)
    assert not torch.allclose(others, ours, atol=1e-3)  # the prompt is seen


def test_refusals() -> None:
    network, shape, conditions = hunyuan()
    scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="expected a FlowMapEulerDiscreteScheduler or its config, got DDIMScheduler"):
        from_two_time.flow_map(network, diffusers.DDIMScheduler(), shape, conditions)
    with pytest.raises(ValueError, match="expected one that takes timestep_r or r_timestep, got Linear"):
        from_two_time.flow_map(torch.nn.Linear(1, 1), scheduler, shape, conditions)
    with pytest.raises(ValueError, match="conditions: expected as many rows of each"):
        from_two_time.flow_map(network, scheduler, shape, {**conditions, "encoder_attention_mask": torch.ones(1, WORDS)})


def test_our_pipeline_loads_with_diffusers_own_class(tmp_path) -> None:
    from imm.integrations.diffusers import IMMPipeline

    flow_map = imm.FlowMap(spread(imm.networks.UNet(channels=3, resolution=8, num_classes=3, width=8))).eval()
    IMMPipeline.from_flow_map(flow_map).save_pretrained(tmp_path / "net")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "net")
    assert isinstance(pipeline, IMMPipeline)
    images = pipeline(class_labels=[0, 1], num_inference_steps=2, seeds=[3, 4], output_type="pt").images
    expected = IMMPipeline.from_flow_map(flow_map)(
        class_labels=[0, 1], num_inference_steps=2, seeds=[3, 4], output_type="pt"
    ).images
    assert torch.equal(torch.as_tensor(images), torch.as_tensor(expected))


# A hub ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in the place of the hub: ``USER/REPO/FILE``."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    root = tmp_path / "hub"

    def download(repository: str, file: str, revision: str | None = None) -> str:
        path = root / repository / file
        if not path.is_file() or revision not in (None, "main"):
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {repository}/{file}\nmore")
        return str(path)

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            (root / repository).mkdir(parents=True, exist_ok=exist_ok)

        def create_commit(self, repository: str, operations: Any, commit_message: str) -> Any:
            for one in operations:
                content = one.path_or_fileobj
                content = content if isinstance(content, bytes) else Path(content).read_bytes()
                (root / repository / one.path_in_repo).write_bytes(content)
            return SimpleNamespace(commit_url=f"https://hub/{repository}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return root


@pytest.fixture
def net(tmp_path) -> Path:
    path = tmp_path / "digits.safetensors"
    flow_map = imm.FlowMap(spread(imm.networks.UNet(channels=1, resolution=8, num_classes=3, width=8)))
    imm.checkpoints.save(path, flow_map, extra={"loss": "imm", "step": 7})
    return path


def test_a_checkpoint_goes_to_the_hub_and_comes_back(hub, net, tmp_path) -> None:
    scores = {"metrics": {"mmd-pixels": 0.25, "label-match": {"spread": 0.5}}, "protocol": {"images": {"count": 10}}}
    assert push_to_hub(net, "you/digits", scores=scores) == "https://hub/you/digits"
    card = (hub / "you" / "digits" / "README.md").read_text()
    for text in (
        'imm.load("hf://you/digits")',
        "| mmd-pixels | 0.25 |",
        "| label-match.spread | 0.5 |",
        '"step": 7',
        '"count": 10',
        "UNet",
    ):
        assert text in card
    for name in ("hf://you/digits", "hf://you/digits@main", "hf://you/digits/net.safetensors"):
        loaded = imm.load(name)
        for ours, theirs in zip(loaded.parameters(), imm.load(net).parameters(), strict=True):
            assert torch.equal(ours, theirs)
    from command_line import call, refused

    call("sample", "--net=hf://you/digits", "--seeds=0-1", f"--out={tmp_path / 'out'}")
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["net"]["name"] == "net.safetensors"
    assert "hf://you/none: 404: you/none/net.safetensors" in refused("sample", "--net=hf://you/none", "--seeds=0", "--out=x")


def test_names_that_the_hub_does_not_have_are_refused(hub) -> None:
    with pytest.raises(CheckpointError, match="hf://you/none"):
        imm.load("hf://you/none")
    with pytest.raises(ValueError, match="expected hf://USER/REPO"):
        imm.load("hf://you")
    with pytest.raises(ValueError, match="expected hf://USER/REPO"):
        imm.load("hf://you/net/weights.pkl")


def test_a_model_card_needs_a_checkpoint(tmp_path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError):
        model_card(tmp_path / "x.safetensors")


def test_without_huggingface_hub() -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; import imm; imm.load('hf://a/b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'pip install "imm-kernels[hub]"' in done.stderr
