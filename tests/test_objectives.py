"""The losses beside IMM: against implementations written from the equations, at the exact map, on the interface they share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imm import FlowMap, IMMObjective
from imm.networks import DiT, UNet
from imm.objectives import (
    IMM,
    OBJECTIVES,
    Consistency,
    Draws,
    EnergyScore,
    FlowMatching,
    MeanFlow,
    Objective,
    SelfDistillation,
    Shortcut,
)
from imm.objectives.base import Batch

SIGMA = 0.5


class Smooth(nn.Module):
    """A float64 network of 3 numbers that depends on all it is given; twice differentiable."""

    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape: nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.5)
        self.first, self.second, self.times, self.classes = random(5, 3), random(3, 5), random(2, 5), random(4, 5)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        hidden = x @ self.first.T + 1e-3 * t[:, None] * self.times[0] + 1e-3 * s[:, None] * self.times[1] + self.classes[labels]
        return torch.tanh(hidden) @ self.second.T


def flow_map(**settings) -> FlowMap:
    return FlowMap(Smooth(), second_time="identity", time_scale=1000.0, **settings)


def made(kind: str, **settings) -> Objective:
    return OBJECTIVES[kind](flow_map(), **settings)


def data(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator) * SIGMA, torch.arange(count) % 3


def raw(objective: Objective, z: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    """G(c_in(t) z, t, s) of Euler-FM from the network itself; t and s of each image."""
    c_in = 1.0 / (SIGMA * (t**2 + (1 - t) ** 2).sqrt())
    return objective.flow_map.network(z * c_in[:, None], 1000.0 * t, 1000.0 * s, labels)


def jump(objective: Objective, z: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
    return z - (t - s)[:, None] * SIGMA * raw(objective, z, t, s, labels)


def plain_fm(objective: Objective, x: Tensor, d: Draws) -> Tensor:
    t = d.t[:, None]
    u = SIGMA * raw(objective, (1 - t) * x + t * d.noise, d.t, d.t, d.labels)
    return ((u - (d.noise - x)) / SIGMA).square().mean(1)


def plain_jumps(objective: Objective, x: Tensor, d: Draws) -> Tensor:
    """Shortcut and progressive self-distillation: average velocities over the whole jump and over its parts."""
    t = d.t[:, None]
    x_t = (1 - t) * x + t * d.noise
    u = raw(objective, x_t, d.t, d.s, d.labels)
    with torch.no_grad():
        first = raw(objective, x_t, d.t, d.r, d.labels)
        between = x_t - (d.t - d.r)[:, None] * SIGMA * first
        second = raw(objective, between, d.r, d.s, d.labels)
        share = ((d.t - d.r) / (d.t - d.s).clamp_min(1e-300))[:, None]
        target = share * first + (1 - share) * second
    return torch.where(d.s < d.t, (u - target).square().mean(1), plain_fm(objective, x, d))


def plain_lagrangian(objective: Objective, x: Tensor, d: Draws) -> Tensor:
    t = d.t[:, None]
    x_t = (1 - t) * x + t * d.noise
    s = d.s.clone().requires_grad_()
    y = jump(objective, x_t, d.t, s, d.labels)
    columns = [torch.autograd.grad(y[:, i].sum(), s, create_graph=True)[0] for i in range(3)]  # reverse mode, not forward
    motion = torch.stack(columns, dim=1)
    with torch.no_grad():
        u = SIGMA * raw(objective, y, d.s, d.s, d.labels)
    jumps = ((motion - u) / SIGMA).square().mean(1)
    return torch.where(d.s < d.t, jumps, plain_fm(objective, x, d))


def plain_meanflow(objective: MeanFlow, x: Tensor, d: Draws) -> Tensor:
    t = d.t[:, None]
    x_t, v = (1 - t) * x + t * d.noise, d.noise - x
    u = SIGMA * raw(objective, x_t, d.t, d.s, d.labels)
    with torch.no_grad():
        along = SIGMA * raw(objective, x_t, d.t, d.t, d.labels) if objective.improved else v
    z, time = x_t.clone().requires_grad_(), d.t.clone().requires_grad_()
    again = SIGMA * raw(objective, z, time, d.s, d.labels)
    change = []
    for i in range(3):
        of_z, of_t = torch.autograd.grad(again[:, i].sum(), (z, time), retain_graph=True)
        change.append((of_z * along).sum(1) + of_t)
    change = torch.stack(change, dim=1)
    error = ((u - (v - (d.t - d.s)[:, None] * change)) / SIGMA).square().mean(1)
    return error / (error.detach() + objective.floor) ** objective.power


def plain_consistency(objective: Consistency, x: Tensor, d: Draws) -> Tensor:
    def at(time: Tensor, labels: Tensor) -> Tensor:
        t = time[:, None]
        return jump(objective, (1 - t) * x + t * d.noise, time, d.s, labels)

    y = at(d.t, d.labels)
    with torch.no_grad():
        target = at(d.r, data(len(x))[1])  # labels of targets are kept
    c = 0.00054 * math.sqrt(3)
    gap = d.t / (1 - d.t) - d.r / (1 - d.r)
    return (((y - target).square().sum(1) + c**2).sqrt() - c) / gap


def plain_energy(objective: EnergyScore, x: Tensor, d: Draws) -> Tensor:
    n = objective.samples
    noise = d.noise.reshape(len(x), n, 3)
    top, low = torch.full_like(d.t, 0.994), torch.zeros_like(d.t)
    y = torch.stack([jump(objective, noise[:, i], top, low, d.labels) for i in range(n)], dim=1)
    near = torch.stack([(y[:, i] - x).norm(dim=1) for i in range(n)], 1).mean(1)
    apart = sum((y[:, i] - y[:, j]).norm(dim=1) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return (2 * near - apart) / (SIGMA * math.sqrt(3))


CASES = [
    ("fm", {}, plain_fm),
    ("fm", {"times": "logit_normal"}, plain_fm),
    ("consistency", {"stage_steps": 10}, plain_consistency),
    ("consistency", {"stage_steps": None, "k": 6}, plain_consistency),
    ("shortcut", {"bootstrap": 0.5, "depth": 4}, plain_jumps),
    ("shortcut", {"bootstrap": 1.0}, plain_jumps),
    ("progressive", {"fm_share": 0.25}, plain_jumps),
    ("lagrangian", {"fm_share": 0.25}, plain_lagrangian),
    ("meanflow", {"fm_share": 0.25}, plain_meanflow),
    ("meanflow", {"fm_share": 0.25, "improved": True, "power": 0.5, "floor": 0.1}, plain_meanflow),
    ("energy", {"samples": 3}, plain_energy),
]


@pytest.mark.parametrize(("kind", "settings", "plain"), CASES)
def test_value_and_gradient_are_those_of_the_equation(kind, settings, plain) -> None:
    objective = made(kind, **settings)
    objective.step = 25
    x, labels = data()
    draws = objective.draw(x, labels, torch.Generator().manual_seed(2))
    loss, stats = objective(x, labels, draws=draws, grad_scale=3.0)
    weights = list(objective.parameters())
    got = torch.autograd.grad(loss, weights)
    expected = plain(objective, x, draws).mean()
    wanted = torch.autograd.grad(3.0 * expected, weights)
    assert float(loss) == pytest.approx(3.0 * float(expected), rel=1e-9)
    assert float(stats["loss"]) == pytest.approx(float(expected), rel=1e-9)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_images_at_s_equal_to_t_cost_one_forward_and_no_tangent() -> None:
    objective = made("meanflow", fm_share=0.75)
    x, labels = data()
    draws = objective.draw(x, labels, torch.Generator().manual_seed(2))
    assert draws.jumps is not None
    assert draws.jumps.equal(draws.s < draws.t)
    assert int(draws.jumps.sum()) == 3
    rows: list[int] = []
    objective.flow_map.network.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    value, _ = objective(x, labels, draws=draws)
    assert rows == [9, 3]
    read, _ = objective(x, labels, draws=Draws(draws.t, draws.s, draws.r, draws.noise, draws.labels))
    assert read.equal(value)


@pytest.mark.parametrize(("kind", "settings", "plain"), CASES)
def test_draws_keep_their_ranges_and_parts_of_a_batch_are_the_batch(kind, settings, plain) -> None:
    objective = made(kind, **settings)
    x, labels = data(48)
    draws = objective.draw(x, labels, torch.Generator().manual_seed(3))
    assert all(value.dtype == torch.float64 and len(value) == 48 for value in (draws.t, draws.s, draws.r))
    assert bool(((draws.s <= draws.r) & (draws.r <= draws.t) & (draws.t <= 0.994) & (draws.s >= 0)).all())
    share = {"shortcut": "bootstrap", "progressive": "fm_share", "lagrangian": "fm_share", "meanflow": "fm_share"}.get(kind)
    if share is not None:
        alone = float((draws.s == draws.t).double().mean())
        assert alone == pytest.approx(1 - settings[share] if kind == "shortcut" else settings[share], abs=0.03)
    whole, _ = objective(x, labels, draws=draws)
    parts = [objective(x[i : i + 16], labels[i : i + 16], draws=draws.part(i, i + 16))[0] for i in (0, 16, 32)]
    assert float(whole) == pytest.approx(float(sum(parts)) / 3, rel=1e-9)


def test_the_kernel_form_of_consistency_is_imm_with_one_particle_bit_for_bit() -> None:
    x, labels = data()
    consistency = made("consistency", distance="kernel", stage_steps=None, k=8)
    imm = IMM(consistency.flow_map, particles=1, k=8)
    draws = consistency.draw(x, labels, torch.Generator().manual_seed(0))
    assert not draws.s.any()
    ours, theirs = (objective(x, labels, draws=draws)[0] for objective in (consistency, imm))
    assert torch.equal(ours, theirs)
    assert torch.equal(consistency.mapping(draws.t, draws.s), imm.mapping(draws.t, draws.s))
    assert IMMObjective is IMM


def test_the_gap_of_ects_schedule_halves_from_stage_to_stage() -> None:
    objective = made("consistency", stage_steps=10, stages=5)
    t = torch.tensor([0.3, 0.6, 0.9, 0.99], dtype=torch.float64)
    s = torch.zeros_like(t)
    eta = lambda time: time / (1 - time)
    for step, stage in ((0, 1), (9, 1), (10, 2), (35, 4), (10**6, 5)):
        objective.step = step
        n = 1 + 8 / (1 + torch.exp(SIGMA * eta(t)))  # of the noise level sigma_data eta
        expected = (eta(t) * (1 - n / 2**stage)).clamp_min(0.0)
        torch.testing.assert_close(eta(objective.mapping(t, s)), expected, rtol=1e-9, atol=1e-12)


def test_the_difference_converges_to_the_tangent_as_the_square_of_its_step() -> None:
    x, labels = data()

    def gradient(**settings) -> Tensor:
        objective = made("meanflow", fm_share=0.0, **settings)
        draws = objective.draw(x, labels, torch.Generator().manual_seed(2))
        loss, _ = objective(x, labels, draws=draws)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(objective.parameters()))])

    exact = gradient()
    errors = [float((gradient(derivative="difference", step_size=h) - exact).norm() / exact.norm()) for h in (1e-2, 1e-3, 1e-4)]
    assert errors[2] < 1e-6
    assert 50 < errors[0] / errors[1] < 200


# --- at the exact map of a Gaussian


class Linear(nn.Module):
    """The network of Gaussian data whose flow map is exact at theta = 0: G = (a + theta h(t, s)) x, in Euler-FM.

    With x and eps of one deviation the map keeps the direction: f_{s,t}(x) = x sqrt(v_s / v_t), v = (1 - t)^2 + t^2.
    """

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None) -> Tensor:
        t, s = t / 1000.0, s / 1000.0
        v = lambda time: (1 - time) ** 2 + time**2
        # (x_t - f) / ((t - s) sigma_d) with x_t = sigma_d sqrt(v_t) x; its limit at s = t is the velocity.
        exact = (v(t) - v(s)) / ((t - s) * (v(t).sqrt() + v(s).sqrt()))
        limit = (2 * t - 1) / v(t).sqrt()
        gain = torch.where(s < t, torch.nan_to_num(exact), limit)
        basis = torch.stack([torch.ones_like(t), t - 0.5, (t - s)], dim=-1)
        return (gain + basis @ self.theta)[:, None] * x


def nodes(count: int) -> tuple[Tensor, Tensor]:
    """Gauss-Hermite nodes and weights of N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(count)
    return torch.tensor(x), torch.tensor(w / w.sum())


def expected_gradient(objective: Objective, times: list[tuple[float, float, float]]) -> Tensor:
    """Of each (t, s, r): the gradient to theta, expected over x and eps exactly (the losses are polynomials of them)."""
    z, w = nodes(8)
    x, eps = (SIGMA * v.flatten()[:, None] for v in torch.meshgrid(z, z, indexing="ij"))
    weight = (w[:, None] * w[None]).flatten()
    out = []
    for t, s, r in times:
        full = lambda value: torch.full((len(x),), value, dtype=torch.float64)
        draws = Draws(full(t), full(s), full(r), eps, None)
        per_image, _ = objective.losses(Batch(x, None, None, draws, torch.ones((), dtype=torch.float64)))
        out.append(torch.autograd.grad((weight * per_image).sum(), list(objective.parameters()))[0])
    return torch.stack(out)


JUMPS = [(0.9, 0.1, 0.5), (0.994, 0.0, 0.497), (0.6, 0.3, 0.4), (0.3, 0.05, 0.2)]
STAYS = [(t, t, t) for t in (0.05, 0.3, 0.6, 0.994)]


@pytest.mark.parametrize(
    ("make", "times"),
    [
        (FlowMatching, STAYS),
        (Shortcut, [(t, s, (t + s) / 2) for t, s, _ in JUMPS]),
        (SelfDistillation, JUMPS),
        (lambda f: SelfDistillation(f, kind="lagrangian"), JUMPS),
        (lambda f: MeanFlow(f, power=0.0), [(t, s, s) for t, s, _ in JUMPS]),
        (lambda f: MeanFlow(f, power=0.0, improved=True), [(t, s, s) for t, s, _ in JUMPS]),
    ],
    ids=["fm", "shortcut", "progressive", "lagrangian", "meanflow", "improved"],
)
def test_at_the_exact_map_the_expected_gradient_is_zero_and_off_it_not(make, times) -> None:
    """The negative control: a map that is off has a gradient."""
    objective = make(FlowMap(Linear(), second_time="identity"))
    assert float(expected_gradient(objective, times).abs().max()) < 1e-6
    with torch.no_grad():
        objective.flow_map.network.theta[0] = 0.1
    assert bool((expected_gradient(objective, times)[:, 0].abs() > 1e-3).all())


def test_the_energy_score_has_no_gradient_at_the_true_law_and_one_off_it() -> None:
    """Monte Carlo: three standard errors. The jump from t_max keeps the Gaussian; a wider or narrower one is pulled back."""

    def gradients(theta: float, count: int = 200_000) -> Tensor:
        objective = EnergyScore(FlowMap(Linear(), second_time="identity"), samples=2)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(count, 1, dtype=torch.float64, generator=generator) * SIGMA
        with torch.no_grad():
            objective.flow_map.network.theta[0] = theta
        draws = objective.draw(x, None, generator)
        # The exact map takes N(0, v(t_max)) to N(0, v(0)); the noise has deviation 1.
        scale = math.sqrt(0.994**2 + 0.006**2)
        draws = Draws(draws.t, draws.s, draws.r, draws.noise * scale, None)
        blocks = []
        for i in range(0, count, count // 40):
            part = slice(i, i + count // 40)
            loss, _ = objective(x[part], draws=draws.part(part.start, part.stop))
            blocks.append(torch.autograd.grad(loss, objective.flow_map.network.theta)[0][0])
        return torch.stack(blocks)

    at = gradients(0.0)
    error = float(at.std() / math.sqrt(len(at)))
    assert abs(float(at.mean())) < 3 * error
    assert float(gradients(0.1).mean()) > 10 * error
    assert float(gradients(-0.1).mean()) < -10 * error


class Walk(nn.Module):
    """The map f_{0,t}(x) = a x of one time that is being solved for, and of the earlier one with its solved gain."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.time, self.before = 0.0, 1.0

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None) -> Tensor:
        t = t / 1000.0
        a = torch.where((t - self.time).abs() < 1e-9, self.gain, torch.full_like(t, self.before))
        deviation = ((1 - t) ** 2 + t**2).sqrt()  # of x_t over sigma_d: the network sees x_t over its own
        return ((1 - a) * deviation / t.clamp_min(1e-300))[:, None] * x


def deviation(make, groups: int, steps: int) -> float:
    """The deviation of f_{0,t_max}(noise) over the true one, where each time in turn is given the gain that minimises the loss
    against the one before (infinite capacity); x and eps are quasi-random."""
    network = Walk()
    objective = make(FlowMap(network, second_time="identity"))
    sobol = torch.quasirandom.SobolEngine(2 * objective.particles, scramble=True, seed=0).draw(groups, dtype=torch.float64)
    sample = SIGMA * math.sqrt(2) * torch.erfinv(2 * sobol.clamp(1e-12, 1 - 1e-12) - 1).reshape(-1, 2)
    x, eps = sample[:, :1].contiguous(), sample[:, 1:].contiguous()
    r, top = 0.0, 0.994 / 0.006
    for i in range(1, steps + 1):
        t = 0.994 if i == steps else top * i / steps / (1 + top * i / steps)
        full = lambda value: torch.full((groups,), value, dtype=torch.float64)
        assert float(objective.mapping(t, 0.0)) == pytest.approx(r, abs=1e-9)
        network.time = t
        width = min(0.8, 6 * (t - r) / max(t, 0.02) + 1e-3)
        low, high = network.before * (1 - width), network.before * (1 + width)
        draws = Draws(full(t), full(0.0), full(r), eps, None)
        batch = Batch(x, None, None, draws, torch.ones((), dtype=torch.float64))

        def slope(gain: float, batch: Batch = batch) -> float:
            with torch.no_grad():
                network.gain.fill_(gain)
            return float(torch.autograd.grad(objective.losses(batch)[0].mean(), network.gain)[0])

        below, above = slope(low), slope(high)
        assert below < 0 < above
        for _ in range(8):  # false position, in its Illinois form
            middle = (low * above - high * below) / (above - below)
            found = slope(middle)
            if found > 0:
                high, above, below = middle, found, below / 2
            else:
                low, below, above = middle, found, above / 2
        network.before, r = middle, t
    return network.before * math.sqrt((1 - r) ** 2 + r**2)


@pytest.mark.parametrize(
    ("make", "groups", "expected"),
    [
        (lambda f: Consistency(f, distance="kernel", stage_steps=None, k=6), 16384, 0.354),
        (lambda f: IMM(f, particles=4, k=6), 4096, 0.796),
        (lambda f: IMM(f, particles=4, k=6, kernel="energy"), 4096, 0.712),
    ],
    ids=["consistency", "imm, laplace", "imm, energy"],
)
def test_the_recursion_shrinks_a_gaussian_as_the_theory_says(make, groups, expected) -> None:
    """Closed forms for the same walk in 2^6 steps: how much spread few particles and coarse steps lose."""
    assert deviation(make, groups, 64) == pytest.approx(expected, abs=0.02)


# --- what all share


@pytest.mark.parametrize("kind", list(OBJECTIVES))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_loss_trains_a_network_of_ours_in_either_precision(kind, precision) -> None:
    torch.manual_seed(0)
    network = UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    objective = OBJECTIVES[kind](FlowMap(network))
    x, labels = torch.randn(16, 1, 8, 8) * SIGMA, torch.arange(16) % 3
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    draws = objective.draw(x, labels, torch.Generator().manual_seed(0))
    values = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, stats = objective(x, labels, draws=draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(stats["loss"]))
    assert int(stats["nonfinite"]) == 0
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in objective.parameters())
    if kind not in ("imm", "consistency", "meanflow"):  # whose values say little: targets move, weights adapt
        assert values[-1] < values[0]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("fm", {"times": "beta"}, "unknown times 'beta'; expected one of"),
        ("fm", {"label_dropout": 2.0}, "label_dropout: expected a probability, got 2.0"),
        ("consistency", {"distance": "l1"}, "unknown distance 'l1'; expected one of"),
        ("consistency", {"stage_steps": 0}, "stage_steps: expected a whole number >= 1, or None, got 0"),
        ("consistency", {"stages": 0}, "stages: expected a whole number from 1 to 30, got 0"),
        ("consistency", {"particles": 4}, "particles: expected none"),
        ("shortcut", {"bootstrap": -0.1}, "bootstrap: expected a share from 0 to 1, got -0.1"),
        ("shortcut", {"depth": 2.5}, "depth: expected a whole number from 1 to 20, got 2.5"),
        ("progressive", {"fm_share": 1.5}, "fm_share: expected a share from 0 to 1, got 1.5"),
        ("meanflow", {"derivative": "exact"}, "unknown derivative 'exact'; expected one of"),
        ("meanflow", {"step_size": 0.0}, r"step_size: expected a number in \(0, 0.5\), got 0.0"),
        ("meanflow", {"floor": 0.0}, "power and floor: expected"),
        ("energy", {"samples": 1}, "samples: expected a whole number >= 2, got 1"),
    ],
)
def test_bad_settings_are_refused(kind, settings, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        made(kind, **settings)


def test_meanflow_wants_euler_fm_and_lagrangian_says_what_it_switches() -> None:
    with pytest.raises(ValueError, match="parametrization: expected \"euler_fm\" for meanflow, got 'simple_edm'"):
        MeanFlow(flow_map(parametrization="simple_edm"))
    network = DiT("S", resolution=8)
    with pytest.warns(UserWarning, match="DiT: switched to its plain form"):
        SelfDistillation(FlowMap(network), kind="lagrangian")
    assert network.fused is False


def test_losses_of_jumps_want_a_network_that_sees_s() -> None:
    for kind, make in OBJECTIVES.items():
        velocity = FlowMap(Smooth(), second_time="none")
        if kind in ("fm", "consistency", "energy"):
            make(velocity)
        else:
            with pytest.raises(ValueError, match=r'second_time: expected "stride" or "identity" for \w+, got "none"'):
                make(velocity)


def test_settings_name_the_loss_and_its_arguments() -> None:
    for kind in OBJECTIVES:
        settings = made(kind).settings
        assert settings["loss"] == kind
        assert {"label_dropout", "share_dropout"} <= settings.keys()
    assert made("shortcut", depth=3).settings["depth"] == 3


def test_meanflow_through_the_fused_dit_is_that_of_the_plain_one() -> None:
    torch.manual_seed(0)
    network = DiT("S", resolution=8, num_classes=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
    objective = MeanFlow(FlowMap(network), fm_share=0.0, power=0.0)
    x, labels = torch.randn(2, 4, 8, 8) * SIGMA, torch.tensor([0, 2])
    draws = objective.draw(x, labels, torch.Generator().manual_seed(0))
    found = []
    for fused in (True, False):
        network.fused = fused
        loss, _ = objective(x, labels, draws=draws)
        found.append((loss.detach(), torch.autograd.grad(loss, network.final_layer.linear.weight)[0]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4 * float(found[1][1].abs().max()))
