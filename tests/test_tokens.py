"""Sequences of continuous tokens: one seed a sequence, whatever is sampled beside it and however it is cut."""

from __future__ import annotations

import gc
import math
import pickle
import re
import resource
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from imm import FlowMap, Sampler, TokenSampler, noise, package
from imm.evaluation import covariance_slope, forced_energy_score
from imm.functional import energy_score
from imm.networks import CausalTransformer, TokenHead
from imm.objectives import IMM, EnergyScore
from imm.objectives.base import Batch
from imm.ops import native
from imm.sampling import tokens as module

D, C, T = 4, 32, 8  # features in whole vectors: a row's bits do not depend on its place


def networks(latent: int = 0) -> tuple[CausalTransformer, FlowMap]:
    torch.manual_seed(0)
    backbone = CausalTransformer(D, C, depth=2, heads=2, max_tokens=T, num_classes=3).eval()
    head = TokenHead(D, C, width=32, depth=1, latent_dim=latent, frequencies=8)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone, FlowMap(head).eval()


def sampler(latent: int = 0, **settings: Any) -> TokenSampler:
    return TokenSampler(*networks(latent), **{"steps": 2, "max_tokens": T, **settings})


SEEDS, LABELS = [7, 0, 2**40, 5], [0, 3, 2, 1]
in_python = pytest.mark.parametrize("python", [False, True], ids=["native", "python"])


@pytest.fixture
def loops(python: bool, monkeypatch: pytest.MonkeyPatch) -> bool:
    if python:
        monkeypatch.setattr(module.native, "module", lambda: None)
    elif native.module() is None:
        pytest.skip(f"no native library: {native.status()}")
    return python


@in_python
@pytest.mark.parametrize("latent", [0, 3])
def test_a_token_is_the_jumps_of_the_head_given_what_the_backbone_made_of_those_before(loops, latent) -> None:
    backbone, flow_map = networks(latent)
    made = sampler(latent, steps=2).sample(SEEDS, LABELS)
    assert made.shape == (4, T, D)
    with torch.no_grad():
        z = backbone(made, torch.tensor(LABELS))
    method = "restart" if latent else "pushforward"
    times = [0.994, 0.497, 0.0]
    x = 0.5 * noise(SEEDS, (T, D))
    for i in range(2):
        xi = noise(SEEDS, (T, latent), module.LATENT + i) if latent else torch.empty(4, T, 0)
        cond, target = torch.cat([z, xi], 2).flatten(0, 1), times[-1] if method == "restart" else times[i + 1]
        x = flow_map(x.flatten(0, 1), times[i], target, cond=cond).reshape(4, T, D)
        if method == "restart" and i == 0:
            x = (1 - times[1]) * x + times[1] * 0.5 * noise(SEEDS, (T, D), 1)
    torch.testing.assert_close(made, x.detach(), rtol=1e-4, atol=1e-5)


@in_python
@pytest.mark.parametrize("latent", [0, 3])
def test_a_sequence_does_not_depend_on_the_batch_the_length_or_the_cuts(loops, latent) -> None:
    fixed = sampler(latent, rows=3)
    whole = fixed.sample(SEEDS, LABELS)
    for i, (seed, label) in enumerate(zip(SEEDS, LABELS, strict=True)):
        assert fixed.sample([seed], [label]).equal(whole[i : i + 1])
        assert fixed.sample([seed], [label], tokens=5).equal(whole[i : i + 1, :5])
        alone = sampler(latent).sample([seed], [label])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-4)
    for chunk in (1, 3, T):
        parts = list(fixed.stream(SEEDS[:3], LABELS[:3], chunk=chunk))
        assert [part.shape[1] for part in parts] == [min(chunk, T - n) for n in range(0, T, chunk)]
        assert torch.cat(parts, 1).equal(whole[:3])


@pytest.mark.skipif(native.module() is None, reason=f"no native library: {native.status()}")
@pytest.mark.parametrize(("settings", "guidance"), [({}, None), ({"guide": "output"}, 1.7), ({"guide": "cond"}, [0.5, 2.0])])
@pytest.mark.parametrize("latent", [0, 3])
def test_the_native_loop_is_the_python_loop_bitwise(settings, guidance, latent, monkeypatch) -> None:
    call = lambda: sampler(latent, **settings).sample(SEEDS[:2], LABELS[:2], 6, guidance=guidance, temperature=0.8)
    made = call()
    monkeypatch.setattr(module.native, "module", lambda: None)
    assert call().equal(made)


@in_python
def test_guidance_goes_from_none_to_the_label(loops) -> None:
    for guide in ("output", "cond"):
        guided = sampler(guide=guide, guidance=1.0)
        torch.testing.assert_close(guided.sample(SEEDS, LABELS), sampler().sample(SEEDS, LABELS), rtol=1e-4, atol=1e-5)
        none = guided.sample(SEEDS, LABELS, guidance=0.0)
        torch.testing.assert_close(none, sampler().sample(SEEDS), rtol=1e-4, atol=1e-5)
        far = guided.sample(SEEDS, LABELS, guidance=3.0)
        assert (far[0] - none[0]).norm() > (guided.sample(SEEDS, LABELS)[0] - none[0]).norm()
        each = guided.sample(SEEDS, LABELS, guidance=[3.0, 0.0, 0.0, 0.0])
        torch.testing.assert_close(torch.cat([far[:1], none[1:]]), each, rtol=1e-4, atol=1e-5)


@in_python
def test_a_backbone_is_given_the_first_slots_that_hold_the_position(loops, monkeypatch) -> None:
    backbone, flow_map = networks()
    expected = sampler(rows=2).sample(SEEDS[:2], LABELS[:2])
    seen: list[tuple[int, int]] = []

    class Watched(CausalTransformer):
        def decode(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
            seen.append((int(position), cache[0].shape[2]))
            return super().decode(token, position, cache)

    watched = Watched(D, C, depth=2, heads=2, max_tokens=T, num_classes=3).eval()
    watched.load_state_dict(backbone.state_dict())
    monkeypatch.setattr(module, "LEAST_SLOTS", 3)
    assert module.buckets(T) == [3, 6, T]
    assert (module.buckets(3), module.buckets(2)) == ([3], [2])
    made = TokenSampler(watched, flow_map, steps=2, max_tokens=T, rows=2).sample(SEEDS[:2], LABELS[:2])
    assert seen == [(1, 3), (2, 3), (3, 6), (4, 6), (5, 6), (6, T), (7, T)]
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@in_python
def test_temperature_scales_the_noise_that_a_token_starts_from(loops) -> None:
    cold = sampler(steps=1)
    one, two = cold.sample([1, 2], [0, 0], temperature=0.0)
    assert one.equal(two)
    one, two = cold.sample([1, 2], [0, 0])
    assert not one.isclose(two).any()


@in_python
def test_stop_cuts_where_it_says(loops) -> None:
    whole = sampler(rows=2).sample(SEEDS[:2], LABELS[:2])
    seen: list[Tensor] = []

    def after(first: int, second: int) -> Any:
        """A stop function by the number of calls: sequence 0 ends with token `first`, sequence 1 with token `second`."""
        calls = iter(range(T))

        def stop(z: Tensor) -> Tensor:
            assert z.shape == (2, C)
            seen.append(z)
            n = next(calls)
            return torch.tensor([n == first, n >= second])

        return stop

    for chunk in (1, 3, T):
        parts = list(sampler(rows=2).stream(SEEDS[:2], LABELS[:2], chunk=chunk, stop=after(1, 4)))
        made = torch.cat(parts, 1)
        assert made.shape == (2, 5, D)
        assert made[0, :2].equal(whole[0, :2])
        assert bool(made[0, 2:].isnan().all())
        assert made[1].equal(whole[1, :5])
    assert len(seen) == 5 + 6 + T  # asked for each token of the parts that were made
    with pytest.raises(ValueError, match=r"stop: expected \[2\] bool, got \[2, 32\] of torch.float32"):
        list(sampler(rows=2).stream(SEEDS[:2], LABELS[:2], stop=lambda z: z))


@in_python
def test_streams_and_calls_beside_each_other_do_not_mix(loops) -> None:
    one = sampler(rows=2)
    expected = [one.sample([seed, seed + 1], [0, 1]) for seed in range(4)]
    streams = [one.stream([seed, seed + 1], [0, 1]) for seed in range(4)]
    parts = [[next(stream) for stream in streams] for _ in range(T)]
    for i in range(4):
        assert torch.cat([row[i] for row in parts], 1).equal(expected[i])
    del streams
    gc.collect()
    assert len(one.stats()["cached"]) == 4
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: one.sample([i, i + 1], [0, 1])})) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(found[i].equal(expected[i]) for i in range(4))


@in_python
def test_an_interrupt_leaves_the_sampler_usable(loops) -> None:
    backbone, flow_map = networks()
    calls = iter(range(1000))

    class Interrupted(CausalTransformer):
        def decode(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
            if next(calls) == 3:
                raise KeyboardInterrupt
            return super().decode(token, position, cache)

    copy = Interrupted(D, C, depth=2, heads=2, max_tokens=T, num_classes=3).eval()
    copy.load_state_dict(backbone.state_dict())
    one = TokenSampler(copy, flow_map, steps=2, max_tokens=T)
    with pytest.raises(KeyboardInterrupt):
        one.sample(SEEDS, LABELS)
    assert one.sample(SEEDS, LABELS).equal(sampler().sample(SEEDS, LABELS))
    assert one.stats()["cached"] == [(4, False)]


@in_python
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes_and_networks_that_are_cast_later(loops, dtype) -> None:
    backbone, flow_map = networks()
    one = TokenSampler(backbone, flow_map, steps=2, max_tokens=T, rows=2)
    expected = one.sample(SEEDS[:2], LABELS[:2])
    backbone.to(dtype), flow_map.to(dtype)
    made = one.sample(SEEDS[:2], LABELS[:2])
    assert made.dtype == torch.float32
    torch.testing.assert_close(made[:, 0], expected[:, 0], rtol=0.1, atol=0.2)
    assert made.equal(TokenSampler(backbone, flow_map, steps=2, max_tokens=T, rows=2).sample(SEEDS[:2], LABELS[:2]))


@in_python
def test_autocast_and_inference_mode_around_a_call_change_nothing(loops) -> None:
    expected = sampler().sample(SEEDS, LABELS)
    with torch.inference_mode():
        one = sampler()
        assert one.sample(SEEDS, LABELS).equal(expected)
    assert one.sample(SEEDS, LABELS).equal(expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert one.sample(SEEDS, LABELS).equal(expected)
        assert torch.cat(list(sampler().stream(SEEDS, LABELS)), 1).equal(expected)


@in_python
def test_loops_are_dropped_and_given_back_in_any_order(loops) -> None:
    one = sampler()
    expected = one.sample([0])
    stream = one.stream([0])
    first = next(stream)
    for count in range(2, 12):
        one.sample(range(count))
    assert len(one.stats()["cached"]) == module.MAX_LOOPS
    assert torch.cat([first, *stream], 1).equal(expected)
    cycle: list[Any] = [one.stream([0])]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    embed = one.flow_map.network.embed_times
    one.flow_map.network.embed_times = lambda *times: (gc.collect(), embed(*times))[1]  # a collection in the middle of a call
    assert one.sample([0]).equal(expected)


@in_python
def test_stop_sees_the_sequences_that_were_asked_for(loops) -> None:
    one = sampler(rows=4)
    kept: list[Tensor] = []
    stop = lambda z: (kept.append(z), torch.tensor([len(kept) == 2, len(kept) == 4]))[1]
    made = torch.cat(list(one.stream([1, 2], [0, 1], stop=stop)), 1)
    assert made.shape == (2, 4, D)
    assert {tuple(z.shape) for z in kept} == {(2, C)}
    assert not kept[0].equal(kept[1])  # its own, not memory that the next token overwrites


def test_a_sampler_is_the_same_after_a_round_through_bytes() -> None:
    one = sampler(rows=2, guidance=1.5)
    again = pickle.loads(pickle.dumps(one))
    assert again.sample(SEEDS[:2], LABELS[:2]).equal(one.sample(SEEDS[:2], LABELS[:2]))


def test_weights_are_read_at_a_call() -> None:
    backbone, flow_map = networks()
    one = TokenSampler(backbone, flow_map, steps=1, max_tokens=T)
    before = one.sample(SEEDS, LABELS)
    with torch.no_grad():
        flow_map.network.t_embedder.mlp[2].bias.add_(1.0)
    assert not one.sample(SEEDS, LABELS).equal(before)
    assert one.sample(SEEDS, LABELS).equal(TokenSampler(backbone, flow_map, steps=1, max_tokens=T).sample(SEEDS, LABELS))


@in_python
def test_bad_input_is_refused_in_one_line(loops) -> None:
    backbone, flow_map = networks()
    one = sampler()
    for call, message in (
        (lambda: one.sample([1], tokens=T + 1), f"tokens: expected at most {T}, got {T + 1}"),
        (lambda: one.sample([1], [0.5]), "prefix: expected classes as integers, got torch.float32"),
        (lambda: one.sample([1], torch.tensor(1)), r"prefix: expected a row a sequence, 1, got \[\]"),
        (lambda: sampler(guidance=math.nan), "guidance: expected a finite number, got nan"),
        (lambda: sampler(max_tokens=None), "max_tokens: expected a count >= 1, got None"),
        (lambda: one.sample([1], tokens=0), "tokens: expected a count >= 1, got 0"),
        (lambda: one.sample([-1]), "seeds: expected integers"),
        (lambda: one.sample([1], [4]), r"prefix: expected classes 0..2 or 3 for none, got \[4\]"),
        (lambda: one.sample([1], [1, 2]), "prefix: expected a row a sequence, 1, got"),
        (lambda: one.sample([1], guidance=math.nan), "guidance: expected a finite number"),
        (lambda: one.sample([1], temperature=-1.0), "temperature: expected a number >= 0, got -1.0"),
        (lambda: one.stream([1], chunk=0), "chunk: expected a count >= 1, got 0"),
        (lambda: sampler(rows=1).stream([1, 2]), "seeds: expected at most rows = 1 for a stream, got 2"),
        (lambda: sampler(max_tokens=T + 1).sample([1]), f"max_tokens: expected 1 to {T}, got {T + 1}"),
        (lambda: sampler(guide="z"), "unknown guide 'z'"),
        (lambda: sampler(graph=True), "graph=True: expected a CUDA device"),
        (lambda: TokenSampler(backbone.train(), flow_map, max_tokens=T), r"backbone: expected evaluation mode"),
        (
            lambda: TokenSampler(CausalTransformer(D, C + 2, 1, 2, T), flow_map, max_tokens=T),
            "flow_map: expected a network with cond_dim = 34, got 32",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="backbone: expected token_dim, cond_dim, make_cache, prefill, decode, got Linear"):
        TokenSampler(nn.Linear(1, 1), flow_map, max_tokens=T)
    backbone.eval().norm = nn.Linear(C, C + 1)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"backbone: expected z \[1, 32\] of torch.float32 of prefill, got \[1, 33\]"):
        TokenSampler(backbone, flow_map, max_tokens=T).sample([1])
    assert one.sample([]).shape == (0, 0, D)


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.full)])
def test_memory_is_flat_over_sequences_of_random_lengths(count) -> None:
    one = sampler(rows=2)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, T + 1, (count,), generator=generator).tolist()
    for n in lengths[:50]:
        one.sample([n, n + 1], [0, 1], n)
    before = resident()
    for n in lengths:
        one.sample([n, n + 1], [0, 1], n)
    assert resident() - before < 4 << 20


def resident() -> int:
    """Bytes of this process's memory that are in use now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# Packages ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if native.module() is None:
        pytest.skip(f"no native library: {native.status()}")
    path = tmp_path_factory.mktemp("tokens") / "tokens.pt2"
    package.export_tokens(sampler(2), path, rows=2, guided=True)
    return path


def test_a_package_is_the_sampler_to_rounding_and_streams_what_it_samples(exported) -> None:
    packed = package.TokenPackage(exported, guidance=1.5)
    made = packed.sample(SEEDS[:3], LABELS[:3])
    expected = sampler(2, guidance=1.5).sample(SEEDS[:3], LABELS[:3])
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert torch.cat(list(packed.stream(SEEDS[:2], LABELS[:2], chunk=3)), 1).equal(made[:2])
    running = packed.stream(SEEDS[:2], LABELS[:2])
    next(running)
    with pytest.raises(RuntimeError, match="a package runs one call or stream at a time"):
        packed.sample(SEEDS, LABELS)
    running.close()
    assert packed.sample(SEEDS[:1], LABELS[:1], 2).equal(made[:1, :2])
    with pytest.raises(ValueError, match="guidance: expected a scale for a package with guidance, got none"):
        package.TokenPackage(exported).sample(SEEDS)
    with pytest.raises(ValueError, match="guidance: expected a finite number, got nan"):
        package.TokenPackage(exported, guidance=math.nan)
    short = torch.tensor(LABELS[:3], dtype=torch.int32)
    assert packed.sample(SEEDS[:3], short).equal(made)
    with pytest.raises(ValueError, match="guidance: expected a prefix of classes"):
        packed.sample(SEEDS[:3], torch.zeros(3, 2, dtype=torch.int64))
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: packed.sample(SEEDS, LABELS)})) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(found[i].equal(packed.sample(SEEDS, LABELS)) for i in range(3))
    assert pickle.loads(pickle.dumps(packed)).sample(SEEDS[:1], LABELS[:1], 2).equal(made[:1, :2])


def test_the_compiled_models_run_from_python_give_the_same_bits(exported) -> None:
    from torch._inductor.package import load_package

    models = {name: load_package(str(exported), name, run_single_threaded=True) for name in ("prefill", "decode", "head")}
    backbone, flow_map = networks(2)
    steps = sampler(2).steps(True)
    loop = module.PythonTokenLoop(
        prefill=lambda prefix, cache: (models["prefill"](prefix, *cache), 1),
        decode=lambda token, position, cache: models["decode"](token, position, *cache),
        head=lambda z, noise, w: models["head"](z, noise, w.contiguous()),
        cache=backbone.make_cache(4, T),
        rows=2,
        guided=True,
        slots=T,
        device=torch.device("cpu"),
        stream_steps=[step for step, _ in steps.noises],
        stream_widths=[width for _, width in steps.noises],
        buckets=[T],
    )
    prefix, scales = torch.tensor([3, 3, *LABELS[:2]]), [flow_map.sigma_data, *[1.0] * (len(steps.noises) - 1)]
    with torch.no_grad():
        loop.begin(torch.tensor(SEEDS[:2]), prefix, T, scales, torch.tensor([1.5], dtype=torch.float64), None)
        made = loop.next(T)[0]
    assert package.TokenPackage(exported, guidance=1.5).sample(SEEDS[:2], LABELS[:2]).equal(made)


def test_imm_generate_makes_sequences_without_python(exported, tmp_path) -> None:
    program = native.program("imm_generate")
    assert program is not None
    command = [program, f"--package={exported}", "--seeds=7,0", "--labels=0,3", f"--out={tmp_path / 'tokens.npy'}"]
    done = subprocess.run([*command, "--tokens=6", "--guidance=1.5"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 sequences of [6, 4]: ")
    expected = package.TokenPackage(exported, guidance=1.5).sample([7, 0], [0, 3], 6)
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), expected.numpy())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "tokens: expected --tokens=T for a package of a token sampler" in done.stderr) == (2, True)
    done = subprocess.run([*command, "--tokens=60", "--guidance=1.5"], capture_output=True, text=True, check=False)
    assert (done.returncode, "tokens: expected at most 8, got 60" in done.stderr) == (1, True)


# Heads of others --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the Python of the page defines, which runs as it is printed."""
    text = (Path(__file__).parent.parent / "docs" / "learn" / "tokens.md").read_text()
    found: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), found)
    return found


class Mixed(nn.Module):
    """An MLP of all that it is given, side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 32), nn.SiLU(), nn.Linear(32, outputs))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.layers(torch.cat(parts, 1))


def test_the_page_makes_what_it_says(page) -> None:
    assert page["made"].shape == (2, 16, 4)
    assert page["part"].equal(page["made"][:, 12:])


def test_a_head_of_pocket_tts_is_a_flow_map_with_its_time_turned_round(page) -> None:
    torch.manual_seed(0)
    flow_net = Mixed(C + 2 + D, D)  # (c, s, t, x): from s to t, 0 noise and 1 data
    flow_map = page["pocket_flow_map"](flow_net, D, C).eval()
    x, c = torch.randn(5, D), torch.randn(5, C)
    column = lambda value: torch.full((5, 1), value)
    torch.testing.assert_close(flow_map(x, 1.0, 0.0, cond=c), x + flow_net(c, column(0.0), column(1.0), x))
    expected = x + 0.5 * flow_net(c, column(0.25), column(0.75), x)
    torch.testing.assert_close(flow_map(x, 0.75, 0.25, cond=c), expected, rtol=1e-5, atol=1e-6)
    backbone, _ = networks()
    assert TokenSampler(backbone, flow_map, steps=2, max_tokens=T).sample([1, 2]).shape == (2, T, D)


def test_a_generator_of_calm_makes_a_token_of_z_and_noise_in_one_step(page) -> None:
    torch.manual_seed(0)
    generator = Mixed(C + 6, D)  # (hidden, noise uniform in [-0.5, 0.5])
    flow_map = page["calm_flow_map"](generator, D, C, 6).eval()
    backbone, _ = networks()
    made = TokenSampler(backbone, flow_map, steps=1, max_tokens=T).sample([3], [1])
    z = backbone(made, torch.tensor([1]))[0]
    uniform = 0.5 * torch.erf(noise([3], (T, 6), module.LATENT)[0] / 2**0.5)
    assert float(uniform.abs().max()) <= 0.5
    torch.testing.assert_close(made[0], generator(z, uniform).detach(), rtol=1e-4, atol=1e-5)
    loss, _ = EnergyScore(flow_map, samples=2)(torch.randn(9, D), cond=torch.randn(9, C))
    loss.backward()
    assert all(p.grad is not None for p in generator.parameters())


def test_the_loss_of_a_head_stands_where_mar_has_its_own(page) -> None:
    _, flow_map = networks()
    loss = page["FlowMapLoss"](IMM(flow_map, particles=4))
    target, z, mask = torch.randn(40, D), torch.randn(40, C, requires_grad=True), (torch.arange(40) % 2).float()
    loss(target, z, mask).backward()
    assert z.grad is not None
    assert not z.grad[mask == 0].any()
    torch.manual_seed(1)
    made = loss.sample(z.detach())
    assert made.shape == (40, D)
    torch.manual_seed(1)
    x = flow_map.sigma_data * torch.randn(40, D)
    for t, s in ((0.994, 0.497), (0.497, 0.0)):
        x = flow_map(x, t, s, cond=z.detach()).detach()
    torch.testing.assert_close(made, x, rtol=1e-5, atol=1e-5)
    guided = loss.sample(z.detach(), cfg=2.0)
    assert guided[:20].equal(guided[20:])
    _, latent = networks(3)
    torch.manual_seed(1)
    made = page["FlowMapLoss"](EnergyScore(latent), steps=1).sample(z.detach())
    torch.manual_seed(1)
    x, xi = latent.sigma_data * torch.randn(40, D), torch.randn(40, 3)
    torch.testing.assert_close(made, latent(x, 0.994, 0.0, cond=torch.cat([z.detach(), xi], 1)).detach(), rtol=1e-5, atol=1e-5)
    steps = module.HeadSteps(latent, 1, "uniform", (), "restart", None)
    with pytest.raises(ValueError, match=r"noise: expected \[B, 7\], got \[40, 4\]"):
        steps(z.detach(), torch.randn(40, D))


# Scores -----------------------------------------------------------------------------------------------------------------------


def test_the_slope_is_one_for_real_sequences_and_zero_for_shuffled_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    shared = torch.randn(4000, 1, 3, generator=generator)
    real = shared * torch.tensor([1.0, 0.5]).repeat(2)[:, None] + labels[:, None, None]
    real = real + 0.3 * torch.randn(4000, 4, 3, generator=generator)
    shuffled = real.clone()
    for n in range(4):
        for label in (0, 1):
            own = (labels == label).nonzero().flatten()
            shuffled[own, n] = real[own[torch.randperm(len(own), generator=generator)], n]
    half = slice(0, 2000)
    assert covariance_slope(real[half], labels[half], real[2000:], labels[2000:]) == pytest.approx(1.0, abs=0.1)
    assert covariance_slope(shuffled, labels, real, labels) == pytest.approx(0.0, abs=0.05)
    assert covariance_slope(0.5 * real, labels, real, labels) == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match=r"samples: expected \[N, 4, 3\], got \[4000, 3, 4\]"):
        covariance_slope(real.transpose(1, 2), labels, real, labels)


def test_the_forced_energy_score_is_that_of_the_samples() -> None:
    _, flow_map = networks()
    tokens, z = torch.randn(30, D), torch.randn(30, C)
    one = Sampler(flow_map, steps=1, shape=(D,))
    x, y = (one.sample(range(n, n + 30), cond=z) for n in (0, 30))
    distance = lambda a, b: (a - b).norm(dim=1).mean()
    expected = distance(x, tokens) + distance(y, tokens) - distance(x, y)
    assert forced_energy_score(one, z, tokens) == pytest.approx(float(expected), rel=1e-5)


class SharedData(EnergyScore):
    """The wrong sharing: several noises of one x at every t, and no latent; sampled by the jumps that it seems to learn."""

    def sample_times(
        self, groups: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.where(torch.rand(groups) < 0.3, 1.0, torch.rand(groups).sqrt()).double() * self.flow_map.t_max
        return t, torch.zeros_like(t), torch.zeros_like(t)

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, t, cond = (value.repeat_interleave(self.samples, 0) for value in (batch.x, batch.draws.t, batch.cond))
        y = self.flow_map(self.flow_map.add_noise(x, batch.draws.noise, t), t, 0.0, cond=cond)
        return energy_score(y.reshape(len(batch.x), self.samples, -1), batch.x[:, None]), {}


@pytest.mark.parametrize("wrong", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_latent_head_learns_the_law_given_z_at_every_number_of_steps(wrong) -> None:
    """Eight contexts, each with two narrow modes of weights .7 and .3: the energy score at every t is proper, but not where
    samples share their data, which shows from two steps on."""
    contexts, radius, deviation = 8, 0.7, 0.05

    def centre(c: Tensor, second: Any) -> Tensor:
        angle = 2 * math.pi * ((c + 3 * second) % contexts) / contexts
        return radius * torch.stack([angle.cos(), angle.sin()], -1)

    def real(c: Tensor) -> Tensor:
        return centre(c, (torch.rand(len(c)) < 0.3).long()) + deviation * torch.randn(len(c), 2)

    torch.manual_seed(0)
    embedding = nn.Embedding(contexts, 32)
    network = TokenHead(2, 32, 64, 2, latent_dim=0 if wrong else 4, frequencies=32)
    flow_map = FlowMap(network, parametrization="identity", second_time="none")
    objective = (SharedData if wrong else EnergyScore)(flow_map, samples=4)
    weights, count = [*embedding.parameters(), *objective.parameters()], 1000
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, betas=(0.9, 0.99), fused=True)
    for step in range(count):
        c = torch.randint(0, contexts, (128,))
        loss, _ = objective(real(c), cond=embedding(c))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / count))
        optimizer.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - min(0.995, (1 + step) / (10 + step)))
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)
    flow_map.eval()
    for steps in (1, 2, 4):
        method = "pushforward" if wrong else "restart"
        one, first, energy = Sampler(flow_map, steps=steps, method=method, shape=(2,)), [], []
        for context in range(contexts):
            c = torch.full((1000,), context)
            x, y = one.sample(range(1000), cond=embedding(c).detach()), real(c.repeat(4))
            first.append(float(((x - centre(c, 0)).norm(dim=1) < (x - centre(c, 1)).norm(dim=1)).float().mean()))
            within = lambda a: torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))
            energy.append(float(2 * torch.cdist(x, y).mean() - within(x) - within(y)))
        if wrong:
            assert (1000 * sum(energy) / contexts < 5.0) == (steps == 1)
            continue
        assert sum(first) / contexts == pytest.approx(0.7, abs=0.05), steps
        assert 1000 * sum(energy) / contexts < 5.0, steps
