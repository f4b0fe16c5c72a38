"""``imm train --loss``: its options, what a checkpoint records, how it is sampled, where a map begins."""

from __future__ import annotations

import json
import math

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


def test_meanflow_sees_t_itself_and_says_where_a_file_has_it_otherwise(data, tmp_path) -> None:
    common = ("train", f"--data={data}", "--steps=1", "--batch=4", "--width=8")
    scale = lambda run: checkpoints.load(tmp_path / run / "snapshot-0000001.safetensors").time_scale
    assert "time scale" not in call(*common, "--loss=meanflow", f"--out={tmp_path / 'own'}").output
    call(*common, "--loss=fm", f"--out={tmp_path / 'fm'}")
    call(*common, "--loss=fm", "--time-scale=25", f"--out={tmp_path / 'given'}")
    assert (scale("own"), scale("fm"), scale("given")) == (1.0, 1000.0, 25.0)
    init = f"--init={tmp_path / 'fm' / 'snapshot-0000001.safetensors'}"
    output = call(*(one for one in common if one != "--width=8"), init, "--loss=meanflow", f"--out={tmp_path / 'begun'}").output
    assert "time scale: 1000, of which meanflow takes a derivative; it learns far better at 1" in output
    wide = call(*common, "--loss=fm", "--time-scale=0", f"--out={tmp_path / 'zero'}", ok=False)
    assert "0.0 is not in the range x>0" in wide.output


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
