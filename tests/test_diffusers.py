"""IMM in diffusers: the bits of imm.Sampler, folders without code, the scheduler's steps, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from safetensors.torch import load_file, save_file
from small import spread
from test_latents import tiny_vae

import imm
from imm import FlowMap, Sampler, latents, noise, sampling
from imm.networks import DiT, UNet
from imm.pictures import to_uint8

diffusers = pytest.importorskip("diffusers")

from imm.integrations.diffusers import IMMNetwork, IMMPipeline, IMMScheduler  # noqa: E402

SEEDS, LABELS = [3, 2**62, 0, 7], [0, 1, 3, 2]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def pipeline(small_flow_map) -> IMMPipeline:
    return quiet(IMMPipeline.from_flow_map(small_flow_map))


@pytest.fixture
def latent_flow_map(size_t) -> FlowMap:
    """A DiT on latents whose output is not 0."""
    return FlowMap(spread(DiT("T", patch=4, resolution=8, num_classes=3))).eval()


def quiet(pipeline: IMMPipeline) -> IMMPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# The same images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(("labels", "guidance"), [(None, None), (LABELS, None), (LABELS, 1.5), (LABELS, [0.0, 1.0, 2.0, 3.0])])
@pytest.mark.parametrize("grid", [{}, {"kind": "edm", "method": "restart"}, {"kind": "eta", "mid_eta": (4.0, 1.4)}])
def test_it_has_the_bits_of_the_sampler(grid, labels, guidance, stepwise, small_flow_map) -> None:
    guidance = torch.tensor(guidance) if isinstance(guidance, list) else guidance
    expected = Sampler(small_flow_map, steps=3, **grid).sample(SEEDS, labels, guidance)
    callback = (lambda *_: {}) if stepwise else None
    out = quiet(IMMPipeline.from_flow_map(small_flow_map, **grid))(
        labels, guidance, 3, seeds=SEEDS, output_type="latent", callback_on_step_end=callback
    )
    assert torch.equal(out.images, expected)


def test_a_dit_step_by_step(latent_flow_map) -> None:
    pipeline = quiet(IMMPipeline.from_flow_map(latent_flow_map))
    expected = Sampler(latent_flow_map, steps=2).sample(SEEDS, LABELS, 1.5)
    options = {"class_labels": LABELS, "guidance_scale": 1.5, "seeds": SEEDS, "output_type": "latent"}
    assert torch.equal(pipeline(**options).images, expected)
    stepped = pipeline(**options, callback_on_step_end=lambda *_: {}).images
    torch.testing.assert_close(stepped, expected, rtol=1e-5, atol=1e-5)


def test_the_images_of_imm_sample(small_flow_map, pipeline, tmp_path) -> None:
    imm.checkpoints.save(tmp_path / "net.safetensors", small_flow_map)
    options = ("--seeds=0-4", "--labels=0,1", "--cfg=1.5", "--batch=3", "--device=cpu")
    call("sample", "--net", tmp_path / "net.safetensors", "--out", tmp_path, *options)
    images = pipeline([0, 1, 0, 1, 0], 1.5, seeds=range(5), rows=3).images
    for seed, image in enumerate(images):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / f"{seed:06d}.png")))


def test_generators_draw_the_seeds(pipeline, small_flow_map) -> None:
    one = lambda seed=5: torch.Generator().manual_seed(seed)
    several = pipeline(batch_size=20, generator=one(), output_type="latent").images
    drawn = torch.randint(2**63 - 1, (20,), generator=one())
    assert int(drawn.max()) > 2**62
    assert torch.equal(several, Sampler(small_flow_map, steps=2).sample(drawn))
    # The first images do not depend on the number.
    assert torch.equal(torch.randint(2**63 - 1, (7,), generator=one()), drawn[:7])
    each = pipeline(generator=[one(5), one(6)], output_type="latent").images
    firsts = [int(torch.randint(2**63 - 1, (1,), generator=one(seed))) for seed in (5, 6)]
    assert torch.equal(each, Sampler(small_flow_map, steps=2).sample(firsts))
    torch.manual_seed(0)
    default = pipeline(output_type="latent").images
    assert len(default) == 1
    assert not torch.equal(pipeline(output_type="latent").images, default)
    torch.manual_seed(0)
    assert torch.equal(pipeline(output_type="latent").images, default)


def test_output_types(pipeline) -> None:
    state = pipeline(1, seeds=SEEDS, output_type="latent").images
    for labels in ([1] * 4, np.int64(1), torch.tensor(1), torch.tensor([1] * 4), np.array([1] * 4)):
        assert torch.equal(pipeline(labels, seeds=SEEDS, output_type="latent").images, state)
    shown = pipeline(1, seeds=SEEDS, output_type="pt").images
    torch.testing.assert_close(shown, (state / 2 + 0.5).clamp(0, 1))
    array = pipeline(1, seeds=SEEDS, output_type="np").images
    assert (array.shape, array.dtype) == ((4, 8, 8, 1), np.float32)
    assert np.array_equal(array[:, :, :, 0], shown[:, 0].numpy())
    pictures = pipeline(1, seeds=SEEDS).images
    assert [(p.mode, p.size) for p in pictures] == [("L", (8, 8))] * 4
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), to_uint8(state)[:, 0].numpy())
    (as_tuple,) = pipeline(1, seeds=SEEDS, output_type="pt", return_dict=False)
    assert torch.equal(as_tuple, shown)


def test_the_sampler_is_kept_and_follows_changes(pipeline, small_flow_map) -> None:
    run = lambda steps=2: pipeline(seeds=[0], num_inference_steps=steps, output_type="latent").images
    first, sampler = run(), pipeline._sampler
    assert torch.equal(run(), first)
    assert pipeline._sampler is sampler
    assert torch.equal(run(3), Sampler(small_flow_map, steps=3).sample([0]))
    pipeline.scheduler = IMMScheduler.from_config(pipeline.scheduler.config, kind="edm")
    assert torch.equal(run(3), Sampler(small_flow_map, steps=3, kind="edm").sample([0]))
    pipeline.to(torch.bfloat16)
    assert torch.equal(run(3), Sampler(small_flow_map, steps=3, kind="edm").sample([0]))
    assert small_flow_map.network_dtype == torch.bfloat16


# Autoencoders -----------------------------------------------------------------------------------------------------------------


def test_latents_are_decoded(latent_flow_map, tmp_path) -> None:
    vae = tiny_vae()
    pipeline = quiet(IMMPipeline.from_flow_map(latent_flow_map, vae=vae))
    expected = latents.decode(Sampler(latent_flow_map, steps=2).sample(SEEDS, LABELS), vae, batch=1)
    assert expected.shape == (4, 3, 64, 64)
    shown = pipeline(LABELS, seeds=SEEDS, output_type="pt").images
    torch.testing.assert_close(shown, expected / 2 + 0.5)
    pictures = pipeline(LABELS, seeds=SEEDS).images
    assert np.array_equal(np.asarray(pictures[1]), to_uint8(expected, decoded=True)[1].permute(1, 2, 0).numpy())
    state = pipeline(LABELS, seeds=SEEDS, output_type="latent").images
    assert state.shape == (4, 4, 8, 8)
    pipeline.save_pretrained(tmp_path)
    loaded = quiet(IMMPipeline.from_pretrained(tmp_path))
    assert torch.equal(loaded(LABELS, seeds=SEEDS, output_type="pt").images, shown)


def test_latents_without_an_autoencoder(latent_flow_map) -> None:
    pipeline = IMMPipeline.from_flow_map(latent_flow_map)
    text = r"""expected "latent" of a network of 4 channels without a vae, got 'pil'; .*load_vae"""
    with pytest.raises(ValueError, match=text):
        pipeline(LABELS, seeds=SEEDS)
    with pytest.raises(ValueError, match="vae: expected 4 latent channels, as the network has, got 8"):
        IMMPipeline.from_flow_map(latent_flow_map, vae=tiny_vae(latent_channels=8))


# Folders ----------------------------------------------------------------------------------------------------------------------


def test_a_saved_folder_holds_safetensors_and_json(small_flow_map, tmp_path) -> None:
    flow_map = FlowMap(
        small_flow_map.network, schedule="vp_cosine", parametrization="simple_edm", second_time="identity"
    ).eval()
    pipeline = quiet(IMMPipeline.from_flow_map(flow_map, kind="eta", mid_eta=(1.4,), method="restart"))
    expected = pipeline(LABELS, 1.5, seeds=SEEDS, output_type="latent").images
    pipeline.save_pretrained(tmp_path)
    names = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert names == [
        "model_index.json",
        "network/config.json",
        "network/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ]
    loaded = quiet(IMMPipeline.from_pretrained(tmp_path))
    assert loaded.vae is None
    assert loaded.flow_map.settings == flow_map.settings
    assert torch.equal(loaded(LABELS, 1.5, seeds=SEEDS, output_type="latent").images, expected)
    half = IMMPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.flow_map.network_dtype == torch.bfloat16


def test_a_network_alone(small_unet, tmp_path) -> None:
    model = IMMNetwork.around(small_unet.eval())
    assert model.net is small_unet
    model.save_pretrained(tmp_path)
    loaded, info = IMMNetwork.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not loaded.training
    assert loaded.net.settings == small_unet.settings
    expected, found = small_unet.state_dict(), loaded.net.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_network_lies_in_memory_as_one_that_was_made(dtype, small_ddpmpp, latent_flow_map, tmp_path) -> None:
    for i, flow_map in enumerate((small_ddpmpp, latent_flow_map)):
        network = flow_map.network.to(dtype)
        IMMPipeline.from_flow_map(flow_map).save_pretrained(tmp_path / str(i))
        loaded = quiet(IMMPipeline.from_pretrained(tmp_path / str(i), dtype=dtype))
        found = dict(loaded.network.net.named_parameters())
        assert all(p.stride() == found[name].stride() for name, p in network.named_parameters())
        assert all(p.data_ptr() % 64 == 0 for p in found.values())
        assert loaded.network.dtype == dtype
        out = loaded(seeds=SEEDS, output_type="latent").images
        assert torch.equal(out, Sampler(flow_map, steps=2).sample(SEEDS))


def test_incomplete_weights_are_refused(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    file = tmp_path / "network" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["net.conv_in.bias"]
    save_file({**weights, "net.other": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing \['net.conv_in.bias'\], unknown \['net.other'\]"):
        IMMPipeline.from_pretrained(tmp_path)


def test_pickles_are_refused(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        IMMPipeline.from_pretrained(tmp_path)


def test_code_in_a_folder_is_not_run(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass IMMNetwork: pass\nclass IMMPipeline: pass\n"
    for name in ("imm.integrations.diffusers", "evil"):
        for place in (tmp_path / f"{name}.py", tmp_path / "network" / f"{name}.py", tmp_path / "pipeline.py"):
            place.write_text(bomb)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for network in (["imm.integrations.diffusers", "IMMNetwork"], ["evil", "IMMNetwork"], ["subprocess", "Popen"]):
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "network": network}))
        with pytest.raises(ValueError):  # noqa: PT011  (diffusers' words)
            IMMPipeline.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


# The scheduler ----------------------------------------------------------------------------------------------------------------


def test_a_loop_as_diffusers_users_write_it(small_flow_map, tmp_path) -> None:
    IMMScheduler(**small_flow_map.settings).save_pretrained(tmp_path)
    scheduler, network = IMMScheduler.from_pretrained(tmp_path), IMMNetwork.around(small_flow_map.network)
    scheduler.set_timesteps(2, device="cpu", kind="eta", mid_eta=(1.4,))
    assert scheduler.timesteps.tolist() == pytest.approx([994.0, 583.3333333])
    assert scheduler.num_inference_steps == 2
    x = noise(SEEDS, (1, 8, 8)) * scheduler.init_noise_sigma
    labels = torch.tensor(LABELS)
    with torch.no_grad():
        for t in scheduler.timesteps:
            g = network(scheduler.scale_model_input(x, t), t, scheduler.second_timestep(t), labels)
            x = scheduler.step(g, t, x).prev_sample
    grid = sampling.time_grid(small_flow_map, 2, "eta", (1.4,))
    start = sampling.initial_state(small_flow_map, SEEDS, (1, 8, 8))
    assert torch.equal(x, sampling.pushforward(small_flow_map, start, grid, labels))
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.timesteps / 1000, sampling.time_grid(small_flow_map, 4)[:-1])
    assert scheduler.second_timestep(scheduler.timesteps[0].float()) == pytest.approx(248.5)


def test_callbacks_see_and_change_the_state(pipeline, small_flow_map) -> None:
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe is pipeline, step, float(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else {}

    out = pipeline(seeds=SEEDS, callback_on_step_end=callback, output_type="latent").images
    assert seen == [(True, 0, 994.0), (True, 1, 497.0)]
    with torch.no_grad():
        expected = small_flow_map(torch.zeros(4, 1, 8, 8), 0.497, 0.0)
    torch.testing.assert_close(out, expected)


# Refusals ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output_type": "png"}, "output_type: expected one of"),
        ({"seeds": [0], "generator": torch.Generator()}, "seeds and generator: expected one of them at most"),
        ({"seeds": 5}, r"seeds: expected one integer an image, \[B\], got 5"),
        ({"seeds": [0, 1], "class_labels": [0]}, "as many of each, got seeds 2, class_labels 1"),
        ({"generator": [torch.Generator()], "batch_size": 2}, "as many of each, got generator 1, batch_size 2"),
        ({"batch_size": 0}, "batch_size: expected at least one image, got 0"),
        ({"class_labels": [4]}, r"labels: expected classes 0\.\.2 or 3"),
        ({"num_inference_steps": 0}, "steps: expected at least 1, got 0"),
        ({"guidance_scale": float("nan")}, "guidance: expected finite numbers"),
        ({"rows": 2, "callback_on_step_end": lambda *_: {}}, "rows: expected None beside callback_on_step_end"),
        ({"callback_on_step_end": lambda *_: {}, "guidance_scale": float("inf")}, "guidance: expected finite numbers"),
        ({"callback_on_step_end": lambda *_: {}, "class_labels": [-1]}, r"labels: expected classes 0\.\.2 or 3"),
    ],
)
def test_bad_calls_are_refused(options, text, pipeline) -> None:
    with pytest.raises(ValueError, match=text):
        pipeline(**options)


def test_bad_generators_and_training_mode_are_refused(pipeline) -> None:
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or a list of them, got int"):
        pipeline(generator=[0, 1])
    pipeline.network.train()
    for callback in (None, lambda *_: {}):
        with pytest.raises(ValueError, match=r"expected evaluation mode .* got training mode"):
            pipeline(seeds=[0], callback_on_step_end=callback)


def test_guidance_without_classes_is_refused() -> None:
    pipeline = IMMPipeline.from_flow_map(FlowMap(UNet(resolution=8, num_classes=0, width=8, multipliers=(1, 2))).eval())
    assert pipeline(seeds=[0], output_type="pt", callback_on_step_end=lambda *_: {}).images.shape == (1, 1, 8, 8)
    for callback in (None, lambda *_: {}):
        with pytest.raises(ValueError, match="guidance: expected a class-conditional network"):
            pipeline(seeds=[0], guidance_scale=1.5, callback_on_step_end=callback)
        with pytest.raises(ValueError, match="labels: expected None for an unconditional network"):
            pipeline(1, seeds=[0], callback_on_step_end=callback)


def test_bad_components_are_refused(pipeline, small_flow_map) -> None:
    with pytest.raises(
        ValueError, match=r"name: expected one of \['DDPMpp', 'DiT', 'TokenHead', 'TokenModel', 'UNet'\], got 'Linear'"
    ):
        IMMNetwork(name="Linear", settings={})
    other = torch.nn.Linear(2, 2)
    other.num_classes = 0
    with pytest.raises(
        ValueError, match=r"network: expected one of \['DDPMpp', 'DiT', 'TokenHead', 'TokenModel', 'UNet'\], got Linear"
    ):
        IMMNetwork.around(other)
    for network, scheduler, text in (
        (small_flow_map.network, pipeline.scheduler, "network: expected an imm.integrations.diffusers.IMMNetwork, got UNet"),
        (pipeline.network, diffusers.DDIMScheduler(), "scheduler: expected an imm.*IMMScheduler, got DDIMScheduler"),
    ):
        with pytest.raises(TypeError, match=text):
            IMMPipeline(network, scheduler)
    for settings, text in (
        ({"schedule": "linear"}, "linear"),
        ({"kind": "karras"}, "unknown kind"),
        ({"method": "euler"}, "unknown method"),
        ({"mid_eta": [1.4]}, "mid_eta: expected none"),
    ):
        with pytest.raises(ValueError, match=text):
            IMMScheduler(**settings)


def test_bad_steps_are_refused() -> None:
    scheduler, x = IMMScheduler(method="restart"), torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match="expected set_timesteps to be called first"):
        scheduler.scale_model_input(x, 994.0)
    with pytest.raises(ValueError, match="mid_eta: expected a kind beside it"):
        scheduler.set_timesteps(2, mid_eta=(1.4,))
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"timestep: expected one of \[994\.0, 497\.0\], got 500\.0"):
        scheduler.scale_model_input(x, 500.0)
    with pytest.raises(ValueError, match='seeds: expected the images\' seeds for the method "restart"'):
        scheduler.step(x, 994.0, x)
    (last,) = scheduler.step(x, 497.0, x, return_dict=False)
    assert last.shape == x.shape


def test_without_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import imm; import imm.integrations.diffusers"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: imm.integrations.diffusers: expected the diffusers library for it; run: pip install" in run.stderr
