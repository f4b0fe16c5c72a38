"""DDPM++: the recorded outputs, and what it is beside them: any dtype, memory format, compiled, checkpointed, conditional."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import parity
import pytest
import torch
from tolerance import distance
from torch import Tensor
from torch.nn import functional as F

from imm import FlowMap, Sampler, sampling
from imm.checkpoints import CheckpointError, from_published
from imm.networks import DDPMpp
from imm.networks.ddpmpp import Block, ResampledConv2d

LISTING = "state_dict_ddpmpp_cifar10.txt"
Published = tuple[FlowMap, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return parity.published_settings(parity.case("ddpmpp_cifar_1step")[1])


@pytest.fixture(scope="module")
def published(settings) -> Published:
    state = {name: parity.weight(name, shape) for name, shape in parity.names(LISTING).items() if "resample" not in name}
    return from_published(state, settings), parity.case("ddpmpp_cifar_1step")[0]


def test_parity_with_recorded_samples(published) -> None:
    flow_map, arrays = published
    x = torch.from_numpy(arrays["x_T"])
    with torch.no_grad():
        one = flow_map(x.double(), 0.7, 0.2)
    assert parity.relative(one, arrays["one_step_t0_7_s0_2"]) < 1e-5
    out = sampling.pushforward(flow_map, x, sampling.time_grid(flow_map, 1), dtype=torch.float64)
    assert parity.relative(out, arrays["samples"]) < 1e-5


@pytest.mark.parametrize("native", [True, False])
def test_parity_of_the_sampling_engine(native, published, monkeypatch) -> None:
    flow_map, arrays = published
    if not native:
        monkeypatch.setattr("imm.ops.native.module", lambda: None)
    out = Sampler(flow_map, steps=1).sample(range(2), x=torch.from_numpy(arrays["x_T"]))
    assert parity.relative(out, arrays["samples"]) < 1e-5


def small(**changes: Any) -> DDPMpp:
    """8x8 and 4x4 pixels, five classes, no weight 0."""
    torch.manual_seed(0)
    made = DDPMpp(3, 8, **{"num_classes": 5, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), **changes})
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.manual_seed(1)
    t = torch.tensor([994.0, 700.0, 3.0], dtype=torch.float64)
    return torch.randn(3, 3, 8, 8, generator=generator), t, t / 3, torch.tensor([1, 5, 0])


def test_float32_and_every_memory_format_are_float64_to_rounding() -> None:
    x, *rest = inputs()
    network = small()
    truth = copy.deepcopy(network).double()(x.double(), *rest)
    plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    for made in (network, plain):
        for image in (x, x.to(memory_format=torch.channels_last)):
            assert distance(made(image, *rest), truth) < 2e-6
    weight = "enc.8x8_block0.conv0.weight"
    for kept in (network, copy.deepcopy(network).bfloat16()):
        assert kept.get_parameter(weight).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_copies_in_16_bits(dtype, bound) -> None:
    x, *rest = inputs()
    network = small()
    out = copy.deepcopy(network).to(dtype)(x.to(dtype), *rest)
    assert out.dtype == dtype
    assert distance(out, network(x, *rest)) < bound


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    network, arguments = small(), inputs()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), network(*arguments))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), network(*arguments))


def test_checkpointing_gives_the_same_gradients_with_dropout() -> None:
    network, arguments, gradients = small(dropout=0.5).train(), inputs(), []
    for network.checkpointing in (False, True):
        network.zero_grad()
        torch.manual_seed(2)
        network(*arguments).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert float(plain.abs().max()) > 0
        assert torch.equal(plain, again)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_resampling_is_the_stored_filter(kernel, up) -> None:
    layer, x = ResampledConv2d(4, 6, kernel, up=up).double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    taps = layer.resample_filter.expand(4, 1, 2, 2)
    resampled = F.conv_transpose2d(x, 4 * taps, stride=2, groups=4) if up else F.conv2d(x, taps, stride=2, groups=4)
    torch.testing.assert_close(layer(x), F.conv2d(resampled, layer.weight, layer.bias, padding=kernel // 2))


def test_a_block_begins_as_its_skip() -> None:
    fresh = DDPMpp(3, 8, width=16, multipliers=(1, 2), blocks=1, attention=(8,)).enc["8x8_block0"].eval()
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(fresh(x, torch.randn(2, 64)), 0.5 * x, rtol=1e-3, atol=1e-3)


def test_initial_weights_have_the_published_gains() -> None:
    """Xavier's standard deviation, sqrt(2 / (fan in + fan out)), times a gain."""
    fresh = DDPMpp(blocks=1)  # of the published width
    gains = {"qkv.weight": 0.2**0.5, "conv1.weight": 1e-5, "proj.weight": 1e-5, "aux_conv.weight": 1e-5}
    seen = set()
    for name, weight in fresh.named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif weight.dim() > 1:
            last = ".".join(name.rsplit(".", 2)[-2:]).replace("32x32_", "")
            seen.add(last)
            fans = (weight.shape[0] + weight.shape[1]) * weight[0, 0].numel()
            expected = gains.get(last, 1.0) * (2 / fans) ** 0.5
            assert float(weight.detach().std()) == pytest.approx(expected, rel=6 / weight.numel() ** 0.5), name
    assert gains.keys() <= seen
    assert float(fresh.get_parameter("enc.16x16_block0.qkv.weight").detach().std()) == pytest.approx(1.977e-2, rel=0.01)
    with torch.no_grad():
        out = fresh.eval()(torch.randn(1, 3, 32, 32), *torch.full((2, 1), 500.0, dtype=torch.float64))
    assert 0 < float(out.abs().max()) < 1e-3


def test_attention_is_softmax_of_q_k_over_all_pixels() -> None:
    block, x = Block(16, 16, 8, 0.0, attention=True).double(), torch.randn(2, 16, 4, 4, dtype=torch.float64)
    q, k, v = block.qkv(x).reshape(2, 16, 3, 16).unbind(2)  # channels hold (channel, q k v)
    weights = torch.einsum("bci,bcj->bij", q, k).div(4.0).softmax(2)
    truth = block.proj(torch.einsum("bij,bcj->bci", weights, v).reshape(2, 16, 4, 4))
    torch.testing.assert_close(block._attend(x), truth)


def test_augmentation_labels_enter_where_they_are_given() -> None:
    network, arguments = small(augment_dim=9), inputs()
    assert network.get_parameter("map_augment.weight").shape == (16, 9)
    none, zero = network(*arguments), network(*arguments, torch.zeros(3, 9))
    assert torch.equal(none, zero)
    assert distance(network(*arguments, torch.ones(3, 9)), none) > 1e-3
    with pytest.raises(ValueError, match=r"augment: expected \[3, 9\], got \[3, 8\]"):
        network(*arguments, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="augment: expected none for augment_dim = 0"):
        small()(*arguments, torch.zeros(3, 9))


def test_labels_have_to_fit() -> None:
    x, t, s, labels = inputs()
    with pytest.raises(ValueError, match=r"labels: expected \[B\] int64, got None"):
        small()(x, t, s, None)
    with pytest.raises(ValueError, match="labels: expected none, got tensor"):
        small(num_classes=0)(x, t, s, labels)


def test_sampler_of_an_unconditional_and_a_guided_network() -> None:
    plain = Sampler(FlowMap(small(num_classes=0)).eval(), steps=2)
    images = plain.sample(range(3))
    assert distance(plain.sample([1]), images[1:2]) < 1e-5
    guided = Sampler(FlowMap(small()).eval(), steps=2, guidance=1.5)
    half = Sampler(guided.flow_map, steps=2, guidance=1.5, dtype=torch.bfloat16)
    labels = [0, 5, 2]
    assert distance(half.sample(range(3), labels), guided.sample(range(3), labels)) < 0.05


def test_from_published_reads_other_settings(settings) -> None:
    made = DDPMpp(1, 16, 4, width=8, multipliers=(1, 2), blocks=2, attention=(8,), dropout=0.1, augment_dim=9)
    state = {f"model.{name}": value for name, value in made.state_dict().items()}
    given = {
        "img_channels": 1,
        "img_resolution": 16,
        "label_dim": 4,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_blocks": 2,
        "attn_resolutions": [8, 4],  # no level has side 4
        "dropout": 0.1,
        "augment_dim": 9,
        "embedding_type": "positional",
        "resample_filter": (1, 1),
        "label_dropout": 0.1,
        "s_embed": True,
    }
    assert from_published(state, {**settings, **given}).network.settings == made.settings
    without = {name: value for name, value in state.items() if "resample" not in name}
    assert from_published(without, {**settings, **given}).num_classes == 4
    with pytest.raises(CheckpointError, match=r"map_label.weight: expected \[16, 4\], got \[8, 4\]"):
        from_published(state, {**settings, **given, "model_channels": 16})
    name = "model.dec.16x16_up.skip.resample_filter"
    other = {**state, name: torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])}
    with pytest.raises(CheckpointError, match=r"dec.16x16_up.skip.resample_filter: expected the 2x2 box filter \(0.25\), got"):
        from_published(other, {**settings, **given})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_type", "fourier"),
        ("encoder_type", "residual"),
        ("decoder_type", "skip"),
        ("resample_filter", [1, 3, 3, 1]),
        ("channel_mult_noise", 2),
        ("s_embed", False),
    ],
)
def test_relatives_of_ddpmpp_are_refused(name, value, settings) -> None:
    with pytest.raises(CheckpointError, match=rf"{name}: expected .*, as DDPM\+\+ has it, got "):
        from_published({}, {**settings, name: value})
