"""The learning rate, clipping, skipped steps, settings that a resumed run may change; power-function averages."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from command_line import call
from test_training import CONFIG, assert_same_state, images, trainer, unet
from torch import nn

from imm import FlowMap, IMMObjective, checkpoints
from imm.cli import progress
from imm.training import PowerEMA, TrainConfig, Trainer, TrainingError, reconstruct
from imm.training.config import CHANGEABLE
from imm.training.ema import gamma_of, mixture, profile
from imm.training.state import states_in
from imm.training.stats import STATS_FILE, read_rows


def test_the_learning_rate_follows_the_formulas() -> None:
    plain = TrainConfig(lr=2.0, warmup=4)
    assert [plain.rate(step) for step in (0, 1, 3, 4, 10**6)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = TrainConfig(lr=2.0, decay="cosine", decay_steps=100)
    assert cosine.rate(0) == 2.0
    assert cosine.rate(25) == pytest.approx(1.0 + math.sqrt(0.5))
    assert cosine.rate(50) == pytest.approx(1.0)
    assert cosine.rate(100) == cosine.rate(1000) == 0.0
    rsqrt = TrainConfig(lr=2.0, warmup=10, decay="rsqrt", decay_steps=100)
    assert rsqrt.rate(4) == 1.0
    assert [rsqrt.rate(step - 1) for step in (100, 400, 10000)] == pytest.approx([2.0, 1.0, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": "linear"}, "unknown decay 'linear'; expected one of"),
        ({"decay": "cosine"}, "decay_steps: expected steps of the decay 'cosine', got None"),
        ({"decay_steps": 5}, "decay_steps: expected none without a decay, got 5"),
        ({"decay": "rsqrt", "decay_steps": 0}, "decay_steps: expected at least 1, got 0"),
        ({"clip": 0.0}, "clip: expected a positive norm, got 0.0"),
        ({"clip": float("nan")}, "clip: expected a positive norm, got nan"),
        ({"max_skipped": -1}, "max_skipped: expected at least 0, got -1"),
        ({"max_skipped": 1, "precision": "fp16"}, "max_skipped: expected 0 in fp16"),
        ({"ema_lengths": (0.1, 0.1)}, r"ema_lengths: expected each once, got \[0.1, 0.1\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **change)


def test_a_large_gradient_is_scaled_to_the_norm_and_a_small_one_left(tmp_path) -> None:
    def gradient(clip: float | None) -> torch.Tensor:
        made = trainer(tmp_path / f"{clip}", dataclasses.replace(CONFIG, clip=clip), dropout=0.0)
        _, norm = made._step()
        flat = torch.cat([p.grad.flatten() for p in made.objective.parameters()])
        assert norm == pytest.approx(whole, rel=1e-5)  # rows have the norm before
        return flat

    whole = 0.0
    made = trainer(tmp_path / "first", dropout=0.0)
    whole = float(made._step()[1])
    plain = gradient(None)
    assert float(plain.norm()) == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient(whole / 4), plain / 4)
    assert torch.equal(gradient(whole * 2), plain)


class Breaking(IMMObjective):
    """Its loss is NaN in some steps, counted from 1 over all that are made."""

    broken: tuple[int, ...] = ()
    made = 0

    def forward(self, *args, **options):  # type: ignore[override]
        loss, stats = super().forward(*args, **options)
        Breaking.made += 1
        return (loss * math.nan, stats) if Breaking.made in self.broken else (loss, stats)


def breaking(folder, broken: tuple[int, ...], *, made: int = 0, **changes) -> Trainer:
    torch.manual_seed(0)
    Breaking.made = made
    objective = Breaking(FlowMap(unet()))
    objective.broken = broken
    return Trainer(objective, images(), folder, dataclasses.replace(CONFIG, **changes))


def test_steps_whose_gradient_is_not_finite_are_skipped_up_to_the_bound(tmp_path) -> None:
    run = breaking(tmp_path / "whole", (3, 5, 6), max_skipped=3)
    run.run(2)
    before = [p.detach().clone() for p in run.objective.parameters()]
    run.run(3)
    assert all(torch.equal(p, q) for p, q in zip(before, run.objective.parameters(), strict=True))
    run.run(8)
    rows = read_rows(tmp_path / "whole" / STATS_FILE)
    assert [row["skipped"] for row in rows] == [0, 1, 1, 3, 3]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8]
    assert [row.get("loss") is None for row in rows] == [False, True, False, True, False]  # rows of skipped steps alone
    assert all(math.isfinite(v) for row in rows for v in (row.get("loss", 0.0), row.get("grad_norm", 0.0)))

    breaking(tmp_path / "parts", (3, 5, 6), max_skipped=3).run(5)
    run = breaking(tmp_path / "parts", (3, 5, 6), made=5, max_skipped=3)  # which knows of the two before
    run.run(8)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")

    run = breaking(tmp_path / "shown", (1, 2), max_skipped=2, log_every=1)  # rows of skipped steps alone, on the bar
    progress.run(run, 3)
    run = breaking(tmp_path / "bound", (3, 5, 6), max_skipped=2)
    with pytest.raises(
        TrainingError, match=r"gradient not finite in step 6, after 2 skipped steps; the saved state of step 4 is"
    ):
        run.run(8)
    with pytest.raises(TrainingError, match=r"not finite before step 4 .*no state was saved"):
        breaking(tmp_path / "none", (3,)).run(8)  # by default no step is


def test_settings_that_do_not_change_what_the_state_means_may_change_if_asked_to(tmp_path) -> None:
    trainer(tmp_path).run(4)
    other = dataclasses.replace(CONFIG, lr=5e-4, clip=1.0)

    def resumed(config: TrainConfig, *names: str) -> Trainer:
        return Trainer(IMMObjective(FlowMap(unet())), images(), tmp_path, config, allow_change=names)

    expected = r"config.clip was None and is 1.0; config.lr was 0.001 and is 0.0005 \(--allow-change=lr,clip takes them\)"
    with pytest.raises(checkpoints.CheckpointError, match=expected):
        resumed(other)
    with pytest.raises(checkpoints.CheckpointError, match=r"config.clip was None and is 1.0 \(--allow-change=clip"):
        resumed(other, "lr")
    with pytest.raises(checkpoints.CheckpointError, match=r"config.seed was 3 and is 4$"):
        resumed(dataclasses.replace(CONFIG, seed=4), *CHANGEABLE)
    with pytest.raises(ValueError, match=r"allow_change: expected some of lr, warmup, .*, got 'seed'"):
        resumed(CONFIG, "seed")
    run = resumed(other, "lr", "clip")
    run.run(6)
    changes = ["from step 4: config.clip was None and is 1.0", "from step 4: config.lr was 0.001 and is 0.0005"]
    assert run.changes == changes
    assert read_rows(tmp_path / STATS_FILE)[-1]["lr"] == 5e-4
    extra = checkpoints.read_settings(run.snapshot_path, "flow_map")["extra"]
    assert (extra["config"]["lr"], extra["changes"]) == (5e-4, changes)
    again = resumed(other)  # the settings are the run's from there on
    assert again.changes == changes


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.28])
def test_gamma_has_the_length_and_the_profile_is_that_of_the_recursion(length) -> None:
    gamma = gamma_of(length)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(length, rel=1e-9)
    steps = 40
    weights = np.zeros(steps)
    for n in range(1, steps + 1):
        beta = (1 - 1 / n) ** (gamma + 1)
        weights *= beta
        weights[n - 1] = 1 - beta
    found = profile(length, steps, np.arange(steps + 11))
    np.testing.assert_allclose(found[:steps], weights, rtol=1e-9, atol=1e-15)
    assert not found[steps:].any()
    assert found.sum() == pytest.approx(1.0)


def test_the_published_profiles_mean_and_deviation() -> None:
    """Of the density (gamma + 1) u^gamma on [0, 1]: its deviation is the length; gamma = 6.94 has 0.1 (Karras et al. 2024)."""
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    edges = np.arange(100_001)
    weights, centres = profile(0.1, 100_000, edges), (edges[:-1] + 0.5) / 100_000
    mean = (weights * centres).sum()
    assert math.sqrt((weights * (centres - mean) ** 2).sum()) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3, math.nan])
def test_a_length_that_no_profile_has_is_refused(length) -> None:
    with pytest.raises(ValueError, match=r"length: expected the length of an average in \(0, 0.28\], got"):
        PowerEMA(nn.Linear(1, 1), length)


def test_a_reconstructed_average_is_the_tracked_one_on_a_toy() -> None:
    """Random weights at every step, two averages stored at each: the profiles in between are sums of theirs."""
    torch.manual_seed(0)
    live = nn.Linear(3, 2).double()
    tracked = {length: PowerEMA(live, length) for length in (0.05, 0.1, 0.07, 0.2)}
    stored, values = [], []
    for step in range(1, 31):
        for parameter in live.parameters():
            nn.init.normal_(parameter)
        for length, average in tracked.items():
            average.update(live, step)
            if length in (0.05, 0.1):
                stored.append((length, step))
                values.append(average.network.weight.clone())
    for length in (0.07, 0.2, 0.05):
        factors, error = mixture(stored, length, 30)
        assert error < 1e-6
        made = sum(f * v for f, v in zip(factors, values, strict=True))
        torch.testing.assert_close(made, tracked[length].network.weight, rtol=0, atol=1e-6)


def test_reconstruction_after_training_is_within_the_error_it_states(tmp_path) -> None:
    """The command; an average that was tracked but not used is the truth."""
    config = dataclasses.replace(CONFIG, snapshot_every=4, lr=1e-2)
    trainer(tmp_path / "run", dataclasses.replace(config, ema_lengths=(0.05, 0.1))).run(16)
    run = trainer(tmp_path / "truth", dataclasses.replace(config, ema_lengths=(0.075,)))
    path: list[torch.Tensor] = []
    flat = lambda tensors: torch.cat([value.detach().flatten().double() for value in tensors])
    run.run(16, on_step=lambda step: path.append(flat(run.objective.parameters())))
    out = tmp_path / "ema.safetensors"
    output = call("ema", f"--runs={tmp_path / 'run'}", "--length=0.075", f"--out={out}").output
    assert output.startswith(f"wrote {out}: the average of length 0.075 after 16 steps; relative error of its profile ")
    stated = float(output.split()[-1])
    assert stated < 0.05
    got, wanted = flat(checkpoints.load(out).network.parameters()), flat(run.averages[0].network.parameters())
    # Cauchy and Schwarz: the profiles' difference, in steps, and how far the weights were from their last values.
    moved = sum(float((one - path[-1]).square().sum()) for one in path) ** 0.5
    bound = stated * float(np.linalg.norm(profile(0.075, 16, np.arange(17)))) * moved
    error = float((got - wanted).norm())
    assert 0 < error < bound
    assert error < 0.1 * float((path[-1] - wanted).norm())
    assert checkpoints.read_settings(out, "flow_map")["extra"]["ema_length"] == 0.075

    exact, settings, left = reconstruct(tmp_path / "run", 0.1, 12)  # one that was tracked
    assert (settings["step"], left) == (12, pytest.approx(0.0, abs=1e-9))
    stored, _ = checkpoints.read_file(tmp_path / "run" / "averages-0000012.safetensors", "averages")
    for name, value in exact.items():
        torch.testing.assert_close(value, stored[f"1.{name}"], rtol=0, atol=1e-6)


def test_averages_resume_and_are_written_again_where_a_kill_lost_them(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, ema_lengths=(0.1,))
    trainer(tmp_path / "whole", config).run(8)
    trainer(tmp_path / "parts", config).run(4)
    lost = tmp_path / "parts" / "averages-0000004.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    trainer(tmp_path / "parts", config)
    assert lost.read_bytes() == content
    trainer(tmp_path / "parts", config).run(8)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert sorted(p.name for p in (tmp_path / "parts").glob("averages-*")) == [
        "averages-0000004.safetensors",
        "averages-0000008.safetensors",
    ]
    with pytest.raises(checkpoints.CheckpointError, match=r"config.ema_lengths was \[0.1\] and is \[\]"):
        trainer(tmp_path / "parts")


def test_bad_requests_for_an_average_are_one_line(tmp_path) -> None:
    out = f"--out={tmp_path / 'ema.safetensors'}"
    assert (
        "runs: expected files averages-STEP.safetensors"
        in call("ema", f"--runs={tmp_path}", "--length=0.1", out, ok=False).output
    )
    trainer(tmp_path / "run", dataclasses.replace(CONFIG, ema_lengths=(0.1,))).run(4)
    command = ("ema", f"--runs={tmp_path / 'run'}", out)
    assert "step: expected one that" in call(*command, "--length=0.1", "--step=3", ok=False).output
    assert "length: expected the length of an average in (0, 0.28], got 0.5" in call(*command, "--length=0.5", ok=False).output
    assert not (tmp_path / "ema.safetensors").exists()
    assert states_in(tmp_path / "run")
