"""Training on meshes of replicas and shards: the gradients, losses and averages of one process, to rounding; states that any
number of processes resumes."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import shards
import torch
from torch import nn
from torchrun import assert_alike, command, in_this, output_of, run, started, wait_for, workers, write_data

from imm import checkpoints
from imm.distributed import Processes
from imm.objectives import OBJECTIVES
from imm.training import TrainConfig, sharding
from imm.training.config import check_fit
from imm.training.state import read_state, states_in
from imm.training.trainer import _compile

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's processes in /proc"),
    pytest.mark.usefixtures("size_t"),
]


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data.npz")


SOME = ("imm", "meanflow", "own", "averages")  # of three and four processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return shards.run(list(shards.CASES), tmp_path_factory.mktemp("alone"), Processes())


@pytest.fixture(scope="module")
def on(tmp_path_factory) -> Callable[..., tuple[dict, Path]]:
    """What :func:`shards.run` finds on a mesh of so many processes, and its folder."""

    @functools.cache
    def found(processes: int, shard: int) -> tuple[dict, Path]:
        folder = tmp_path_factory.mktemp("mesh")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        names = () if processes == 2 else SOME
        output_of([sys.executable, *launch, shards.__file__, str(folder), str(shard), *names])
        return torch.load(folder / "found.pt", weights_only=True), folder

    return found


@pytest.mark.parametrize(("processes", "shard"), [(2, 1), (2, 2), (3, 3), (4, 2)])
def test_every_loss_and_network_learns_what_one_process_learns(processes, shard, alone, on) -> None:
    found, folder = on(processes, shard)
    assert found.keys() == {key for key in alone if processes == 2 or key.split("/")[0] in SOME}
    for key, value in found.items():
        name, what, *_ = key.split("/")
        if what == "share":
            assert float(value) == pytest.approx(1 / shard, rel=0.05) or name == "own", key  # its three rows do not divide
        elif what == "skips":
            assert bool(value)
        elif name == "half":  # rounds otherwise in a batch of another size
            assert what != "losses" or torch.allclose(value, alone[key], rtol=0.05)
        elif what in ("losses", "norm"):
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=0, msg=lambda text, key=key: f"{key}: {text}")
        elif what == "grad":
            whole = torch.cat([v.flatten() for k, v in alone.items() if k.startswith(f"{name}/grad")])
            assert float((value - alone[key]).norm() / whole.norm()) <= 1e-6, key
    for name in SOME:
        own = shards.Own() if name == "own" else None
        snapshot = checkpoints.load(folder / name / "snapshot-0000006.safetensors", network=own)
        assert all(torch.equal(value, found[f"{name}/ema/{key}"]) for key, value in snapshot.network.state_dict().items())


def test_two_meshes_of_two_processes_are_bitwise_one(on) -> None:
    (one, _), (other, _) = on(2, 1), on(2, 2)
    for key, value in one.items():
        # A norm over shards is a sum in another order; convolutions choose their kernels by where weights lie.
        if not key.endswith(("share", "norm")) and key.split("/")[0] in (*OBJECTIVES, "checkpointing", "parts", "tokens"):
            assert torch.equal(other[key], value), key


def test_a_state_resumes_on_another_number_of_processes(data, tmp_path) -> None:
    """Four with two shards, then two, then three: the rows of one process that is not stopped, to rounding."""
    options = ("--batch", "24", "--xflip")
    in_this(data, tmp_path / "one", "--steps", "6", *options)
    for processes, steps, shard in ((4, "2", "2"), (2, "4", "1"), (3, "6", "3")):
        output = run(data, tmp_path / "many", "--steps", steps, "--shard", shard, *options, processes=processes)
        assert steps == "2" or f"resuming at step {int(steps) - 2}" in output
    assert_alike(tmp_path / "one", tmp_path / "many")
    (ours, _), (theirs, _) = (read_state(tmp_path / name) for name in ("one", "many"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert float((theirs[name] - value).abs().max()) <= 2e-4 * max(1.0, float(value.abs().max())), name


@pytest.mark.full
def test_killed_at_twenty_moments_shards_resume_bitwise(data, tmp_path) -> None:
    options = ("--batch", "16", "--dropout", "0.3", "--snap", "2", "--shard", "2")
    chance = random.Random(0)
    for _ in range(20):
        step = read_state(tmp_path / "killed")[1]["step"] if states_in(tmp_path / "killed") else 0
        with started(command(data, tmp_path / "killed", "--steps", "100000", *options, processes=2)):
            wait_for(lambda step=step: bool(states_in(tmp_path / "killed")) and newest(tmp_path / "killed") > step)
            time.sleep(chance.uniform(0.0, 0.1))
    last = str(newest(tmp_path / "killed") + 2)
    run(data, tmp_path / "killed", "--steps", last, *options, processes=2)
    run(data, tmp_path / "whole", "--steps", last, *options, processes=2)
    (ours, _), (theirs, _) = (read_state(tmp_path / name) for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def newest(folder: Path) -> int:
    return int(states_in(folder)[-1].name.rpartition("-")[2])


def test_a_rank_that_dies_ends_the_others(data, tmp_path) -> None:
    line = command(data, tmp_path / "run", "--steps", "100000", "--snap", "2", "--shard", "2", processes=2)
    with started(line) as launcher:
        wait_for(lambda: bool(states_in(tmp_path / "run")))
        os.kill(workers(launcher)[1], signal.SIGKILL)
        output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    assert not workers(launcher)


@pytest.mark.parametrize(
    ("loss", "change", "world", "message"),
    [
        ("imm", {"shard": 2}, 3, "shard: expected a divisor of the number of processes, 3, got 2"),
        ("imm", {"shard": 2}, 1, "shard: expected a divisor of the number of processes, 1, got 2"),
        ("shortcut", {"batch_gpu": 2}, 2, "batch: expected 4 images or more a micro-batch of a process for the loss shortcut"),
        ("shortcut", {"batch_gpu": 5}, 2, "got 2"),
        ("meanflow", {"batch": 6}, 2, "batch: expected 4 images or more a micro-batch of a process for the loss meanflow"),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_refused(loss, change, world, message) -> None:
    config = TrainConfig(**{"batch": shards.BATCH, **change})
    with pytest.raises(ValueError, match=message):
        check_fit(config, shards.CASES[loss][0](), shards.data_of(loss), world)


def test_a_tangent_on_an_earlier_torch_is_refused_with_its_remedy(monkeypatch) -> None:
    monkeypatch.setattr("imm.training.config.takes_tangents", lambda: False)
    fits = lambda name, world: check_fit(TrainConfig(batch=24), shards.CASES[name][0](), shards.data_of(name), world)
    with pytest.raises(ValueError, match=r"loss: expected one without tangents .*, got meanflow \(meanflow: --deriv"):
        fits("meanflow", 2)
    fits("meanflow", 1), fits("imm", 2)


def test_every_unit_that_calls_no_other_is_compiled() -> None:
    compiled = lambda network, units: [unit for unit in units if _compile(network, units) is None and "forward" in vars(unit)]
    dit, tokens = shards.transformer(), shards.token_model()
    assert compiled(dit, sharding.units_of(dit)) == list(dit.blocks)
    alone = shards.token_model()
    _compile(alone, [])
    assert [m for m in alone.modules() if m._compiled_call_impl is not None] == [alone.backbone, alone.head]
    small = shards.transformer()
    assert compiled(small, [small]) == [small]
    assert compiled(tokens, sharding.units_of(tokens)) == [*tokens.backbone.blocks, tokens.head]


def test_units_are_a_networks_own_or_those_of_its_classes() -> None:
    dit = shards.transformer()
    units = sharding.units_of(dit)
    assert units[-1] is dit
    assert all(layer.adaLN_modulation[1] in units for layer in (*dit.blocks, dit.final_layer))
    assert all(block in units for block in dit.blocks)
    own = shards.Own()
    assert sharding.units_of(own, [shards.Own.Block]) == [own.blocks[1], own.blocks[0], own]
    assert sharding.units_of(own) == [own]
    with pytest.raises(ValueError, match="units: expected classes of the network's modules, got Conv3d"):
        sharding.units_of(own, [nn.Conv3d])
