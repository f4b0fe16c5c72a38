"""DiT's two forms, its conditioning for a whole sampling run, and training with checkpointing."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from small import spread
from tolerance import distance
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from imm.networks import DiT, dit, layers
from imm.networks.dit import Attention
from imm.networks.layers import linear

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def small() -> DiT:
    """Three blocks of DiT-S, with weights that are not zero anywhere."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dit.SIZES, "S", (384, 3, 6))
        made = DiT("S", patch=2, channels=3, resolution=8, num_classes=5)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if parameter.dim() < 2 or "adaLN" in name else parameter[0].numel() ** -0.5)
    return made


@pytest.fixture
def network(small: DiT, device: str) -> DiT:
    return copy.deepcopy(small).to(device)


def inputs(device: str, batch: int = 3) -> Inputs:
    generator = torch.manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator)
    t = torch.rand(batch, generator=generator, dtype=torch.float64) * 500 + 494
    s, labels = t * torch.rand(batch, generator=generator, dtype=torch.float64), torch.tensor([1, 5, 1, 0])[:batch]
    return x.to(device), t.to(device), s.to(device), labels.to(device)


def form(network: DiT, *, fused: bool, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> DiT:
    made = copy.deepcopy(network).to(dtype)
    made.fused, made.checkpointing = fused, checkpointing
    return made


def test_both_forms_are_one_function(network: DiT, device: str) -> None:
    x, *rest = inputs(device)
    truth = form(network, fused=False, dtype=torch.float64)(x.double(), *rest)
    plain, fused = (form(network, fused=fused)(x, *rest) for fused in (False, True))
    assert distance(plain, truth) < 1e-5
    assert distance(fused, truth) < 1e-5
    assert distance(form(network, fused=True, dtype=torch.float64)(x.double(), *rest), truth) < 1e-13


def test_bfloat16_weights_lose_no_more_than_the_plain_form(network: DiT, device: str) -> None:
    x, *rest = inputs(device)
    rounded = form(form(network, fused=False, dtype=torch.bfloat16), fused=False, dtype=torch.float64)
    truth = rounded(x.bfloat16().double(), *rest)
    plain, fused = (form(network, fused=f, dtype=torch.bfloat16)(x.bfloat16(), *rest) for f in (False, True))
    assert fused.dtype == torch.bfloat16
    assert distance(fused, truth) < 1.5 * distance(plain, truth)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_both_forms(network: DiT, checkpointing: bool, device: str) -> None:
    x, *rest = inputs(device)
    gradients = []
    for made, image in (
        (form(network, fused=False, dtype=torch.float64), x.double()),
        (form(network, fused=False, checkpointing=checkpointing), x),
        (form(network, fused=True, checkpointing=checkpointing), x),
    ):
        image = image.clone().requires_grad_()
        made(image, *rest).square().mean().backward()
        gradients.append([image.grad, *(p.grad for p in made.parameters())])
    for truth, plain, fused in zip(*gradients, strict=True):
        assert distance(fused, truth) < max(2e-5, 3 * distance(plain, truth))


def test_more_tokens_than_the_attention_op_takes_go_the_plain_way(device: str) -> None:
    attention, x = Attention(16, heads=2).to(device), torch.randn(1, 1030, 16, device=device)
    assert torch.equal(attention(x, fused=True), attention(x))


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_of_every_module_run(network: DiT, fused: bool, device: str) -> None:
    made, seen = form(network, fused=fused), []
    watched = [made.blocks[1], made.blocks[1].attn, made.blocks[1].mlp, made.final_layer]
    for module in watched:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    made(*inputs(device))
    assert seen == [watched[1], watched[2], watched[0], watched[3]]


def test_autocast_trains_in_both_forms(network: DiT, device: str) -> None:
    x, *rest = inputs(device)
    outputs = []
    for fused in (False, True):
        made = form(network, fused=fused)
        with torch.autocast(device, torch.bfloat16):
            out = made(x, *rest)
        out.float().square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in made.parameters())
        outputs.append(out.detach())
    truth = form(network, fused=False, dtype=torch.float64)(x.double(), *rest)
    assert distance(outputs[1], truth) < 1.5 * distance(outputs[0], truth)


@pytest.mark.parametrize("fused", [False, True])
def test_compiles_whole(fused: bool, device: str, size_t: None) -> None:
    torch._dynamo.reset()
    made = spread(DiT("T", patch=2, channels=3, resolution=8, num_classes=5, fused=fused)).to(device).eval()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    x, *rest = inputs(device)
    torch.testing.assert_close(compiled(x, *rest), made(x, *rest))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, *rest), made(x, *rest))


@pytest.mark.parametrize("fused", [False, True])
def test_conditioning_for_a_run_is_that_of_each_step(network: DiT, fused: bool, device: str) -> None:
    made = form(network, fused=fused).eval()
    x, _, _, labels = inputs(device, 4)
    times = torch.tensor([[994.0, 600.0], [600.0, 250.0], [250.0, 6.0]], dtype=torch.float64, device=device)
    with torch.no_grad():
        modulations = made.conditioner(times)(labels)
        assert modulations.shape == (3, 4, made.modulation_features)
        for step, (t, s) in enumerate(times):
            expected = made(x, t.expand(4), s.expand(4), labels)
            assert distance(made(x, modulation=modulations[step]), expected) < 1e-6


def test_conditioning_without_classes(device: str) -> None:
    made = DiT("S", patch=4, channels=1, resolution=8, num_classes=0).to(device)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    times = torch.tensor([[994.0, 6.0]], dtype=torch.float64, device=device)
    modulations = made.conditioner(times)(None)
    x = torch.randn(3, 1, 8, 8, device=device)
    expected = made(x, *times[0, :, None].expand(2, 3))
    assert distance(made(x, modulation=modulations[0].expand(3, -1)), expected) < 1e-6


def test_bad_modulations_are_refused(network: DiT, device: str) -> None:
    x, t, s, labels = inputs(device)
    features = network.modulation_features
    times = torch.tensor([[994.0, 6.0], [6.0, 1.0]], dtype=torch.float64, device=device)
    modulations = network.conditioner(times)(labels)
    for wrong in (torch.zeros(2, features, device=device), torch.zeros(3, features - 1, device=device), modulations):
        with pytest.raises(ValueError, match=rf"modulation: expected one step's \[3, {features}\], got"):
            network(x, modulation=wrong)
    with pytest.raises(ValueError, match="expected no times or labels beside it"):
        network(x, t, s, labels, modulation=modulations[0])
    with pytest.raises(ValueError, match="t and s: expected the two times"):
        network(x)
    with pytest.raises(ValueError, match=r"times: expected t and s of each step, \[N, 2\], got \[2\]"):
        network.conditioner(times[0])
    with pytest.raises(ValueError, match=r"labels: expected \[R\] int64, got None"):
        network.conditioner(times)(None)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_a_linear_layer_of_inference(dtype: torch.dtype, bound: float, device: str) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 40).to(device, dtype), torch.randn(2, 7, 24, device=device).to(dtype)
    exact = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        assert distance(linear(layer, x), exact) < bound
        gelu = torch.nn.functional.gelu(exact, approximate="tanh")
        assert distance(linear(layer, x, gelu=True), gelu) < bound
        erf = torch.nn.functional.gelu(exact)
        assert float((gelu - erf).abs().max()) > 1e-4  # another function
        assert distance(linear(layer, x.transpose(0, 1), gelu=True), gelu.transpose(0, 1)) < bound


def test_gelu_in_the_epilogue_of_a_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for CUDA, with another GELU."""
    monkeypatch.setattr(layers, "TANH_GELU", ("cpu",))
    monkeypatch.setattr(layers, "_one_dnn", lambda x: False)
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(7, 2, 24).transpose(0, 1)
    with torch.no_grad():
        assert [linear(layer, torch.randn(*n, 24), gelu=True).shape for n in ((), (0, 7))] == [(40,), (0, 7, 40)]
    erf = nn.functional.gelu(nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()))
    with torch.no_grad():
        found = linear(layer, x, gelu=True)
    assert found.shape == (2, 7, 40)
    assert distance(found, erf) < 1e-6
    assert distance(linear(layer, x, gelu=True), erf) > 1e-4  # tanh-GELU, where something learns


class Launches(TorchDispatchMode):
    """Counts the ops that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += not func.is_view and "view" not in str(func)
        return func(*args, **(kwargs or {}))


def test_kernels_of_a_step_of_dit_xl(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, for which the meta device stands here."""
    monkeypatch.setattr(layers, "TANH_GELU", ("meta",))
    with torch.device("meta"):
        made = DiT("XL").eval().to(torch.bfloat16)
        x, modulation = (torch.empty(2, *n, dtype=torch.bfloat16) for n in ((4, 32, 32), (made.modulation_features,)))
        times, labels = torch.empty(1, 2, dtype=torch.float64), torch.empty(2, dtype=torch.int64)
    conditioner = made.conditioner(times)
    with torch.no_grad(), Launches() as step:
        made(x, modulation=modulation)
    with Launches() as conditioning:
        conditioner(labels)
    assert step.count.total() == 201, step.count  # 4 matmuls, 2 norms and 1 attention a block, and 5
    assert conditioning.count.total() == 4, conditioning.count


def test_projections_that_were_replaced_or_hooked_are_called(network: DiT, device: str) -> None:
    times = torch.tensor([[994.0, 600.0], [600.0, 6.0]], dtype=torch.float64, device=device)
    labels = torch.tensor([4, 0], device=device)
    expected = network.conditioner(times)(labels)
    projection = network.blocks[1].adaLN_modulation[1]
    handle = projection.register_forward_hook(lambda module, args, output: 2 * output)
    found = network.conditioner(times)(labels)
    handle.remove()
    first, second = 6 * 384, 12 * 384
    assert distance(found[..., first:second], 2 * expected[..., first:second]) < 1e-6
    assert distance(found[..., second:], expected[..., second:]) < 1e-6


def test_a_linear_layer_that_was_replaced_or_hooked_is_called() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    torch.manual_seed(0)
    layer, x = Doubled(24, 40), torch.randn(3, 24)
    hooked = torch.nn.Linear(24, 40)
    hooked.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x), 2 * linear(hooked, x))
        doubled = 2 * linear(hooked, x)
        handle = hooked.register_forward_hook(lambda module, args, output: 2 * output)
        torch.testing.assert_close(linear(hooked, x), doubled)
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(hooked, x).dtype == torch.bfloat16
    assert linear(hooked, x, gelu=True).requires_grad
