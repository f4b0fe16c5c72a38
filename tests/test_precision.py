"""Gradients in half precision: of a network half way through training, whose two branches differ by little, against float64.

    python tests/test_precision.py      prints the table of docs/howto/precision.md

Each cell is |g - g64| / |g64| over all parameters, and their cosine, for the same images, times and noise. Half precision is
autocast, on the CPU; TF32 is emulated by rounding the operands of matmuls and convolutions to 10 bits of mantissa. Random
weights would show nothing: their two branches differ by much more than rounding.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imm import FlowMap, IMMObjective, checkpoints
from imm.data import mnist_5k, to_float
from imm.networks import DDPMpp, DiT, UNet
from imm.objectives import Draws

NET = Path(__file__).parent / "data" / "half_trained.safetensors"
BATCH = 256
#: Column -> k, and the paper's settings for half precision (section I.6) or those of the demo.
SETTINGS: dict[str, dict[str, Any]] = {
    "k = 10": {"k": 10, "a": 1},
    "k = 12": {"k": 12, "a": 1},
    "k = 12, gap 1e-4, a = 2": {"k": 12, "a": 2, "min_gap": 1e-4},
    "k = 15": {"k": 15, "a": 1},
}
#: fp16's loss scale here; a GradScaler finds one of its size.
LOSS_SCALE = 2.0**16
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
#: The operands among an op's arguments; biases are added in float32.
_OPERANDS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "convolution": (0, 1), "convolution_backward": (0, 1, 2)}


class TF32(TorchDispatchMode):
    """Within, float32 operands of products are rounded to TF32's 10 bits of mantissa; sums stay float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = _OPERANDS.get(func.overloadpacket.__name__, ())
        args = tuple(_rounded(value) if i in operands else value for i, value in enumerate(args))
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    bits = x.clone().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def problem(flow_map: FlowMap, settings: dict[str, Any]) -> tuple[IMMObjective, Tensor, Tensor, Draws]:
    """The objective, images ``[256, 1, 16, 16]``, labels and draws that every precision shares."""
    data = mnist_5k(flow_map.image_shape[1])
    assert data.labels is not None
    picked = torch.arange(0, len(data.images), len(data.images) // BATCH)[:BATCH]
    x = to_float(data.images[picked])
    objective = IMMObjective(flow_map, particles=4, **settings)
    draws = objective.draw(x, data.labels[picked], torch.Generator().manual_seed(1))
    return objective, x, data.labels[picked], draws


def gradient(objective: IMMObjective, x: Tensor, labels: Tensor, draws: Draws, precision: str) -> Tensor:
    """The gradient to all parameters in a precision, or in float64 ("fp64"), as one float64 vector."""
    if precision == "fp64":
        wide = copy.deepcopy(objective).double()
        exact = Draws(draws.t, draws.s, draws.r, draws.noise.double(), draws.labels)
        loss, _ = wide(x.double(), labels, draws=exact)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(wide.parameters()))])
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scale = LOSS_SCALE if precision == "fp16" else 1.0
    cast = torch.autocast("cpu", half) if half else contextlib.nullcontext()
    with TF32() if precision == "tf32" else contextlib.nullcontext():
        with cast:
            loss, _ = objective(x, labels, draws=draws, grad_scale=torch.tensor(scale))
        found = torch.autograd.grad(loss, list(objective.parameters()))
    return torch.cat([g.double().flatten() for g in found]) / scale


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """|g - g64| / |g64|, and the cosine between them."""
    return float((found - exact).norm() / exact.norm()), float(torch.cosine_similarity(found, exact, dim=0))


@pytest.fixture(scope="module")
def half_trained() -> FlowMap:
    """The demo's network after 1,500 of its 3,000 steps."""
    return checkpoints.load(NET).train()


@pytest.mark.parametrize(
    ("settings", "largest", "least_cosine"),
    [("k = 12", 0.05, 0.999), ("k = 12, gap 1e-4, a = 2", 0.05, 0.999), ("k = 15", 0.15, 0.99)],
)
def test_the_gradient_under_bfloat16_autocast(half_trained, settings, largest, least_cosine) -> None:
    given = problem(half_trained, SETTINGS[settings])
    error, cosine = errors(gradient(*given, "bf16"), gradient(*given, "fp64"))
    assert error <= largest
    assert cosine >= least_cosine


@pytest.mark.full
def test_fp16_with_its_loss_scale_and_tf32_are_closer_than_bfloat16(half_trained) -> None:
    given = problem(half_trained, SETTINGS["k = 12"])
    exact = gradient(*given, "fp64")
    errors = {name: errors(gradient(*given, name), exact)[0] for name in ("fp32", "tf32", "fp16")}
    assert errors["fp32"] < 1e-4
    assert errors["fp32"] < errors["tf32"] < 0.02
    assert errors["fp16"] < 0.02


def test_tf32_is_emulated_in_products_alone() -> None:
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    exact = [x.half().float() for x in (a, b)]  # 10 bits of mantissa
    plain, of_exact, total = a @ b, exact[0] @ exact[1], a + b
    with TF32():
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
        *(
            (
                lambda fused=fused: DiT("T", patch=2, resolution=8, num_classes=3, fused=fused),
                ("x_embedder.proj", "s_embedder.mlp.2", "final_layer.linear", "adaLN_modulation.1"),
                ("qkv", "fc1", "fc2"),
            )
            for fused in (True, False)
        ),
    ],
)
def test_ends_and_times_are_in_full_precision_and_branches_in_half_twice(network, in_full, in_half, size_t) -> None:
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


def test_a_network_in_half_precision_under_autocast_stays_in_it(size_t) -> None:
    for made in (UNet(1, 8, 3, width=8, multipliers=(1, 2)), DiT("T", patch=2, resolution=8, num_classes=3)):
        made.bfloat16()
        x = torch.randn(2, made.channels, 8, 8, dtype=torch.bfloat16)
        times, labels = torch.full((2,), 500.0, dtype=torch.float64), torch.tensor([0, 3])
        with torch.autocast("cpu", torch.bfloat16):
            assert made(x, times, times / 2, labels).dtype == torch.bfloat16


def table() -> str:
    """The rows as Markdown."""
    flow_map = checkpoints.load(NET).train()
    lines = [["", *SETTINGS], ["---"] * (1 + len(SETTINGS)), *([precision] for precision in PRECISIONS)]
    for settings in SETTINGS.values():
        given = problem(flow_map, settings)
        exact = gradient(*given, "fp64")
        for line, precision in zip(lines[2:], PRECISIONS, strict=True):
            error, cosine = errors(gradient(*given, precision), exact)
            line.append(f"{error:.2g} ({cosine:.4f})")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
