"""Time grids, pushforward and restart: against the published grids, recorded cases and an exact flow map."""

from __future__ import annotations

import parity
import pytest
import torch
from torch import Tensor, nn

from imm import FlowMap, noise, sampling
from imm.checkpoints import from_published
from imm.networks import DiT

CASES = ["dit_s_2_stride_1step", "dit_s_2_stride_4step", "dit_s_4_identity_2step_nocfg"]


class Dirac(nn.Module):
    """The exact G of a single data point: every trajectory ends in ``point`` in one step or many."""

    num_classes = 0
    point = 0.25

    def forward(self, x, t, s, labels):
        """Euler-FM's target (eps - x) / sigma_data from x_t = (1 - t) point + t eps; x comes scaled by c_in."""
        t = (t / 1000)[:, None]
        state = x * 0.5 * (t**2 + (1 - t) ** 2).sqrt()
        return (state - self.point) / t / 0.5


@pytest.fixture
def exact() -> FlowMap:
    return FlowMap(Dirac())


def test_uniform_grid(exact) -> None:
    expected = [0.994, 0.86975, 0.7455, 0.62125, 0.497, 0.37275, 0.2485, 0.12425, 0.0]
    torch.testing.assert_close(sampling.time_grid(exact, 8).tolist(), expected, rtol=1e-12, atol=1e-15)


def test_eta_and_edm_grids(exact, small_unet) -> None:
    assert sampling.time_grid(exact, 2, "eta", (1.4,)).tolist() == pytest.approx([0.994, 0.5833333333, 0.0])
    cosine = FlowMap(small_unet, schedule="vp_cosine", parametrization="simple_edm", t_max=0.996)
    assert float(sampling.time_grid(cosine, 2, "eta", [1.4])[1]) == pytest.approx(0.60513, abs=1e-5)
    for flow_map in (exact, cosine, FlowMap(small_unet, t_min=0.006)):
        grid = sampling.time_grid(flow_map, 4, "edm")
        assert (float(grid[0]), float(grid[-1])) == (flow_map.t_max, flow_map.t_min)
        root = flow_map.schedule.eta(grid) ** (1 / 7)
        torch.testing.assert_close(root.diff(), (root[-1] - root[0]).expand(4) / 4, rtol=1e-9, atol=1e-12)
    for kind in sampling.KINDS:
        assert sampling.time_grid(exact, 1, kind).tolist() == [0.994, 0.0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0,), "steps: expected at least 1, got 0"),
        ((2, "cosine"), "unknown kind 'cosine'"),
        ((3, "eta", (1.4,)), r"steps - 1 = 2 noise levels, got 1"),
        ((2, "uniform", (1.4,)), "mid_eta: expected none"),
        ((3, "eta", (1.4, 2.0)), "strictly decreasing"),
        ((2, "eta", (1000.0,)), "strictly decreasing"),
        ((2, "eta", (-1.4,)), "mid_eta: expected positive noise levels"),
    ],
)
def test_bad_grids_are_refused(arguments, text, exact) -> None:
    with pytest.raises(ValueError, match=text):
        sampling.time_grid(exact, *arguments)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_exact_flow_map_arrives_from_any_number_of_steps(steps, exact) -> None:
    x = torch.randn(3, 6, dtype=torch.float64) * 0.5
    grid = sampling.time_grid(exact, steps)
    for sampler in (sampling.pushforward, sampling.restart):
        out = sampler(exact, x, grid, dtype=torch.float64)
        torch.testing.assert_close(out, torch.full_like(x, Dirac.point), rtol=1e-5, atol=1e-5)


@pytest.mark.every(5)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_parity_with_recorded_samples(name, fused) -> None:
    arrays, meta = parity.case(name)
    with torch.device("meta"):
        shapes = {f"model.{k}": tuple(v.shape) for k, v in DiT("S", int(meta["network"][-1])).state_dict().items()}
    state = {k: parity.weight(k, shape) for k, shape in shapes.items() if "pos_embed" not in k}
    flow_map = from_published(state, parity.published_settings(meta))
    flow_map.network.fused = fused
    x, labels = torch.from_numpy(arrays["x_T"]), torch.tensor(meta["labels"])
    with torch.no_grad():
        one = flow_map(x.double(), 0.7, 0.2, labels)
    assert parity.relative(one, arrays["one_step_t0_7_s0_2"]) < 1e-4
    grid = sampling.time_grid(flow_map, meta["num_steps"], meta["discretization"])
    for dtype in (torch.float64, torch.float32):
        out = sampling.pushforward(flow_map, x, grid, labels, meta["cfg_scale"], dtype)
        assert out.dtype == dtype
        assert parity.relative(out, arrays["samples"]) < 1e-4


@pytest.mark.parametrize("method", ["pushforward", "restart"])
def test_each_image_depends_on_its_own_seed_only(method, small_flow_map, device) -> None:
    flow_map = small_flow_map.to(device)
    seeds, labels = list(range(64)), torch.arange(64, device=device) % 3
    grid = sampling.time_grid(flow_map, 3)

    def generate(batch: int) -> torch.Tensor:
        parts = []
        for i in range(0, 64, batch):
            x = sampling.initial_state(flow_map, seeds[i : i + batch], (1, 8, 8), device)
            extra = {"seeds": seeds[i : i + batch]} if method == "restart" else {}
            parts.append(getattr(sampling, method)(flow_map, x, grid, labels[i : i + batch], 1.5, **extra))
        return torch.cat(parts)

    whole = generate(64)
    for batch in (1, 7):
        torch.testing.assert_close(generate(batch), whole, rtol=1e-4, atol=1e-5)
    assert float((whole[0] - whole[3]).abs().max()) > 1e-3


def test_restart_noise(small_flow_map) -> None:
    x, grid = torch.randn(2, 1, 8, 8), sampling.time_grid(small_flow_map, 3)
    seeds = [4, 5]
    fresh = [0.5 * noise(seeds, (1, 8, 8), i) for i in (1, 2)]
    by_hand = x
    for i, t in enumerate(grid[:-1].tolist()):
        with torch.no_grad():
            by_hand = small_flow_map(by_hand, t, 0.0)
        if i < 2:
            by_hand = (1 - grid[i + 1]).float() * by_hand + grid[i + 1].float() * fresh[i]
    before = x.clone()
    seeded = sampling.restart(small_flow_map, x, grid, seeds=seeds)
    torch.testing.assert_close(seeded, by_hand, rtol=1e-5, atol=1e-5)
    assert torch.equal(sampling.restart(small_flow_map, x, grid, noise=fresh), seeded)
    assert torch.equal(x, before)
    first, second = sampling.restart(small_flow_map, x, grid), sampling.restart(small_flow_map, x, grid)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    first = sampling.restart(small_flow_map, x, grid)
    torch.manual_seed(0)
    assert torch.equal(sampling.restart(small_flow_map, x, grid), first)


@pytest.mark.parametrize("method", ["pushforward", "restart"])
@pytest.mark.parametrize(
    ("times", "text"),
    [
        ([0.5], "at least two times"),
        ([0.1, 0.5], "strictly decreasing|above the last"),
        ([0.5, 0.5], "strictly decreasing|above the last"),
        ([0.999, 0.1], r"times: expected times from 0\.0 to 0\.994"),
    ],
)
def test_bad_times_are_refused(method, times, text, small_flow_map) -> None:
    with pytest.raises(ValueError, match=text):
        getattr(sampling, method)(small_flow_map, torch.randn(2, 1, 8, 8), torch.tensor(times, dtype=torch.float64))


def test_bad_noise_is_refused(small_flow_map) -> None:
    x, grid = torch.randn(2, 1, 8, 8), sampling.time_grid(small_flow_map, 3)
    for options, text in (
        ({"noise": [x]}, r"expected 2 tensors of shape \[2, 1, 8, 8\], got \[\[2, 1, 8, 8\]\]"),
        ({"noise": [x, x[:1]]}, "expected 2 tensors"),
        ({"noise": [x, x], "seeds": [0, 1]}, "one of them at most"),
        ({"seeds": [0]}, "seeds: expected one per image, 2, got 1"),
    ):
        with pytest.raises(ValueError, match=text):
            sampling.restart(small_flow_map, x, grid, **options)


def test_restart_times_need_not_decrease(exact) -> None:
    times = torch.tensor([0.9, 0.3, 0.6, 0.0], dtype=torch.float64)
    out = sampling.restart(exact, torch.randn(2, 4), times)
    assert torch.isfinite(out).all()


def velocity_map(**settings) -> FlowMap:
    """Data that are one point, in the form of a network: its ODE is linear, and known."""

    class Point(nn.Module):
        num_classes = 0
        weight = None

        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Parameter(torch.tensor([0.4, -0.3], dtype=torch.float64))

        def forward(self, x, t, s, labels):
            t = (t / 1000.0)[:, None]
            x_t = x * 0.5 * ((1 - t) ** 2 + t**2).sqrt()
            eps = (x_t - (1 - t) * self.point) / t.clamp_min(1e-12)
            return (eps * torch.cos(t) - self.point) / 0.5  # not exactly: the velocity bends, so that steps matter

    return FlowMap(Point(), second_time="none", **settings)


def test_ddim_calls_the_network_at_s_equal_to_t_and_heun_is_of_second_order() -> None:
    flow_map = velocity_map(t_min=0.05, t_max=0.95)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(steps: int, method: str) -> Tensor:
        return sampling.pushforward(flow_map, x, sampling.time_grid(flow_map, steps), dtype=torch.float64, method=method)

    fine = run(2000, "heun")
    error = {m: [float((run(n, m) - fine).abs().max()) for n in (32, 64, 128)] for m in ("ddim", "heun")}
    for a, b in zip(error["ddim"], error["ddim"][1:], strict=False):
        assert 1.7 < a / b < 2.6  # first order
    for a, b in zip(error["heun"], error["heun"][1:], strict=False):
        assert 3.4 < a / b < 5.0
    # By hand: a step of Heun's method on FlowMap.velocity.
    t, s = 0.95, 0.5
    h, v = s - t, flow_map.velocity(x, t)
    expected = x + h / 2 * (v + flow_map.velocity(x + h * v, s))
    got = sampling.pushforward(flow_map, x, torch.tensor([t, s], dtype=torch.float64), dtype=torch.float64, method="heun")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("schedule", "parametrization"), [("fm", "identity"), ("fm", "simple_edm"), ("vp_cosine", "identity")])
def test_heun_holds_for_every_parametrization_and_skips_the_second_call_where_no_noise_is_left(
    schedule, parametrization
) -> None:
    network = velocity_map().network
    flow_map = FlowMap(network, schedule=schedule, parametrization=parametrization, second_time="none")
    table = sampling.step_table(flow_map, sampling.time_grid(flow_map, 3), "heun")
    assert len(table) == 5
    assert all(c == 0.5 for c in table.c_kept[1::2])
    x, t, s = torch.randn(4, 2, dtype=torch.float64), 0.994, 0.497  # a half, where c_skip of "identity" is 0
    h, v = s - t, flow_map.velocity(x, t)
    expected = x + h / 2 * (v + flow_map.velocity(x + h * v, s))
    got = sampling.pushforward(flow_map, x, torch.tensor([t, s], dtype=torch.float64), dtype=torch.float64, method="heun")
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="method: expected pushforward, ddim or heun, got 'restart'"):
        sampling.pushforward(flow_map, x, torch.tensor([t, s]), method="restart")
