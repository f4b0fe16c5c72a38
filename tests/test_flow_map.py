"""FlowMap: the published composition around any network, guidance, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imm import FlowMap
from imm.networks import DiT


class Recorder(nn.Module):
    """Keeps what it was called with; returns its input times a per-label factor."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, t, s, labels):
        self.seen = x, t, s, labels
        factor = torch.ones(len(x)) if labels is None else 1.0 + labels.to(x.dtype)
        return self.gain * factor[:, None] * x


@pytest.mark.parametrize("second_time", ["stride", "identity"])
def test_what_the_network_sees(second_time) -> None:
    network = Recorder()
    flow_map = FlowMap(network, second_time=second_time, time_scale=500.0)
    x = torch.randn(4, 6)
    t = torch.tensor([0.9, 0.8, 0.5, 0.3], dtype=torch.float64)
    flow_map(x, t, 0.2, torch.tensor([0, 1, 2, 3]))
    seen, first, second, labels = network.seen
    c_in = flow_map.parametrization.c_in(t).float()[:, None]
    assert torch.equal(seen, c_in * x)
    assert first.dtype == second.dtype == torch.float64
    assert torch.equal(first, 500 * t)
    torch.testing.assert_close(second, 500 * (t - 0.2) if second_time == "stride" else torch.full_like(t, 100.0))
    assert labels.tolist() == [0, 1, 2, 3]


def test_composition_and_default_labels() -> None:
    flow_map = FlowMap(Recorder())
    x = torch.randn(2, 6)
    value = flow_map(x, 0.9, 0.4)
    c_in, c_out = float(flow_map.parametrization.c_in(0.9)), float(flow_map.parametrization.c_out(0.4, 0.9))
    torch.testing.assert_close(value, x + c_out * 4.0 * c_in * x)  # the label "none" is class 3: factor 4


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5, torch.tensor([0.5, 2.0])])
def test_guidance_acts_on_the_network_output(guidance) -> None:
    """G = G_none + w (G_label - G_none), then the parametrization (eq. 14)."""
    network = Recorder()
    flow_map = FlowMap(network, parametrization="simple_edm")
    x, labels = torch.randn(2, 6), torch.tensor([0, 2])
    value = flow_map(x, 0.9, 0.4, labels, guidance)
    assert network.seen[3].tolist() == [3, 3, 0, 2]  # without labels first
    p = flow_map.parametrization
    scaled = float(p.c_in(0.9)) * x
    none, label = 4.0 * scaled, torch.tensor([[1.0], [3.0]]) * scaled
    w = guidance[:, None] if isinstance(guidance, torch.Tensor) else guidance
    expected = float(p.c_skip(0.4, 0.9)) * x + float(p.c_out(0.4, 0.9)) * (none + w * (label - none))
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_state_keeps_its_dtype_and_the_network_its_own(dtype) -> None:
    network = Recorder()
    value = FlowMap(network)(torch.randn(2, 6, dtype=dtype), 0.9, 0.4)
    assert value.dtype == dtype
    assert network.seen[0].dtype == torch.float32
    FlowMap(network.double())(torch.randn(2, 6), 0.9, 0.4)
    assert network.seen[0].dtype == torch.float64


def test_s_equal_t_is_the_identity(small_flow_map) -> None:
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(small_flow_map(x, 0.7, 0.7), x)
    flow_map = FlowMap(small_flow_map.network, parametrization="identity")
    assert torch.equal(flow_map(x, 0.0, 0.0), x)


def test_float32_times_reach_the_ends(small_flow_map) -> None:
    x = torch.randn(2, 1, 8, 8)
    rounded = torch.full((2,), 0.994)
    assert float(rounded[0].double()) > 0.994
    torch.testing.assert_close(small_flow_map(x, rounded, torch.zeros(1)), small_flow_map(x, 0.994, 0.0))


def test_compiles_whole(small_flow_map) -> None:
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4, dtype=torch.float64) * 0.5 + 0.4, torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(small_flow_map, fullgraph=True, backend="aot_eager")
    for guidance in (None, 1.5):
        expected = small_flow_map(x, t, 0.1, labels, guidance)
        torch.testing.assert_close(compiled(x, t, 0.1, labels, guidance), expected)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("x4", 0.4, 0.9), "expected s <= t"),
        (("x4", 0.999, 0.1), r"t: expected times from 0.0 to 0.994, got 0.999"),
        (("x4", 0.5, -0.1), "s: expected times from 0.0 to 0.994, got -0.1"),
        (("x4", float("nan"), 0.1), "t: expected times from"),
        (("x4", 0.5, 0.1, None, float("nan")), "guidance: expected finite numbers"),
        (("x4", 0.5, 0.1, torch.zeros(4, dtype=torch.int64, device="meta")), "int64 on cpu, got .* on meta"),
        (("float8", 0.5, 0.1), "of 16, 32 or 64 bits, got .*float8"),
        (("x4", torch.rand(3), 0.0), r"t: expected a number or \[4\], got \[3\]"),
        (("x4", 0.5, 0.1, torch.tensor([0, 1, 2, 4])), r"classes 0\.\.2 or 3 for none, got 0\.\.4"),
        (("x4", 0.5, 0.1, torch.tensor([0, 1, 2, -1])), r"got -1\.\.2"),
        (("x4", 0.5, 0.1, torch.tensor([0, 1, 2])), r"labels: expected \[4\] int64"),
        (("x4", 0.5, 0.1, torch.ones(4)), r"labels: expected \[4\] int64 on cpu, got .* of torch.float32"),
        (("x4", 0.5, 0.1, None, torch.ones(3)), r"guidance: expected a number or \[4\]"),
        (("long", 0.5, 0.1), "x: expected a floating"),
    ],
)
def test_bad_calls_are_refused(arguments, text) -> None:
    x = {"x4": torch.randn(4, 6), "long": torch.ones(4, 6).long(), "float8": torch.ones(4, 6).to(torch.float8_e4m3fn)}[
        arguments[0]
    ]
    with pytest.raises(ValueError, match=text):
        FlowMap(Recorder())(x, *arguments[1:])


def test_an_unconditional_network_takes_no_labels() -> None:
    flow_map = FlowMap(Recorder(num_classes=0))
    x = torch.randn(2, 6)
    assert flow_map(x, 0.5, 0.1).shape == x.shape
    with pytest.raises(ValueError, match="labels: expected None"):
        flow_map(x, 0.5, 0.1, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="guidance: expected a class-conditional network"):
        flow_map(x, 0.5, 0.1, None, 2.0)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("network", ["UNet", "DiT"])
def test_torch_export_with_any_batch(network, guided, small_unet) -> None:
    if network == "DiT":
        flow_map = FlowMap(DiT("S", patch=4, channels=1, resolution=8, num_classes=3)).eval()
        torch.nn.init.normal_(flow_map.network.final_layer.linear.weight)
    else:
        flow_map = FlowMap(small_unet).eval()

    def arguments(batch: int) -> tuple[torch.Tensor | None, ...]:
        t, x = torch.rand(batch, dtype=torch.float64) * 0.99, torch.randn(batch, 1, 8, 8)
        return x, t, t / 3, torch.arange(batch) % 4, torch.rand(batch, dtype=torch.float64) * 3 if guided else None

    batch = torch.export.Dim("batch", min=1, max=64)
    names = ("x", "t", "s", "labels", "guidance")
    shapes = {name: {0: batch} for name in names[: 4 + guided]} | ({} if guided else {"guidance": None})
    with torch.no_grad():
        program = torch.export.export(flow_map, arguments(4), dynamic_shapes=shapes).module()
        for size in (1, 4, 7):
            given = arguments(size)
            out = program(*given)
            torch.testing.assert_close(out, flow_map(*given))  # a graph's products may be another library's
            assert float((out - given[0]).abs().max()) > 1e-3


def test_bad_networks_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes >= 0"):
        FlowMap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got function"):
        FlowMap(lambda x: x)
    wrong = Recorder()
    wrong.forward = lambda x, t, s, labels: x[:, :2]
    with pytest.raises(ValueError, match=r"its input's shape \[2, 6\], got \[2, 2\]"):
        FlowMap(wrong)(torch.randn(2, 6), 0.5, 0.1)
    for change, text in (
        ({"second_time": "s"}, r"unknown second_time 's'; expected one of \['stride', 'identity', 'none'\]"),
        ({"t_min": 0.5, "t_max": 0.4}, "0 <= t_min < t_max <= 1"),
        ({"t_max": 1.1}, "0 <= t_min < t_max <= 1"),
        ({"time_scale": 0}, "time_scale"),
        ({"schedule": "cosine"}, "unknown schedule"),
    ):
        with pytest.raises(ValueError, match=text):
            FlowMap(Recorder(), **change)


KINDS = [("fm", "euler_fm"), ("fm", "identity"), ("fm", "simple_edm"), ("vp_cosine", "identity"), ("vp_cosine", "simple_edm")]


class Smooth(nn.Module):
    """A network in float64 that depends on all it is given."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3, dtype=torch.float64))

    def forward(self, x, t, s, labels):
        shift = 3e-4 * t + 2e-4 * s + 0.1 * labels
        return torch.tanh(x * self.weight) + shift[:, None]


@pytest.mark.parametrize(("schedule", "parametrization"), KINDS)
@pytest.mark.parametrize("second_time", ["stride", "identity", "none"])
def test_the_velocity_is_the_derivative_of_the_map(schedule, parametrization, second_time) -> None:
    """Of a difference of second order in s, from below: |error| falls as h^2."""
    flow_map = FlowMap(Smooth(), schedule=schedule, parametrization=parametrization, second_time=second_time)
    t = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.994], dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, h = torch.tensor([0, 1, 2, 3, 0]), 1e-5
    for guidance in (None, 1.5):
        at = lambda s, w=guidance: flow_map(x, t, s, labels, w)
        numerical = (3 * x - 4 * at(t - h) + at(t - 2 * h)) / (2 * h)
        torch.testing.assert_close(flow_map.velocity(x, t, labels, guidance), numerical, rtol=1e-5, atol=1e-5)


def test_the_exact_velocity_of_known_data_is_that_of_the_schedule() -> None:
    """Data that are one point: v = alpha' x + sigma' eps along the path, whatever the parametrization."""
    for schedule, parametrization in KINDS:
        point = torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64)
        flow_map = FlowMap(Smooth(), schedule=schedule, parametrization=parametrization)
        eps, t = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64), torch.tensor([0.4], dtype=torch.float64)
        x_t = flow_map.add_noise(point, eps, t)
        alpha, sigma = flow_map.schedule.alpha(t)[:, None], flow_map.schedule.sigma(t)[:, None]
        norm = flow_map.sigma_data * (alpha**2 + sigma**2).sqrt()
        g = {
            "identity": point,
            "euler_fm": (eps - point) / flow_map.sigma_data,
            "simple_edm": (alpha * eps - sigma * point) / norm,
        }
        flow_map.network.forward = lambda x, t, s, labels, value=g[parametrization]: value
        expected = flow_map.schedule.d_alpha(t)[:, None] * point + flow_map.schedule.d_sigma(t)[:, None] * eps
        torch.testing.assert_close(flow_map.velocity(x_t, t), expected, rtol=1e-12, atol=1e-12)


def test_identity_has_no_velocity_at_the_data() -> None:
    with pytest.raises(ValueError, match='t: expected times above 0 for the velocity of "identity", got'):
        FlowMap(Smooth(), parametrization="identity").velocity(torch.randn(2, 3), 0.0)
