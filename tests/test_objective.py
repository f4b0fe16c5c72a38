"""The IMM objective: mappings, weighting, the loss on real code paths, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from parity import DATA
from torch import nn

from imm import FlowMap, IMMObjective
from imm.networks import DiT, UNet
from imm.objectives import T_BINS
from imm.objectives.imm import MAPPINGS

ROWS = json.loads((DATA / "training_weights.json").read_text())


class Linear(nn.Module):
    """The smallest network: one number."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t, s, labels):
        return self.a * x


def objective(**options) -> IMMObjective:
    keys = ("schedule", "parametrization", "t_min", "t_max")
    flow_map = FlowMap(Linear(), **{k: options.pop(k) for k in keys if k in options})
    return IMMObjective(flow_map, **options)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(str(r[k]) for k in ("parametrization", "schedule", "a", "b", "k")))
def test_parity_with_recorded_training_weights(row) -> None:
    target = objective(t_min=row["eps"], t_max=row["T"], **{n: row[n] for n in ("schedule", "parametrization", "a", "b", "k")})
    t, s = (torch.tensor(row[name], dtype=torch.float64) for name in ("t", "s"))
    for value, name in ((target.mapping(t, s), "r"), (target.kernel_scale(t, s), "kernel_scale"), (target.weight(t), "weight")):
        torch.testing.assert_close(value, torch.tensor(row[name], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("k", "t_min", "gaps"),
    [
        (12, 0.0, {0.05: 0.0380, 0.1: 0.0340, 0.5: 0.01032, 0.9: 4.06e-4, 0.98: 1.62e-5, 0.994: 1.46e-6}),
        (15, 0.006, {0.1: 4.11e-3, 0.5: 1.27e-3, 0.9: 5.06e-5, 0.994: 1.82e-7}),
    ],
)
def test_published_gaps(k, t_min, gaps) -> None:
    target = objective(k=k, t_min=t_min)
    for t, gap in gaps.items():
        assert t - float(target.mapping(t, t_min)) == pytest.approx(gap, rel=5e-3)


@pytest.mark.parametrize("kind", MAPPINGS)
def test_mappings_stay_in_order_and_reach_the_end(kind) -> None:
    target = objective(mapping_kind=kind, k=6, t_min=0.006)
    t, s, r = target.sample_times(4000, torch.device("cpu"))
    assert bool(((s <= r) & (r < t)).all())
    assert bool((s >= 0.006).all())
    assert bool((t <= 0.994).all())
    value, hops = 0.994, 0
    while value > 0.006 + 1e-9:
        value = float(target.mapping(value, 0.006))
        hops += 1
    assert hops in (64, 65)  # (range) / 2^k a hop; the last may be a rounding error long


def test_mappings_are_what_they_say() -> None:
    schedule = objective().flow_map.schedule
    for kind, of in (("eta", schedule.eta), ("log_snr", schedule.log_snr), ("inverse_eta", lambda u: 1 / schedule.eta(u))):
        target = objective(mapping_kind=kind, k=8, t_min=0.006)
        step = (of(0.006) - of(0.994)) / 2**8
        assert float(of(target.mapping(0.7, 0.006)) - of(0.7)) == pytest.approx(float(step), rel=1e-9)
    assert float(objective(mapping_kind="t", k=8).mapping(0.7, 0.0)) == pytest.approx(0.7 - 0.994 / 2**8, rel=1e-12)


@pytest.mark.parametrize(("k", "share"), [(10, 0.277), (12, 0.116), (13, 0.071)])
def test_share_of_targets_that_are_data(k, share) -> None:
    _, s, r = objective(k=k).sample_times(200_000, torch.device("cpu"))
    assert float((r == s).double().mean()) == pytest.approx(share, abs=0.005)


def test_min_gap() -> None:
    target = objective(min_gap=1e-4)
    assert float(target.mapping(0.994, 0.0)) == pytest.approx(0.9939, abs=1e-12)
    assert float(target.mapping(0.994, 0.99395)) == 0.99395  # s is nearer
    assert float(target.mapping(0.5, 0.0)) == float(objective().mapping(0.5, 0.0))  # the step is larger already


@pytest.mark.parametrize(
    ("a", "b", "values"),
    [
        (1, 4, (0.335, 4.91, 5.69, 3.93, 1.35, 1.02)),
        (1, 5, (0.907, 7.89, 6.64, 3.97, 1.35, 1.02)),
        (2, 4, (0.333, 4.42, 4.55, 1.96, 0.136, 0.0061)),
    ],
)
def test_published_weights(a, b, values) -> None:
    target = objective(a=a, b=b)
    for t, value in zip((0.006, 0.1, 0.2, 0.5, 0.9, 0.994), values, strict=True):
        assert float(target.weight(t)) == pytest.approx(value, rel=5e-3)


@pytest.mark.parametrize("schedule", ["fm", "vp_cosine"])
def test_weight_is_the_formula_and_finite_at_both_ends(schedule) -> None:
    target = objective(schedule=schedule, parametrization="simple_edm", a=2, b=4)
    s, t = target.flow_map.schedule, torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    formula = 0.5 * torch.sigmoid(4 - s.log_snr(t)) * -s.log_snr_derivative(t) * s.alpha(t) ** 2
    formula = formula / (s.alpha(t) ** 2 + s.sigma(t) ** 2)
    torch.testing.assert_close(target.weight(t), formula, rtol=1e-11, atol=0)
    assert float(target.weight(0.0)) == 0.0
    assert float(target.weight(1e-9)) == pytest.approx(math.e**4 * 1e-9 * (s.speed / 2) ** 2, rel=1e-4)
    assert math.isfinite(float(target.weight(1.0)))


def test_kernel_scale_is_finite_where_s_meets_t() -> None:
    assert float(objective().kernel_scale(0.5, 0.3)) == pytest.approx(1 / (0.5 * 0.2))
    assert math.isfinite(float(torch.tensor(float(objective().kernel_scale(0.5, 0.5 - 1e-16)), dtype=torch.float32)))


def reference_loss(target: IMMObjective, x, labels, seed: int) -> torch.Tensor:
    """The algorithm of section 4.1, written out once more, in float64 and one group at a time."""
    flow_map, particles = target.flow_map, target.particles
    generator = torch.Generator().manual_seed(seed)
    t, s, r = target.sample_times(len(x) // particles, x.device, generator)
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator) * 0.5
    dropped = labels
    if labels is not None and target.label_dropout:
        drop = torch.rand(labels.shape, generator=generator) < target.label_dropout
        dropped = labels.masked_fill(drop, flow_map.num_classes)
    losses = []
    for g in range(len(t)):
        rows = slice(g * particles, (g + 1) * particles)

        def jump(time, which, rows=rows, g=g):
            schedule = flow_map.schedule
            noisy = schedule.alpha(time) * x[rows] + schedule.sigma(time) * eps[rows]
            return flow_map(noisy, time, s[g], None if which is None else which[rows]).flatten(1)

        y_t = jump(t[g], dropped)
        y_r = jump(r[g], labels if target.target_labels == "kept" else dropped).detach()
        kappa = target.kernel_scale(t[g], s[g]) / y_t.shape[1]

        def k(a, b, kappa=kappa):
            dist = (a[:, None] - b[None]).square().sum(-1).clamp_min(1e-16).sqrt()
            return torch.exp(-kappa * dist).mean()

        losses.append(target.weight(t[g]) * (k(y_t, y_t) + k(y_r, y_r) - 2 * k(y_t, y_r)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("target_labels", ["kept", "dropped"])
@pytest.mark.parametrize("particles", [1, 2, 4])
def test_loss_and_gradient_equal_the_written_out_algorithm(particles, target_labels, small_unet) -> None:
    flow_map = FlowMap(small_unet.double())
    target = IMMObjective(flow_map, particles=particles, label_dropout=0.5, target_labels=target_labels, a=1)
    x = torch.randn(8, 1, 8, 8, dtype=torch.float64) * 0.5
    labels = torch.arange(8) % 3
    loss, stats = target(x, labels, generator=torch.Generator().manual_seed(7))
    loss.backward()
    grads = [p.grad.clone() for p in small_unet.parameters()]
    small_unet.zero_grad()
    expected = reference_loss(target, x, labels, 7)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-13)
    for mine, parameter in zip(grads, small_unet.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-7, atol=1e-12)
    assert torch.equal(stats["loss"], loss.detach())


def test_a_single_particle_is_the_consistency_loss() -> None:
    """M = 1 with r = s (k = 1): 2 w (k(0) - k(|y_t - x_s|)) per sample, section 3.9."""
    target = objective(particles=1, k=1, a=1)
    x = torch.randn(6, 5, dtype=torch.float64) * 0.5
    loss, stats = target(x, generator=torch.Generator().manual_seed(3))
    expected = reference_loss(target, x, None, 3)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert float(stats["at_s"]) > 0.9


def test_finite_gradient_with_r_equal_s_and_duplicated_images() -> None:
    target = objective(k=1)
    loss, stats = target(torch.randn(1, 6).repeat(8, 1))
    loss.backward()
    assert float(stats["at_s"]) > 0.5
    assert torch.isfinite(target.flow_map.network.a.grad)


def test_losses_may_be_added_before_one_backward() -> None:
    target, x = objective(), torch.randn(8, 6)

    def gradient(*seeds: int, together: bool) -> torch.Tensor:
        target.flow_map.network.a.grad = None
        losses = []
        for seed in seeds:
            losses.append(target(x, generator=torch.Generator().manual_seed(seed))[0])
            if not together:
                losses.pop().backward()
        if together:
            torch.stack(losses).sum().backward()
        return target.flow_map.network.a.grad

    torch.testing.assert_close(gradient(1, 2, 3, together=True), gradient(1, 2, 3, together=False))


@pytest.mark.parametrize(("given", "after"), [(4096.0, 1.0), (1.0, 4096.0), (3.0, 4096.0 / 3.0)])
def test_a_scaled_loss_gives_a_scaled_gradient(given, after) -> None:
    """By ``grad_scale``, by whoever multiplies the loss, or by both."""
    target, x = objective(particles=2), torch.randn(8, 1, 4, 4)
    gradients, losses = [], []
    for scale, factor in ((None, 1.0), (torch.tensor(given), after)):
        target.flow_map.network.a.grad = None
        loss, stats = target(x, generator=torch.Generator().manual_seed(1), grad_scale=scale)
        assert float(loss.detach()) == pytest.approx(float(stats["loss"]) * (1.0 if scale is None else given), rel=1e-6)
        (factor * loss).backward()
        gradients.append(target.flow_map.network.a.grad)
        losses.append(stats["loss"])
    torch.testing.assert_close(gradients[1], 4096 * gradients[0], rtol=1e-5, atol=0)
    assert torch.equal(*losses)


def test_a_scale_is_one_number() -> None:
    target, x = objective(particles=2), torch.randn(8, 1, 4, 4)
    losses = [target(x, generator=torch.Generator().manual_seed(1), grad_scale=s)[0] for s in (2.0, 2, torch.tensor([2.0]))]
    assert [loss.shape for loss in losses] == [torch.Size([])] * 3
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    with pytest.raises(ValueError, match=r"grad_scale: expected one number, got \[2\]"):
        target(x, grad_scale=torch.ones(2))


@pytest.mark.parametrize("options", [{"kernel": "imq", "bandwidths": (0.5, 2.0)}, {"kernel": "energy", "estimator": "u"}])
def test_other_kernels_and_estimators_reach_the_loss(options) -> None:
    x = torch.randn(8, 1, 4, 4)
    losses = []
    for target in (objective(**options), objective()):
        loss, _ = target(x, generator=torch.Generator().manual_seed(1))
        loss.backward()
        assert torch.isfinite(target.flow_map.network.a.grad)
        with torch.no_grad():  # the same without a gradient
            assert torch.equal(target(x, generator=torch.Generator().manual_seed(1))[0], loss.detach())
        losses.append(float(loss.detach()))
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_no_gradient_through_the_target() -> None:
    target = objective()
    calls = []
    target.flow_map.network.register_forward_hook(lambda m, args, out: calls.append(out.requires_grad))
    target(torch.randn(8, 6))
    assert calls == [True, False]


class Noisy(Linear):
    """Output is dropout alone, and what it drew is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.masks: list[torch.Tensor] = []

    def forward(self, x, t, s, labels):
        out = self.dropout(torch.ones_like(x)) * self.a
        self.masks.append(out.detach() != 0)
        return out


@pytest.mark.parametrize("share", [True, False])
def test_dropout_masks_are_shared(share) -> None:
    network = Noisy()
    target = IMMObjective(FlowMap(network), share_dropout=share)
    target(torch.randn(8, 64), generator=torch.Generator().manual_seed(0))
    first, second = network.masks
    assert torch.equal(first, second) is share
    before = torch.get_rng_state()
    target(torch.randn(8, 64), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(network.masks[2], first)  # and they move on from step to step
    assert not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("target_labels", "kept"), [("kept", True), ("dropped", False)])
def test_label_dropout_choices(target_labels, kept, small_unet) -> None:
    seen = []
    small_unet.register_forward_pre_hook(lambda m, args: seen.append(args[3].clone()))
    labels = torch.zeros(400, dtype=torch.int64)
    target = IMMObjective(FlowMap(small_unet), label_dropout=0.25, target_labels=target_labels)
    target(torch.randn(400, 1, 8, 8), labels)
    dropped = (seen[0] == 3).double().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.08)
    assert torch.equal(seen[1], labels if kept else seen[0])


def test_initial_loss_is_small_and_normal() -> None:
    """Section 8.4: with G = 0 on Gaussian latents the mean weighted loss is near 1e-2."""
    target = objective(a=1)
    target.flow_map.network.a.data.zero_()
    values = []
    for seed in range(3):
        _, stats = target(torch.randn(1024, 4096) * 0.5, generator=torch.Generator().manual_seed(seed))
        values.append(float(stats["loss"]))
        assert int(stats["nonfinite"]) == 0
    assert 4e-3 < sum(values) / 3 < 2e-2


def test_statistics() -> None:
    target = objective(t_min=0.006)
    generator = torch.Generator().manual_seed(5)
    loss, stats = target(torch.randn(64, 10) * 0.5, generator=generator)
    t, s, r = target.sample_times(16, torch.device("cpu"), torch.Generator().manual_seed(5))
    assert float(stats["gap"]) == pytest.approx(float((t - r).mean()))
    assert float(stats["at_s"]) == pytest.approx(float((r == s).double().mean()))
    assert float(stats["t_bin_count"].sum()) == 16
    known = stats["t_bin_count"] > 0
    total = (stats["t_bin_loss"] * stats["t_bin_count"])[known].sum() / 16
    assert float(total) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert len(stats["t_bin_loss"]) == T_BINS
    assert not any(v.requires_grad for v in stats.values())


def test_a_broken_network_is_counted() -> None:
    target = objective()
    target.flow_map.network.a.data.fill_(float("inf"))
    _, stats = target(torch.randn(8, 6))
    assert int(stats["nonfinite"]) == 2


def test_autocast_and_half_networks(device) -> None:
    network = DiT("S", patch=8, num_classes=0).to(device)
    target = IMMObjective(FlowMap(network))
    seen = []
    network.blocks[0].mlp.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast(device, torch.bfloat16):
        loss, _ = target(torch.randn(4, 4, 32, 32, device=device))
    loss.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]  # both branches in one precision
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bandwidths": ()}, "bandwidths: expected one or more"),
        ({"estimator": "w"}, "unknown estimator 'w'; expected one of"),
        ({"estimator": "u", "particles": 1}, "expected 2 or more for the unbiased estimator, got 1"),
        ({"kernel": "gauss"}, "kernel: expected one of .* got 'gauss'"),
        ({"mapping_kind": "lambda"}, "unknown mapping_kind"),
        ({"target_labels": "both"}, "unknown target_labels"),
        ({"particles": 0}, "particles: expected a whole number >= 1, got 0"),
        ({"k": 0}, "k: expected a whole number from 1 to 30"),
        ({"k": 31}, "k: expected a whole number from 1 to 30"),
        ({"particles": 2.0}, "particles: expected a whole number"),
        ({"b": float("nan")}, "b: expected"),
        ({"b": 800.0}, "b: expected"),
        ({"a": -1}, "a: expected a whole exponent"),
        ({"label_dropout": 1.5}, "expected a probability, got 1.5"),
        ({"min_gap": 0.0}, "min_gap"),
        ({"t_max": 1.0}, "mapping_kind 'eta': expected t_max < 1"),
        ({"mapping_kind": "log_snr"}, "expected t_min > 0"),
        ({"mapping_kind": "inverse_eta"}, "expected t_min > 0"),
    ],
)
def test_bad_settings_are_refused(options, text) -> None:
    with pytest.raises(ValueError, match=text):
        objective(**options)


def test_bad_batches_are_refused(small_flow_map) -> None:
    target = IMMObjective(small_flow_map)
    x = torch.randn(8, 1, 8, 8)
    for images, labels, text in (
        (x[:6], None, "multiple of particles = 4, got 6"),
        (x[:0], None, "multiple of particles = 4, got 0"),
        (torch.full_like(x, float("nan")), None, "expected finite data, got NaN"),
        (x.long(), None, r"expected a floating \[B, \.\.\.\], got \[8, 1, 8, 8\] of torch.int64"),
        (x, torch.full((8,), 9), r"classes 0\.\.2 or 3 for none"),
        (x, torch.zeros(4, dtype=torch.int64), r"labels: expected \[8\]"),
    ):
        with pytest.raises(ValueError, match=text):
            target(images, labels)
    for call in (target.mapping, target.kernel_scale):
        with pytest.raises(ValueError, match=r"expected s < t, got t = 0\.5 and s = 0\.5"):
            call(0.5, 0.5)


def test_a_loss_from_draws_is_the_loss_that_draws(small_flow_map) -> None:
    target = IMMObjective(small_flow_map, label_dropout=0.5)
    x, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    loss, stats = target(x, labels, generator=torch.Generator().manual_seed(3))
    draws = target.draw(x, labels, torch.Generator().manual_seed(3))
    again, other_stats = target(x, labels, draws=draws)
    assert torch.equal(loss, again)
    torch.testing.assert_close(stats, other_stats, rtol=0, atol=0, equal_nan=True)
    parts = [target(x[i : i + 4], labels[i : i + 4], draws=draws.part(i // 4, i // 4 + 1))[0] for i in (0, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss)
    with pytest.raises(ValueError, match=r"draws: expected those of 1 groups and noise \[4, 1, 8, 8\], got \[8, 1, 8, 8\]"):
        target(x[:4], labels[:4], draws=draws)


def test_a_network_is_told_only_what_it_can_be_told() -> None:
    x, told = torch.randn(4, 1, 8, 8) * 0.5, torch.zeros(4, 9)
    deaf = IMMObjective(FlowMap(UNet(channels=1, resolution=8, num_classes=0, width=8, multipliers=(1,))), particles=2)
    with pytest.raises(ValueError, match=r"augment: expected none for this network and call, got \[4, 9\]"):
        deaf(x, augment=told)
