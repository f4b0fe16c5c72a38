"""What all commands do with paths and numbers on their command line."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from imm.cli import main
from imm.cli.options import PATH, Number


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
    paths = ("DIR", "FILE", "PATH", "SOURCE", "PATH|ID", "A", "B", "A.json", "B.json")
    found = dict(options())
    assert sum(isinstance(option.type, type(PATH)) for option in found.values()) > 20
    for name, option in found.items():
        assert (option.metavar in paths) == isinstance(option.type, type(PATH)), name
        assert option.type is not click.FLOAT, name
        assert not isinstance(option.type, click.FloatRange) or isinstance(option.type, Number), name


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("train", "--data=mnist5k", "--outdir="), "'--outdir': expected a path, got an empty text"),
        (("sample", "--net=", "--outdir=x"), "'--net': expected a path, got an empty text"),
        (("data", "convert", "--source=", "--dest=x.zip"), "'--source': expected a path, got an empty text"),
        (("train", "--data=mnist5k", "--outdir=x", "--dropout=nan"), "'--dropout': expected a number, got NaN"),
        (("train", "--data=mnist5k", "--outdir=x", "--minutes=NaN"), "'--minutes': expected a number, got NaN"),
        (("sample", "--net=x", "--outdir=x", "--cfg=nan"), "'--cfg': expected a number, got NaN"),
    ],
)
def test_empty_paths_and_nan_are_refused_before_work(arguments, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert f"Error: Invalid value for {text}\n" in result.output
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PATH.convert("~/x", None, None) == str(tmp_path / "x")
    result = CliRunner().invoke(main, ("export", "--net=~/absent.safetensors", "--out=~/net.pt2"))
    assert str(tmp_path / "absent.safetensors") in result.output
