"""Networks that are conditioned on numbers z: flow map, losses, samplers, and the head for tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from imm import FlowMap, Sampler, noise
from imm.networks import CausalTransformer, TokenHead
from imm.objectives import IMM, OBJECTIVES, EnergyScore, FlowMatching, Objective
from imm.ops import native
from imm.sampling import initial_state, pushforward, restart, time_grid
from imm.sampling.loop import LATENT
from imm.sampling.package import Package, export

D, C = 6, 5


def head(latent: int = 0, width: int = 16, **settings) -> TokenHead:
    torch.manual_seed(0)
    network = TokenHead(D, C, width=width, depth=2, latent_dim=latent, **settings)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network.eval()


def batch(count: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 0.5 * torch.randn(count, D, generator=generator), torch.randn(count, C, generator=generator)


def test_z_reaches_the_network_and_gets_a_gradient() -> None:
    flow_map = FlowMap(head().double())
    x, z = (value.double() for value in batch(3))
    jump = lambda z: flow_map(x, 0.7, 0.2, cond=z)
    assert torch.autograd.gradcheck(jump, z.requires_grad_())
    assert torch.autograd.gradcheck(lambda z: flow_map.velocity(x, 0.4, cond=z), z)


@pytest.mark.parametrize("latent", [0, 3])
def test_modulations_at_once_are_those_of_each_step(latent) -> None:
    network = head(latent).double()
    x, z = (value.double() for value in batch())
    cond = torch.cat([z, torch.randn(len(z), latent)], 1)
    t, s = torch.tensor([900.0, 500.0, 100.0]).double(), torch.tensor([400.0, 400.0, 100.0]).double()
    rows = network.condition(cond, network.embed_times(t, s))
    for i in range(3):
        each = network(x, t[i].expand(len(x)), s[i].expand(len(x)), cond=cond)
        torch.testing.assert_close(network(x, cond=cond, modulation=rows[i]), each, rtol=1e-9, atol=1e-9)


def test_a_new_head_gives_zero_and_keeps_ends_and_times_in_full_precision_under_autocast() -> None:
    x, z = batch()
    t = torch.full((len(x),), 500.0, dtype=torch.float64)
    assert not TokenHead(D, C, 16, 2)(x, t, t, cond=z).any()
    network = head()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, t, t, cond=z)
        assert network.condition(z, network.embed_times(t[:1], t[:1])).dtype == torch.float32
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, network(x, t, t, cond=z), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_loss_takes_z_and_its_targets_give_it_no_gradient(name) -> None:
    """Against the same loss of a network that holds z itself, once with a gradient to z and once without in its targets."""

    class Holds(nn.Module):
        num_classes = 0

        def __init__(self, network: TokenHead, z: Tensor) -> None:
            super().__init__()
            self.network, self.z = network, z

        def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None) -> Tensor:
            z = self.z.repeat(len(x) // len(self.z), 1)
            return self.network(x, t, s, cond=z if torch.is_grad_enabled() else z.detach())

    x, z = batch()
    z.requires_grad_()
    objective = OBJECTIVES[name](FlowMap(head()), **({"bootstrap": 1.0} if name == "shortcut" else {}))
    if hasattr(objective, "fm_share"):
        objective.fm_share = 0.0  # all rows in one call, in their order
    draws = objective.draw(x, generator=torch.Generator().manual_seed(2))
    if name == "energy":  # whose rows are repeated one by one
        held: Objective = OBJECTIVES[name](FlowMap(Holds(head(), z.repeat_interleave(4, 0))))
    else:
        held = OBJECTIVES[name](FlowMap(Holds(head(), z)), **({"bootstrap": 1.0} if name == "shortcut" else {}))
    found = []
    for one, cond in ((objective, z), (held, None)):
        loss, _ = one(x, draws=draws, cond=cond)
        found.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert found[0][1].abs().max() > 0


def test_groups_are_cut_from_shuffled_rows_and_masked_rows_do_not_count() -> None:
    objective = IMM(FlowMap(head()), particles=4)
    x, z = batch(24)
    seeded = lambda: torch.Generator().manual_seed(3)
    order = torch.randperm(24, generator=(generator := seeded()))
    draws = objective.draw(x[order], generator=generator)
    expected, _ = objective(x[order], cond=z[order], draws=draws)
    assert objective(x, cond=z, generator=seeded())[0].equal(expected)

    mask = torch.arange(24) % 3 != 0  # 16 rows
    one = IMM(FlowMap(head()), particles=1)
    for loss in (one, FlowMatching(FlowMap(head())), EnergyScore(FlowMap(head(3)), samples=2)):
        whole, _ = loss(x[mask], cond=z[mask], generator=seeded())
        bad = torch.where(mask[:, None], x, 1e3)
        assert loss(bad, cond=z, mask=mask, generator=seeded())[0].equal(whole)
    five = torch.arange(24) < 5
    stats = objective(x, cond=z, mask=five)[1]
    assert int(stats["t_bin_count"].sum()) == 1  # 5 rows are one group of 4


def test_the_energy_score_of_a_latent_is_that_of_samples_given_one_state() -> None:
    objective = EnergyScore(FlowMap(head(3).double()), samples=3)
    x, z = (value.double() for value in batch())
    draws = objective.draw(x, generator=torch.Generator().manual_seed(4))
    assert float((draws.t == 0.994).double().mean()) == pytest.approx(0.3, abs=0.2)
    assert bool((draws.s == 0).all())
    loss, _ = objective(x, cond=z, draws=draws)
    assert draws.latent is not None
    t = draws.t[:, None]
    x_t = (1 - t) * x + t * draws.noise
    xi = draws.latent.reshape(24, 3, 3)
    y = torch.stack([objective.flow_map(x_t, draws.t, 0.0, cond=torch.cat([z, xi[:, n]], 1)) for n in range(3)], 1)
    distance = lambda a, b: (a - b).norm(dim=1)
    pull = sum(distance(y[:, n], x) for n in range(3)) / 3
    push = sum(distance(y[:, n], y[:, m]) for n in range(3) for m in range(3) if n != m) / 6
    expected = (2 * pull - push) / (0.5 * D**0.5)
    assert float(loss.detach()) == pytest.approx(float(expected.detach().mean()), rel=1e-6)


@pytest.mark.parametrize("latent", [0, 3])
def test_the_sampler_gives_what_jumps_give_and_a_row_does_not_depend_on_the_others(latent) -> None:
    flow_map = FlowMap(head(latent))
    _, z = batch(8)
    seeds = torch.arange(8) * 7
    times = time_grid(flow_map, 3)
    x = initial_state(flow_map, seeds, (D,))
    sampler = Sampler(flow_map, steps=3, method="restart", shape=(D,), rows=5)
    got = sampler.sample(seeds, cond=z)
    assert got.equal(sampler.sample(seeds, cond=z))
    torch.testing.assert_close(got, restart(flow_map, x, times, seeds=seeds, cond=z), rtol=1e-6, atol=1e-6)
    for i, (t, s) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        xi = noise(seeds, (latent,), LATENT + i) if latent else torch.empty(8, 0)
        x = flow_map(x, t, times[-1].item(), cond=torch.cat([z, xi], 1))
        if i < 2:
            x = (1 - s) * x + s * 0.5 * noise(seeds, (D,), i + 1)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
    alone = sampler.sample(seeds[6:7], cond=z[6:7])
    assert alone.equal(got[6:7])
    if not latent:
        forward = Sampler(flow_map, steps=3, shape=(D,)).sample(seeds, cond=z)
        assert forward.equal(pushforward(flow_map, initial_state(flow_map, seeds, (D,)), times, cond=z))


def test_z_is_copied_once_a_run_and_not_once_a_step() -> None:
    flow_map = FlowMap(head())
    seen: list[int] = []
    flow_map.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["cond"].data_ptr()), with_kwargs=True
    )
    sampler = Sampler(flow_map, steps=4, shape=(D,), rows=8)
    for seed in range(2):
        sampler.sample(range(8), cond=torch.full((8, C), float(seed)))
    assert len(seen) == 8
    assert len(set(seen[:4])) == 1
    if native.module() is not None:  # the loop's own memory, which a graph reads too
        assert len(set(seen)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_has_the_same_bits_whether_its_weights_ask_for_gradients(dtype) -> None:
    flow_map = FlowMap(head().to(dtype))
    sample = lambda: Sampler(flow_map, steps=2, shape=(D,)).sample(range(3), cond=batch(3)[1])
    expected = sample()
    flow_map.requires_grad_(False)
    assert sample().equal(expected)


def test_z_that_does_not_fit_is_refused() -> None:
    flow_map, (x, z) = FlowMap(head()), batch(4)
    for call in (
        lambda cond: flow_map(x, 0.5, 0.1, cond=cond),
        lambda cond: FlowMatching(flow_map)(x, cond=cond),
        lambda cond: Sampler(flow_map, steps=1, shape=(D,)).sample(range(4), cond=cond),
        lambda cond: pushforward(flow_map, x, time_grid(flow_map, 1), cond=cond),
    ):
        with pytest.raises(ValueError, match=r"cond: expected floating \[4, 5\].*, got \[4, 4\] of torch.float32"):
            call(z[:, :4])
        with pytest.raises(ValueError, match=r"cond: expected floating \[4, 5\].* for this network, got None"):
            call(None)

    class Plain(nn.Module):
        num_classes = 0

        def forward(self, x, t, s, labels):
            return x

    with pytest.raises(ValueError, match=r"cond: expected None for this network, got \[4, 5\]"):
        FlowMap(Plain())(x, 0.5, 0.1, cond=z)
    with pytest.raises(ValueError, match=r"cond: expected None for this network, got \[4, 5\]"):
        FlowMatching(FlowMap(Plain()))(x, cond=z)
    with pytest.raises(ValueError, match="latent_dim: expected 0 for FlowMatching, got 3"):
        FlowMatching(FlowMap(head(3)))
    with pytest.raises(ValueError, match=r"mask: expected \[4\] bool, got \[3\] of torch.bool"):
        FlowMatching(flow_map)(x, cond=z, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected particles = 4 rows or more that count, got 0"):
        IMM(flow_map, particles=4)(x, cond=z, mask=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="seeds: expected those of the images"):
        restart(FlowMap(head(3)), x, time_grid(flow_map, 1), cond=z)
    with pytest.raises(ValueError, match="depth: expected a size >= 1, got 0"):
        TokenHead(D, C, depth=0)


def test_a_package_of_a_head_is_the_head(tmp_path) -> None:
    flow_map = FlowMap(head(3))
    _, z = batch(5)
    export(flow_map, tmp_path / "head.pt2", rows=4, steps=2, method="restart", shape=(D,))
    package = Package(tmp_path / "head.pt2")
    expected = Sampler(flow_map, steps=2, method="restart", shape=(D,)).sample(range(5), cond=z)
    torch.testing.assert_close(package.sample(range(5), cond=z), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"cond: expected \[5, 5\], got None"):
        package.sample(range(5))


def test_decoding_with_a_cache_is_the_whole_forward() -> None:
    torch.manual_seed(0)
    backbone = CausalTransformer(D, 16, depth=2, heads=4, max_tokens=7, num_classes=3).eval()
    tokens, labels = torch.randn(2, 7, D), torch.tensor([1, 3])
    whole = backbone(tokens, labels)
    cache = backbone.make_cache(2, 7)
    z, slots = backbone.prefill(labels, cache)
    assert slots == 1
    for n in range(7):
        torch.testing.assert_close(z, whole[:, n], rtol=1e-5, atol=1e-5)
        if n < 6:
            z = backbone.decode(tokens[:, n], torch.tensor([slots + n]), cache)
    changed = tokens.clone()
    changed[:, 4:] = 0.0
    assert backbone(changed, labels)[:, :5].equal(whole[:, :5])  # z_n sees the tokens before n alone
    with pytest.raises(ValueError, match=r"tokens: expected \[B, 1..7, 6\], got \[2, 8, 6\]"):
        backbone(torch.randn(2, 8, D), labels)
    with pytest.raises(ValueError, match="max_tokens: expected 1 to 7, got 8"):
        backbone.make_cache(2, 8)
