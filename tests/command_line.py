"""The command line, run in this process."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from imm.cli import main


def call(*arguments: Any, ok: bool = True) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert (result.exit_code == 0) is ok, f"{result.output}\n{result.exception!r}"
    return result


def said(*arguments: Any) -> str:
    """What a command that succeeds prints."""
    return call(*arguments).output


def refused(*arguments: Any) -> str:
    """The one line that a mistake gets."""
    result = call(*arguments, ok=False)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("Error: "), result.output
    return line
