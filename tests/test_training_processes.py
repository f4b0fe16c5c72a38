"""Training on several processes: the run of one, to rounding; a resumed one bit for bit; what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imm import FlowMap, IMMObjective, checkpoints
from imm.data import ImageData
from imm.distributed import Processes
from imm.networks import DDPMpp, UNet
from imm.objective import Draws
from imm.training import TrainConfig, Trainer
from imm.training.trainer import STATE_FILE, STATS_FILE

IMM = ["-m", "imm", "train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
OPTIONS = ["--batch", "16", "--particles", "2", "--width", "8", "--tick", "1", "--snap", "100", "--device", "cpu"]
CONFIG = TrainConfig(batch=8, lr=1e-3, log_every=1, snapshot_every=100)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(40) % 3)
    return path


def command(data, outdir, *options: str, processes: int) -> list[str]:
    launch = TORCHRUN if processes == 2 else []
    return [sys.executable, *launch, *IMM, "--data", str(data), "--outdir", str(outdir), *OPTIONS, *options]


def run(*arguments, ok: bool = True, **options) -> str:
    done = subprocess.run(command(*arguments, **options), capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode == 0) is ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / STATS_FILE).read_text().splitlines()]


def test_two_processes_are_one_to_rounding(data, tmp_path) -> None:
    """Also in parts, mirrored, with labels dropped; every row speaks of the whole batch."""
    output = run(data, tmp_path / "one", "--steps", "6", "--xflip", processes=1)
    assert ", 2 processes;" not in output
    output = run(data, tmp_path / "two", "--steps", "6", "--xflip", "--batch-gpu", "6", processes=2)
    assert output.count(", 2 processes; data: ") == 1  # the first process speaks
    assert output.count("wrote ") == 1
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "grad_norm", "gap", "at_s"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
        of_bins = ([float("nan") if v is None else v for v in row["t_bin_loss"]] for row in (b, a))
        np.testing.assert_allclose(*of_bins, rtol=1e-4)
        assert b["nonfinite"] == 0
    files = {p.name for p in (tmp_path / "two").iterdir()}
    assert files == {".lock", STATE_FILE, STATS_FILE, "snapshot-0000006.safetensors"}


def test_a_run_of_two_that_is_resumed_or_killed_repeats_an_unbroken_one(data, tmp_path) -> None:
    """With dropout, of which every process has its own."""
    run(data, tmp_path / "whole", "--steps", "8", "--dropout", "0.3", processes=2)
    run(data, tmp_path / "parts", "--steps", "3", "--dropout", "0.3", processes=2)
    long = command(data, tmp_path / "parts", "--steps", "100000", "--snap", "100000", "--dropout", "0.3", processes=2)
    with subprocess.Popen(long, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        wait_for(lambda: len(rows(tmp_path / "parts")) >= 5)
        assert "where process" in run(data, tmp_path / "parts", "--steps", "8", processes=2, ok=False)  # holds the lock
        workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        assert len(workers) == 2
        for number in (killed.pid, *map(int, workers)):
            os.kill(number, signal.SIGKILL)
    output = run(data, tmp_path / "parts", "--steps", "8", "--dropout", "0.3", processes=2)
    assert "resuming at step 3" in output
    (a, settings), (b, others) = (checkpoints.read_file(tmp_path / n / STATE_FILE, "training") for n in ("whole", "parts"))
    settings["replaced_step"] = others["replaced_step"] = None
    assert settings == others
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [row["loss"] for row in rows(tmp_path / "whole")] == [row["loss"] for row in rows(tmp_path / "parts")]


def test_a_signal_ends_all(data, tmp_path) -> None:
    long = command(data, tmp_path / "run", "--steps", "100000", "--snap", "2", processes=2)
    with subprocess.Popen(long, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as stopped:
        wait_for((tmp_path / "run" / STATE_FILE).exists)
        stopped.send_signal(signal.SIGTERM)  # which torchrun passes on
        output, _ = stopped.communicate(timeout=60)
    assert "stopped by signal 15 at step" in output
    step = checkpoints.read_file(tmp_path / "run" / STATE_FILE, "training")[1]["step"]
    assert f"at step {step}; the same command goes on" in output


def test_a_batch_that_does_not_fit_is_refused(data, tmp_path) -> None:
    output = run(data, tmp_path / "run", "--steps", "2", "--batch", "18", processes=2, ok=False)
    assert "batch: expected a multiple of particles = 2 x 2 processes, got 18" in output
    assert not (tmp_path / "run").exists()


class _Together(nn.Module):
    """Stands for the module that exchanges gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.no_sync = nullcontext

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options)


class _Alone(Processes):
    """One of two processes, whose other is not waited for."""

    def wait(self) -> None:
        pass

    def total(self, number: int) -> int:
        return number * self.world

    def sums(self, numbers):
        return numbers

    def parallel(self, module, **options):
        return _Together(module)


class _Elsewhere(_Alone):
    """One of two processes, whose other sees another folder, without a state."""

    def total(self, number: int) -> int:
        return number


def test_a_folder_that_is_not_shared_is_refused(tmp_path) -> None:
    flow_map = FlowMap(UNet(channels=3, resolution=8, num_classes=3, width=8, multipliers=(1,)))
    data = ImageData(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8) % 3, 3, "made up")
    first = Trainer(IMMObjective(flow_map), data, tmp_path, CONFIG, where=_Elsewhere(0, 2, 0))  # nothing to resume yet
    first.close()
    one = Trainer(IMMObjective(flow_map), data, tmp_path, CONFIG)
    one.run(1)
    one.close()
    with pytest.raises(ValueError, match=r"outdir: expected a folder that all processes share, got .*, whose state some"):
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

    def update(images, labels, told=None, draws=None):
        if draws is None:
            draws = trainer.objective.draw(images, labels)
        got.extend((images, labels, told, draws, torch.rand(4)))
        raise InterruptedError

    trainer.update = update  # type: ignore[method-assign]
    with pytest.raises(InterruptedError):
        trainer.run(1)
    return got


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
        assert torch.equal(torch.cat([getattr(share[3], field.name) for share in shares]), getattr(whole[3], field.name))
    assert torch.equal(shares[0][4], whole[4])
    assert not torch.equal(shares[1][4], whole[4])
