"""What all commands do with paths and numbers on their command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from command_line import call, refused, said

from imm import pictures, presets, sampling
from imm.backends import PRECISIONS
from imm.cli import commands, main
from imm.cli.options import PATH, Number
from imm.data import sources
from imm.evaluation.evaluate import METRICS
from imm.evaluation.networks import NAMES
from imm.flow_map import SECOND_TIMES
from imm.networks.dit import SIZES
from imm.objectives import OBJECTIVES, base, consistency, meanflow
from imm.objectives.imm import MAPPINGS
from imm.ops import mmd
from imm.parametrizations import PARAMETRIZATIONS
from imm.schedules import SCHEDULES
from imm.studies import STUDIES
from imm.training.config import DECAYS, OPTIMIZERS
from imm.training.log import LOGS


def options() -> Iterator[tuple[str, click.Parameter]]:
    """Every option and argument of every command and sub-command."""

    def of(command: click.Command, name: str) -> Iterator[tuple[str, click.Parameter]]:
        context = click.Context(command)
        for parameter in command.params:
            yield f"{name} {parameter.name}", parameter
        for inner in command.list_commands(context) if isinstance(command, click.Group) else ():
            found = command.get_command(context, inner)
            assert found is not None
            yield from of(found, f"{name} {inner}")

    yield from of(main, "imm")


def test_every_path_option_expands_and_every_number_refuses_nan() -> None:
    """An option that names a path says so by its metavar, and one of a number by its type."""
    paths = ("DIR", "FILE", "PATH", "PATH|ID", "A", "B", "A.json", "B.json", "RUN", "[OP | compare A B]")
    found = dict(options())
    assert sum(isinstance(option.type, type(PATH)) for option in found.values()) > 20
    for name, option in found.items():
        assert (option.metavar in paths) == isinstance(option.type, type(PATH)), name
        assert option.type is not click.FLOAT, name
        assert not isinstance(option.type, click.FloatRange) or isinstance(option.type, Number), name


def test_the_words_of_choices_are_those_of_the_library() -> None:
    known = {
        "kernel": mmd.KERNELS,
        "mapping": MAPPINGS,
        "schedule": SCHEDULES,
        "parametrization": PARAMETRIZATIONS,
        "second_time": SECOND_TIMES,
        "kind": sampling.KINDS,
        "method": sampling.METHODS,
        "precision": PRECISIONS,
        "optimizer": OPTIMIZERS,
        "decay": DECAYS,
        "loss": OBJECTIVES,
        "times": base.TIMES,
        "distance": consistency.DISTANCES,
        "derivative": meanflow.DERIVATIVES,
        "name": ("all", *STUDIES),
        "log": LOGS,
        "transform": pictures.TRANSFORMS,
        "split": sources.SPLITS,
        "size": SIZES,
        "preset": presets.PRESETS,
        "network": ("unet", "dit"),
        "channels": ("1", "3"),
    }
    for name, option in options():
        if isinstance(option.type, click.Choice):
            words = set(known[option.name or ""])
            assert set(option.type.choices) == words - ({"tf32"} if name == "imm export precision" else set()), name
    assert ", ".join(METRICS) == commands.METRICS
    assert set(commands.DEFAULT_METRICS.split(",")) <= METRICS.keys()
    assert ", ".join(NAMES) in dict(options())["imm eval stats features"].help  # type: ignore[attr-defined]


def test_one_vocabulary() -> None:
    """The same thing has the same name in every command, and what it replaced is gone."""
    flags = {name: option.opts for name, option in options() if isinstance(option, click.Option)}
    used = {flag for opts in flags.values() for flag in opts}
    assert not used & {"--outdir", "--dest", "--source", "--images", "--pkl", "--dtype"}
    assert flags["imm sample guidance"] == ["--guidance", "--cfg"]
    for name, option in options():
        if name.endswith(" batch"):
            assert "Images a " in (option.help or ""), name  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "train",
        "sample",
        "data",
        "data convert",
        "eval",
        "eval stats",
        "ema",
        "report",
        "study",
        "import",
        "export",
        "demo",
        "doctor",
    ],
)
def test_help_needs_no_torch(command, tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "imm", *command.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: imm")


def test_the_help_of_train_has_groups() -> None:
    output = said("train", "--help")
    titles = [line for line in output.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Data:", "Run:", "Watching:", "Optimization:", "Network:", "Flow map:", "Objective:", "Other:"]
    objective_part = output[output.index("Objective:") :]
    assert all(flag in objective_part for flag in ("--particles", "-k ", "--label-dropout"))
    assert "--t-max" not in objective_part


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("train", "--data=mnist5k", "--out="), "'--out': expected a path, got an empty text"),
        (("sample", "--net=", "--out=x"), "'--net': expected a path, got an empty text"),
        (("data", "convert", "--data=", "--out=x.zip"), "'--data': expected a path, got an empty text"),
        (("train", "--data=mnist5k", "--out=x", "--dropout=nan"), "'--dropout': expected a number, got NaN"),
        (("train", "--data=mnist5k", "--out=x", "--minutes=NaN"), "'--minutes': expected a number, got NaN"),
        (("sample", "--net=x", "--out=x", "--cfg=nan"), "'--guidance' / '--cfg': expected a number, got NaN"),
    ],
)
def test_empty_paths_and_nan_are_refused_before_work(arguments, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, ok=False)
    assert result.exit_code == 2
    assert f"Error: Invalid value for {text}\n" in result.output
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PATH.convert("~/x", None, None) == str(tmp_path / "x")
    assert str(tmp_path / "absent.safetensors") in refused("export", "--net=~/absent.safetensors", "--out=~/net.pt2")
