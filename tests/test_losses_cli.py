"""``imm train --loss``: its options, what a checkpoint records, how it is sampled, where a map begins; ``imm study``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call
from torch import nn

from imm import FlowMap, checkpoints
from imm.cli import commands
from imm.cli.train import LOSS_OPTIONS
from imm.networks import DDPMpp, DiT, UNet, ignore_second_time
from imm.objectives import OBJECTIVES, SAMPLED_BY
from imm.studies import STUDIES, Criterion, losses
from imm.training.stats import STATS_FILE, read_rows

OPTIONS = ["--width=8", "--batch=8", "--steps=2", "--tick=1", "--lr=1e-3"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8), labels=np.arange(24) % 3)
    return path


@pytest.mark.parametrize("loss", list(OBJECTIVES))
def test_every_loss_trains_resumes_and_is_sampled_by_its_method(loss, data, tmp_path) -> None:
    command = ["train", f"--data={data}", *OPTIONS, f"--loss={loss}", "--eval-steps=1"]
    output = call(*command, f"--out={tmp_path / 'run'}").output
    assert f"parameters; loss: {loss}; fp32" in output
    call(*command[:2], *OPTIONS[:2], "--steps=1", *OPTIONS[3:], *command[-2:], f"--out={tmp_path / 'parts'}")
    call(*command, f"--out={tmp_path / 'parts'}")
    net = tmp_path / "run" / "snapshot-0000002.safetensors"
    one, other = (checkpoints.load(p / "snapshot-0000002.safetensors") for p in (tmp_path / "run", tmp_path / "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert checkpoints.read_settings(net, "flow_map")["extra"]["objective"]["loss"] == loss
    rows = read_rows(tmp_path / "run" / STATS_FILE)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert ("matched_share" in rows[0]) is (loss == "imm")
    call("sample", f"--net={net}", f"--out={tmp_path / 'samples'}", "--seeds=0-3", "--steps=3")
    made = json.loads((tmp_path / "samples" / "generation.json").read_text())
    assert made["method"] == SAMPLED_BY.get(loss, "pushforward")
    other = call(*command[:2], *OPTIONS, f"--loss={'imm' if loss != 'imm' else 'fm'}", f"--out={tmp_path / 'run'}", ok=False)
    assert "objective.loss was" in other.output


def test_options_of_other_losses_are_refused_by_name(data, tmp_path) -> None:
    command = ["train", f"--data={data}", *OPTIONS, f"--out={tmp_path / 'run'}"]
    output = call(*command, "--loss=fm", "--particles=2", ok=False).output
    assert "particles: expected no such option for the loss fm, which has times, label_dropout, got 2" in output
    assert "times: expected no such option for the loss imm" in call(*command, "--times=uniform", ok=False).output
    assert not (tmp_path / "run").exists()
    for option in ("-k8", "--kernel=rbf"):  # which the defaults of others switch off
        assert "beside it for the loss consistency" in call(*command, "--loss=consistency", option, ok=False).output
    output = call(*command, "--loss=meanflow", "--compile", ok=False).output
    assert "compile: expected a loss without tangents of the network, got meanflow" in output
    call(*command, "--loss=consistency", "--stage-steps=0", "-k", "8")
    kept = checkpoints.read_settings(tmp_path / "run" / "snapshot-0000002.safetensors", "flow_map")["extra"]["objective"]
    assert (kept["stage_steps"], kept["k"], kept["distance"]) == (None, 8, "pseudo_huber")
    output = call(
        "train", f"--data={data}", "--preset=cifar10", "--loss=meanflow", "-k", "3", f"--out={tmp_path / 'x'}", ok=False
    ).output
    assert "k: expected no such option for the loss meanflow" in output


def test_the_command_line_knows_every_loss_and_its_arguments() -> None:
    assert commands.LOSSES == tuple(OBJECTIVES) == tuple(LOSS_OPTIONS)
    network = UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2))
    for loss, options in LOSS_OPTIONS.items():
        settings = OBJECTIVES[loss](FlowMap(network)).settings
        assert set(options.values()) <= settings.keys(), loss


@pytest.mark.parametrize(
    "network",
    [
        UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2)),
        DiT("S", resolution=8),
        DDPMpp(1, 8, width=8, multipliers=(1, 2), blocks=1, attention=(), num_classes=3),
    ],
    ids=["unet", "dit", "ddpmpp"],
)
def test_a_velocity_begins_a_flow_map_without_a_second_time_and_learns_it(network) -> None:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, network.channels, 8, 8)
    t, labels = torch.tensor([600.0, 900.0], dtype=torch.float64), torch.tensor([0, 1])
    network.eval()
    at_zero = network(x, t, torch.zeros_like(t), labels)
    ignore_second_time(network)
    for s in (0.0, 300.0, 590.0):
        torch.testing.assert_close(network(x, t, torch.full_like(t, s), labels), at_zero, rtol=1e-4, atol=1e-5)
    network(x, t, torch.full_like(t, 300.0), labels).sum().backward()
    layer = network.map_layer0_s if isinstance(network, DDPMpp) else network.s_embedder.mlp[0]
    assert float(layer.weight.grad.abs().sum()) > 0


def test_a_flow_map_starts_from_a_velocitys_checkpoint(data, tmp_path) -> None:
    command = ["train", f"--data={data}", *OPTIONS[1:]]
    call(*command, "--width=8", "--loss=fm", "--second-time=none", "--ema=0", f"--out={tmp_path / 'fm'}")
    net = tmp_path / "fm" / "snapshot-0000002.safetensors"
    call(
        *command[:3], "--steps=1", "--lr=1e-9", "--ema=0", f"--init={net}", "--second-time=stride", f"--out={tmp_path / 'imm'}"
    )
    velocity = checkpoints.load(net)
    made = checkpoints.load(tmp_path / "imm" / "snapshot-0000001.safetensors")
    assert (velocity.second_time, made.second_time) == ("none", "stride")
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    for s in (0.1, 0.7):
        torch.testing.assert_close(made(x, 0.9, s, labels), velocity(x, 0.9, s, labels), rtol=1e-3, atol=1e-4)
    output = call(
        *command,
        f"--init={made and tmp_path / 'imm' / 'snapshot-0000001.safetensors'}",
        "--second-time=identity",
        f"--out={tmp_path / 'x'}",
        ok=False,
    ).output
    assert "second_time: expected stride, which" in output


def test_a_criterion_says_its_figure_and_fails_outside_its_bounds() -> None:
    assert str(Criterion("spread", 0.71234, low=0.6)) == "PASSED: spread: 0.7123 (wanted at least 0.6)"
    assert str(Criterion("spread", 0.5, low=0.6, high=0.9)) == "FAILED: spread: 0.5 (wanted at least 0.6 and at most 0.9)"
    assert not Criterion("spread", math.nan, low=0.6).holds
    assert Criterion("spread", 0.5).holds


def test_the_study_of_losses_runs_resumes_and_fails_where_a_premise_is_broken(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(losses, "QUICK", losses._Plan(("imm", "fm"), (0,), 4, 2, 20, (16,)))
    out = tmp_path / "study"
    output = call("study", "losses", "--quick", f"--out={out}").output
    assert "imm, seed 0, step 2: label match" in output
    rows = json.loads((out / "rows.json").read_text())
    assert [(r["loss"], r["step"], r["evaluations"]) for r in rows] == [
        *(("imm", 2, n) for n in (1, 2)),
        *(("imm", 4, n) for n in (1, 2, 4, 8)),
        *(("fm", 2, n) for n in (1, 2)),
        *(("fm", 4, n) for n in (1, 2, 4, 8, 16)),
    ]
    assert {r["method"] for r in rows if r["loss"] == "fm"} == {"ddim"}
    (out / "fm-0" / losses.ROWS_FILE).unlink()  # as if it had been stopped there
    again = call("study", "losses", "--quick", f"--out={out}").output
    assert "fm, seed 0, step 4" in again
    assert "imm, seed 0" not in again
    assert json.loads((out / "rows.json").read_text()) == rows
    assert "label match" in (out / "report.html").read_text()

    good = {"label_match": 0.9, "spread": 0.8, "mmd": 0.001, "step": losses.STEPS, "seed": 0}
    table = [{**good, "loss": loss, "evaluations": n} for loss in losses.FULL.losses for n in (1, 64)]
    table = [{**row, "spread": 0.2} if (row["loss"], row["evaluations"]) == ("fm", 1) else row for row in table]
    assert all(one.holds for one in losses.criteria(table, losses.FULL))
    broken = [{**row, "spread": 0.3} if row["loss"] == "imm" else row for row in table]
    assert [one.claim for one in losses.criteria(broken, losses.FULL) if not one.holds] == ["imm, one step: spread"]
    sharp = [{**row, "spread": 0.8} for row in table]
    assert [one.claim for one in losses.criteria(sharp, losses.FULL) if not one.holds] == [
        "fm, one step is the class blur: spread"
    ]
    assert STUDIES.keys() == {"losses"}


def test_the_documentations_table_is_that_of_the_committed_rows() -> None:
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "studies" / "losses.json").read_text())
    assert losses.summary(rows) in (docs / "losses.md").read_text()
    assert {"imm", "fm", "consistency", "shortcut", "progressive"} <= {row["loss"] for row in rows}
    held = [one for one in losses.criteria(rows, losses.FULL) if one.holds]
    assert len(held) == 6
