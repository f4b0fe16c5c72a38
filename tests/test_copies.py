"""Samplers and pipelines that are copied and pickled, and pipelines whose parts were replaced."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from imm import Sampler


@pytest.mark.parametrize("called", [False, True])
def test_copies_and_pickles(called, small_flow_map) -> None:
    settings = {"steps": 2, "kind": "eta", "mid_eta": (1.4,), "method": "restart", "guidance": 1.5, "rows": 3}
    sampler, seeds, labels = Sampler(small_flow_map, **settings, state_dtype=torch.float64), [3, 4], [0, 1]
    expected = Sampler(small_flow_map, **settings, state_dtype=torch.float64).sample(seeds, labels)
    if called:
        sampler.sample(seeds, labels)
    file = io.BytesIO()
    torch.save(sampler, file)
    file.seek(0)
    deep, loaded = copy.deepcopy(sampler), torch.load(file, weights_only=False)
    for other in (deep, copy.copy(sampler), pickle.loads(pickle.dumps(sampler)), loaded):
        assert torch.equal(other.sample(seeds, labels), expected)
        assert other.stats()["cached"] == [(3, True)]
    with torch.no_grad():
        for parameter in deep.flow_map.network.parameters():
            parameter.zero_()
    assert torch.equal(sampler.sample(seeds, labels), expected)
    # Each copy follows its own network's load_state_dict.
    state = {name: 0.5 * value for name, value in loaded.flow_map.network.state_dict().items()}
    loaded.flow_map.network.load_state_dict(state)
    assert loaded._stale
    assert not sampler._stale
    assert float((loaded.sample(seeds, labels) - expected).abs().max()) > 1e-4


@pytest.fixture
def pipeline(small_flow_map):
    pytest.importorskip("diffusers")
    from imm.integrations.diffusers import IMMPipeline

    return quiet(IMMPipeline.from_flow_map(small_flow_map))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_pipeline_is_copied_and_pickled_after_a_call(pipeline) -> None:
    run = lambda one: one([0, 1], seeds=[3, 4], output_type="pt").images
    expected = run(pipeline)
    for other in (copy.deepcopy(pipeline), copy.copy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(run(quiet(other)), expected)
        assert other._sampler is not pipeline._sampler
    other = copy.deepcopy(pipeline)
    assert other.network is not pipeline.network
    other.network.net.requires_grad_(False).get_parameter("conv_in.weight").zero_()
    assert torch.equal(run(pipeline), expected)


def test_other_components_in_a_pipeline_are_refused_by_name(pipeline) -> None:
    diffusers = pytest.importorskip("diffusers")
    own = pipeline.scheduler
    for stranger in (diffusers.DDIMScheduler(), diffusers.FlowMatchEulerDiscreteScheduler()):
        pipeline.scheduler = stranger
        for how in ({}, {"callback_on_step_end": lambda *_: {}}):
            with pytest.raises(
                TypeError,
                match=rf"scheduler: expected an imm.integrations.diffusers.IMMScheduler, got {type(stranger).__name__}",
            ):
                pipeline(seeds=[0], **how)
    pipeline.scheduler, net = own, pipeline.network
    pipeline.network = net.net
    with pytest.raises(TypeError, match=r"network: expected an imm.integrations.diffusers.IMMNetwork, got UNet"):
        pipeline(seeds=[0])
    from test_latents import tiny_vae

    pipeline.network, pipeline.vae = net, tiny_vae()
    with pytest.raises(ValueError, match="vae: expected 1 latent channels"):
        pipeline(seeds=[0])
