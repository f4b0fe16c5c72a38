"""Training on several processes: the run of one, to rounding; a resumed one, to the bit; what is refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrun import OPTIONS, assert_alike, command, in_this, rows, run, started, wait_for, workers, write_data

from imm import FlowMap, IMMObjective, checkpoints
from imm.cli.report import ENVIRONMENT_FILE
from imm.cli.train import _check_device
from imm.data import ImageData
from imm.distributed import Processes
from imm.networks import DDPMpp, UNet
from imm.objectives import Draws
from imm.training import TrainConfig, Trainer
from imm.training.sharding import Shards
from imm.training.state import read_state, states_in
from imm.training.stats import STATS_FILE, read_rows
from imm.training.watch import BEST_FILE, SCORES_FILE

CONFIG = TrainConfig(batch=8, lr=1e-3, log_every=1, snapshot_every=100)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data.npz")


def test_two_processes_are_one_to_rounding(data, tmp_path) -> None:
    """Also in parts, mirrored, with labels dropped, and in scores; every row speaks of the whole batch."""
    options = ("--steps", "6", "--xflip", "--eval", "mmd-pixels,label-match", "--eval-images", "13", "--clip", "0.5")
    output = in_this(data, tmp_path / "one", *options)
    assert ", 2 processes;" not in output
    output = run(data, tmp_path / "two", *options, "--batch-gpu", "6", processes=2)
    assert output.count(", 2 processes; data: ") == 1  # the first process speaks
    assert output.count("wrote ") == 1
    assert_alike(tmp_path / "one", tmp_path / "two")
    scores = [read_rows(tmp_path / name / SCORES_FILE) for name in ("one", "two")]
    for a, b in zip(*scores, strict=True):
        assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-3)
    files = {p.name for p in (tmp_path / "two").iterdir()}
    watched = {SCORES_FILE, BEST_FILE, ENVIRONMENT_FILE, "samples-0000006.png"}
    assert files == {".lock", "training-state-0000006", STATS_FILE, "snapshot-0000006.safetensors", *watched}


def test_in_half_precision_with_a_layer_that_is_not_used(data, tmp_path) -> None:
    """A loss scale, which all processes agree on, and a network that could be told of augmentations but is not."""
    network = DDPMpp(3, 8, width=8, multipliers=(1, 2), blocks=1, attention=(), num_classes=3, augment_dim=9)
    torch.nn.init.normal_(network.map_augment.weight)
    checkpoints.save(tmp_path / "net.safetensors", FlowMap(network))
    tune, common = ("--steps=4", "--precision=fp16", f"--init={tmp_path / 'net.safetensors'}"), [*OPTIONS[:4], *OPTIONS[6:]]
    in_this(data, tmp_path / "one", *tune, common=common)
    run(data, tmp_path / "two", *tune, processes=2, common=common)
    assert_alike(tmp_path / "one", tmp_path / "two", rel=1e-2)


@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")
def test_a_run_of_three_that_is_resumed_or_killed_repeats_an_unbroken_one(data, tmp_path) -> None:
    """With dropout, of which every process has its own; three, whose gradients have more than one order to be added in."""
    options = ("--batch", "24", "--dropout", "0.3")
    state = lambda name: read_state(tmp_path / name)
    with started(command(data, tmp_path / "parts", "--steps", "100000", "--snap", "3", *options, processes=3)) as killed:
        wait_for(lambda: states_in(tmp_path / "parts") and rows(tmp_path / "parts")[-1]["step"] >= 5)
        assert "where process" in in_this(data, tmp_path / "parts", "--steps", "8", *options, ok=False)  # locked
        assert len(workers(killed)) == 3
    step = state("parts")[1]["step"]
    assert step % 3 == 0
    last = str(step + 5)
    output = run(data, tmp_path / "parts", "--steps", last, *options, processes=3)
    assert f"resuming at step {step}" in output
    run(data, tmp_path / "whole", "--steps", last, *options, processes=3)
    (a, settings), (b, others) = state("whole"), state("parts")
    settings["replaced_step"] = others["replaced_step"] = None
    assert settings == others
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [row["loss"] for row in rows(tmp_path / "whole")] == [row["loss"] for row in rows(tmp_path / "parts")]


@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc")
def test_a_signal_to_one_ends_all(data, tmp_path) -> None:
    with started(command(data, tmp_path / "run", "--steps", "100000", "--snap", "2", processes=2)) as stopped:
        wait_for(lambda: bool(states_in(tmp_path / "run")))
        os.kill(workers(stopped)[1], signal.SIGTERM)
        output, _ = stopped.communicate(timeout=60)
    step = read_state(tmp_path / "run")[1]["step"]
    assert f"stopped by signal 15 at step {step}; the same command resumes there" in output


@pytest.mark.parametrize("option", ["--lr", "--steps"])
def test_processes_of_different_commands_are_refused(option, data, tmp_path) -> None:
    """As on two machines where somebody typed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    lines = [command(data, tmp_path / "run", "--steps", "3", option, value, processes=1) for value in ("4", "5")]
    with (
        started(lines[0], env={**os.environ, **where, "RANK": "0"}) as one,
        started(lines[1], env={**os.environ, **where, "RANK": "1"}) as other,
    ):
        outputs = [process.communicate(timeout=120)[0] for process in (one, other)]
    what = "steps: expected the same number" if option == "--steps" else "settings: expected the same settings and data"
    assert all(what in output for output in outputs), outputs
    assert 0 not in (one.returncode, other.returncode)  # 1; rarely gloo aborts a process when the other has ended
    assert not states_in(tmp_path / "run")


def test_a_batch_that_does_not_fit_is_refused(data, tmp_path) -> None:
    output = run(data, tmp_path / "run", "--steps", "2", "--batch", "18", processes=2, ok=False)
    assert "batch: expected a multiple of particles = 2 x 2 processes, got 18" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("device", "local"), [("cuda", "2"), ("auto", "2"), ("cuda:0", "1")])
def test_two_processes_on_one_gpu_are_refused(device, local, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    where = Processes(0, 2, 0)
    with pytest.raises(ValueError, match=f"a GPU for each of a machine's processes, got {device} with 1 GPUs for {local}"):
        _check_device(device, where)
    _check_device("cpu", where)
    _check_device(device, Processes())
    if local == "1":
        _check_device("cuda", where)  # each on a machine of its own


class _Alone(Processes):
    """One of two processes, whose other is not waited for."""

    def largest(self, number: int) -> int:
        return number

    def sums(self, numbers):
        return numbers


@pytest.fixture
def unsharded(monkeypatch) -> None:
    """Networks as they are: one of two processes, whose other is not there."""
    monkeypatch.setattr("imm.training.trainer.shard", lambda network, *arguments: Shards(network))


class _Elsewhere(_Alone):
    """One of two processes, whose other sees another folder, without a state."""

    def alike(self, text: str) -> bool:
        return text != "1"


@pytest.mark.usefixtures("unsharded")
def test_a_folder_that_is_not_shared_is_refused(tmp_path) -> None:
    flow_map = FlowMap(UNet(channels=3, resolution=8, num_classes=3, width=8, multipliers=(1,)))
    data = ImageData(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 3, 3, "made up")
    first = Trainer(IMMObjective(flow_map), data, tmp_path, CONFIG, where=_Elsewhere(0, 2, 0))  # nothing to resume yet
    first.close()
    one = Trainer(IMMObjective(flow_map), data, tmp_path, CONFIG)
    one.run(1)
    one.close()
    with pytest.raises(ValueError, match=r"out: expected a folder that all processes share, got .*, whose state some"):
        Trainer(IMMObjective(flow_map), data, tmp_path, CONFIG, where=_Elsewhere(0, 2, 0))


def one_step(folder, where: Processes, kind: str) -> list:
    """What one step hands to the update, and a number that dropout would have drawn next."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    data, config = ImageData(pixels, torch.arange(24) % 3, 3, "made up"), CONFIG
    network: nn.Module = UNet(channels=3, resolution=8, num_classes=3, width=8, multipliers=(1, 2))
    if kind == "posterior":
        data = dataclasses.replace(data, pixels=torch.randn(24, 3, 8, 8), deviations=torch.rand(24, 3, 8, 8))
    elif kind == "augment":
        config = dataclasses.replace(config, augment=0.5, xflip=True)
        network = DDPMpp(3, 8, width=8, multipliers=(1, 2), blocks=1, attention=(), num_classes=3, augment_dim=9)
    trainer = Trainer(IMMObjective(FlowMap(network), label_dropout=0.5), data, folder, config, where=where)
    got: list = []

    def update(images, labels, told=None, draws=None, *, pairs):
        if draws is None:
            draws = trainer.objective.draw(images, labels)
        got.extend((images, labels, told, draws, torch.rand(4)))
        raise InterruptedError

    trainer.update = update  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        trainer.run(1)
    return got


@pytest.mark.usefixtures("unsharded")
@pytest.mark.parametrize("kind", ["plain", "posterior", "augment"])
def test_the_shares_of_a_batch_are_the_batch(kind, tmp_path) -> None:
    whole = one_step(tmp_path / "whole", Processes(), kind)
    shares = [one_step(tmp_path / str(rank), _Alone(rank, 2, rank), kind) for rank in (0, 1)]
    for i in range(3):
        if whole[i] is None:
            assert shares[0][i] is shares[1][i] is None
        else:
            assert torch.equal(torch.cat([share[i] for share in shares]), whole[i])
    for field in dataclasses.fields(Draws):
        expected, parts = getattr(whole[3], field.name), [getattr(share[3], field.name) for share in shares]
        assert parts == [None, None] if expected is None else torch.equal(torch.cat(parts), expected)
    assert torch.equal(shares[0][4], whole[4])
    assert not torch.equal(shares[1][4], whole[4])
