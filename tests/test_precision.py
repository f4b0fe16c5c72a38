"""Gradients in half precision: of a network half way through training, whose two branches differ by little, against float64."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from imm import FlowMap, IMMObjective, checkpoints
from imm.networks import DDPMpp, DiT, UNet

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    sys.path.insert(0, str(BENCH))
    try:
        import accuracy_precision
    finally:
        sys.path.remove(str(BENCH))
    return accuracy_precision


@pytest.fixture(scope="module")
def half_trained(accuracy: ModuleType) -> FlowMap:
    """The demo's network after 1,500 of its 3,000 steps."""
    return checkpoints.load(accuracy.NET).train()


@pytest.mark.parametrize(
    ("settings", "largest", "least_cosine"),
    [("k = 12", 0.05, 0.999), ("k = 12, gap 1e-4, a = 2", 0.05, 0.999), ("k = 15", 0.15, 0.99)],
)
def test_the_gradient_under_bfloat16_autocast(accuracy, half_trained, settings, largest, least_cosine) -> None:
    given = accuracy.problem(half_trained, accuracy.SETTINGS[settings])
    error, cosine = accuracy.errors(accuracy.gradient(*given, "bf16"), accuracy.gradient(*given, "fp64"))
    assert error <= largest
    assert cosine >= least_cosine


@pytest.mark.full
def test_fp16_with_its_loss_scale_and_tf32_are_closer_than_bfloat16(accuracy, half_trained) -> None:
    given = accuracy.problem(half_trained, accuracy.SETTINGS["k = 12"])
    exact = accuracy.gradient(*given, "fp64")
    errors = {name: accuracy.errors(accuracy.gradient(*given, name), exact)[0] for name in ("fp32", "tf32", "fp16")}
    assert errors["fp32"] < 1e-4
    assert errors["fp32"] < errors["tf32"] < 0.02
    assert errors["fp16"] < 0.02


def test_tf32_is_emulated_in_products_alone(accuracy) -> None:
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    exact = [x.half().float() for x in (a, b)]  # 10 bits of mantissa
    plain, of_exact, total = a @ b, exact[0] @ exact[1], a + b
    with accuracy.TF32():
        assert torch.equal(a + b, total)
        assert torch.equal(exact[0] @ exact[1], of_exact)
        product = a @ b
    assert not torch.equal(product, plain)
    torch.testing.assert_close(product, plain, rtol=0, atol=2.0**-7)


@pytest.mark.parametrize(
    ("network", "in_full", "in_half"),
    [
        (
            lambda: UNet(1, 8, 3, width=8, multipliers=(1, 2)),
            ("conv_in", "t_embedder.mlp.0", "conv_out", "affine"),
            ("conv1", "conv2"),
        ),
        (
            lambda: DDPMpp(3, 8, 3, width=8, multipliers=(1, 2), blocks=1, attention=(4,)),
            ("8x8_conv", "map_layer0", "map_layer1_s", "aux_conv", "affine"),
            ("conv0", "conv1", "qkv"),
        ),
        (
            lambda: DiT("S", patch=2, resolution=8, num_classes=3),
            ("x_embedder.proj", "s_embedder.mlp.2", "final_layer.linear", "adaLN_modulation.1"),
            ("qkv", "fc1", "fc2"),
        ),
        (
            lambda: DiT("S", patch=2, resolution=8, num_classes=3, fused=False),
            ("x_embedder.proj", "s_embedder.mlp.2", "final_layer.linear", "adaLN_modulation.1"),
            ("qkv", "fc1", "fc2"),
        ),
    ],
)
def test_ends_and_times_are_in_full_precision_and_branches_in_half_twice(network, in_full, in_half) -> None:
    """What each layer gives under autocast, in the branch that learns and in the target's."""
    made = network()
    seen: dict[str, list[torch.dtype]] = {}
    for name, module in made.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(lambda module, args, out, name=name: seen.setdefault(name, []).append(out.dtype))
    objective = IMMObjective(FlowMap(made), particles=2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(torch.randn(4, *FlowMap(made).image_shape), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert loss.dtype == torch.float32
    for ends, expected in ((in_full, torch.float32), (in_half, torch.bfloat16)):
        for end in ends:
            found = [dtypes for name, dtypes in seen.items() if name.endswith(end)]
            assert found, end
            assert all(dtypes == [expected] * 2 for dtypes in found), end


def test_a_network_in_half_precision_under_autocast_stays_in_it() -> None:
    for made in (UNet(1, 8, 3, width=8, multipliers=(1, 2)), DiT("S", patch=2, resolution=8, num_classes=3)):
        made.bfloat16()
        x = torch.randn(2, made.channels, 8, 8, dtype=torch.bfloat16)
        times, labels = torch.full((2,), 500.0, dtype=torch.float64), torch.tensor([0, 3])
        with torch.autocast("cpu", torch.bfloat16):
            assert made(x, times, times / 2, labels).dtype == torch.bfloat16
