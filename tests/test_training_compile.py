"""The trainer with a compiled network: exact resume, the plain step to rounding, refusals."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, assert_same_state, images, trainer, unet
from torchrun import output_of

from imm import FlowMap, IMMObjective, checkpoints
from imm.training import TrainConfig, Trainer

TWO = """
import dataclasses, sys
sys.path.append(sys.argv[1])
import torch
from test_training_compile import CONFIG, FlowMap, IMMObjective, Small, Trainer, images
from imm import distributed
with distributed.processes() as where:
    for folder, until in (("whole", 4), ("parts", 2), ("parts", 4)):
        torch.manual_seed(0)
        config = dataclasses.replace(CONFIG, compile=True)
        run = Trainer(IMMObjective(FlowMap(Small())), images(), folder, config, where=where)
        run.run(until)
        run.close()
"""


class Small(torch.nn.Module):
    """A network that compiles in seconds."""

    channels, resolution, num_classes = 1, 8, 3

    def __init__(self) -> None:
        super().__init__()
        self.times, self.labels = torch.nn.Linear(2, 4), torch.nn.Embedding(4, 4)
        self.first, self.last = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
        self.dropout = torch.nn.Dropout(0.3)

    def forward(self, x, t, s, labels):
        condition = self.times(torch.stack([t, s], 1).to(x.dtype)) + self.labels(labels)
        h = torch.nn.functional.silu(self.first(x) + condition[:, :, None, None])
        return self.last(self.dropout(h))


@pytest.fixture
def compiling() -> Iterator[None]:
    """A test's own share of what torch keeps of compiled functions, of which it makes a few only."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("needs a C++ compiler")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("made", [Small, pytest.param(unet, marks=pytest.mark.full)])
@pytest.mark.usefixtures("compiling")
def test_a_compiled_run_is_repeated_and_resumed_bit_for_bit_and_plain_to_rounding(made, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, compile=True)

    def run(folder, until: int, config: TrainConfig = config) -> Trainer:
        torch.manual_seed(0)
        run = Trainer(IMMObjective(FlowMap(made())), images(), tmp_path / folder, config)
        run.run(until)
        return run

    whole = run("whole", 6)
    for name, parts in (("again", [6]), ("parts", [3, 6])):
        for until in parts:
            run(name, until)
        assert_same_state(tmp_path / "whole", tmp_path / name)
    assert type(whole.ema_flow_map.network) is type(made())
    with pytest.raises(checkpoints.CheckpointError, match=r"config\.compile was True and is False"):
        run("whole", 7, CONFIG)
    # What a network drops out of one branch it drops out of the other, which is compiled without a gradient.
    x, t, labels = torch.randn(8, 1, 8, 8), torch.full((8,), 0.5, dtype=torch.float64), torch.arange(8) % 3
    network = whole.objective.flow_map.network
    outputs = []
    for seed, grad in ((1, True), (1, False), (2, False)):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            outputs.append(network(x, t, 0.5 * t, labels).detach())
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[2], outputs[0], rtol=1e-2)


@pytest.mark.usefixtures("compiling")
def test_two_processes_that_compile_resume_bit_for_bit(tmp_path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    output_of([sys.executable, *launch, str(script), str(Path(__file__).parent)], cwd=tmp_path)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.usefixtures("compiling")
def test_a_compiled_step_is_the_plain_one_to_rounding(tmp_path) -> None:
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = Small()
        network.dropout.p = 0.0  # which torch's compiler draws in its own way
        config = dataclasses.replace(CONFIG, compile=compiled)
        run = Trainer(IMMObjective(FlowMap(network)), images(), tmp_path / str(compiled), config)
        run.run(1)
        gradients.append([p.grad for p in run._shards.parameters])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_without_a_compiler_a_compiled_run_is_refused_and_leaves_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "absent-compiler")
    with pytest.raises(ValueError, match=r"^compile: expected a C\+\+ compiler, got no absent-compiler on the path"):
        trainer(tmp_path / "run", dataclasses.replace(CONFIG, compile=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("compiling")
def test_a_network_that_is_not_one_graph_is_not_compiled_in_part(tmp_path) -> None:
    class Broken(Small):
        def forward(self, x, t, s, labels):
            torch._dynamo.graph_break()
            return super().forward(x, t, s, labels)

    run = Trainer(IMMObjective(FlowMap(Broken())), images(), tmp_path, dataclasses.replace(CONFIG, compile=True))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run.run(1)
