"""What several commands read the same way."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imm.files import write_text

if TYPE_CHECKING:
    import torch

    from imm.distributed import Processes


class _Path(click.ParamType):
    """A path, "~" expanded: shells leave it where it follows an equals sign."""

    name = "path"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("expected a path, got an empty text", param, ctx)
        return os.path.expanduser(value)


class _Checkpoint(_Path):
    """A checkpoint, the folder of a run (its newest snapshot), or hf://USER/REPO on a hub."""

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        path = super().convert(value, param, ctx)
        if path.startswith("hf://"):
            from imm.checkpoints.hub import fetch

            return str(fetch(path))
        if not os.path.isdir(path):
            return path
        snapshots = {int(found[1]): name for name in os.listdir(path) if (found := SNAPSHOT.fullmatch(name))}
        if not snapshots:
            self.fail(f"expected a checkpoint or the folder of a run with a snapshot, got {path}", param, ctx)
        return os.path.join(path, snapshots[max(snapshots)])


#: The name of a run's snapshot, with its step.
SNAPSHOT = re.compile(r"snapshot-(\d+)\.safetensors")
PATH, CHECKPOINT = _Path(), _Checkpoint()


class Number(click.FloatRange):
    """A number, within bounds if there are any; never NaN, which is within all of them."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail("expected a number, got NaN", param, ctx)
        return number

    def _describe_range(self) -> str:
        return super()._describe_range() if (self.min, self.max) != (None, None) else ""


def say_notes(notes: Iterable[str]) -> None:
    """Print what was found in a data set, each once, on stderr: it is no result."""
    for line in dict.fromkeys(notes):
        click.echo(f"note: {line}", err=True)


def say_left_out(lines: Sequence[str], beside: Path | None = None) -> None:
    """Print how many pictures were left out and the first of them; write all of them to a file ``beside`` the output."""
    if not lines:
        return
    target = None if beside is None else beside.with_name(f"{beside.name}.left-out.txt")
    if target is not None:
        write_text(target, "".join(f"{line}\n" for line in lines))
    click.echo(
        f"left out: {len(lines)} pictures that cannot be read" + (f", listed in {printable(str(target))}" if target else "")
    )
    for line in lines[:3]:
        click.echo(f"  {printable(line)}")


def printable(text: str) -> str:
    """The text with the bytes of names that are no UTF-8 escaped, which a terminal would refuse."""
    return text.encode(errors="backslashreplace").decode()


def name_list(names: Sequence[str], at_most: int = 20) -> str:
    """Class names with their numbers: "0 cat, 1 dog, ..." """
    return ", ".join(
        [*(f"{i} {printable(name)}" for i, name in enumerate(names[:at_most])), *(["..."] if len(names) > at_most else [])]
    )


def parse_floats(text: str, name: str) -> list[float]:
    """ "1.4,0.5" -> [1.4, 0.5]; empty for an empty text. Raises ValueError for anything else."""
    try:
        return [float(item) for item in text.split(",")] if text else []
    except ValueError as error:
        raise ValueError(f"{name}: expected numbers such as 1.4,0.5, got {text!r}") from error


def parse_counts(text: str, name: str) -> list[int]:
    """ "1,2" -> [1, 2]. Raises ValueError for anything but numbers of at least 1, each once."""
    numbers = [int(item) if item.strip().isdecimal() else 0 for item in text.split(",")]
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(f"{name}: expected numbers of at least 1 such as 1,2, each once, got {text!r}")
    return numbers


def grid_of(text: str) -> tuple[int, int]:
    """ "8x6" -> (8, 6): columns and rows."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not int(match[1]) * int(match[2]):
        raise ValueError(f"grid: expected COLUMNSxROWS such as 8x8, got {text!r}")
    return int(match[1]), int(match[2])


def pick_device(name: str) -> torch.device:
    """The torch device for "auto" or a device's name. Raises ValueError for one that is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto or a device of this machine, got {name!r}: {error}") from error
    return device


def process_device(name: str, where: Processes) -> torch.device:
    """:func:`pick_device` for one of several processes: "auto" and "cuda" are the GPUs of its machine in order."""
    import torch

    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{where.local_rank % torch.cuda.device_count()}"
    return pick_device(name)


def device_line(device: torch.device) -> str:
    """The device in words."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def writable_folder(path: str) -> Path:
    """Make the folder and prove that it can be written to, before work starts. Raises ValueError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A name that no other process takes: those of other containers have the same numbers.
        with tempfile.NamedTemporaryFile(prefix=".write-test-", dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written to, got {path}: {error.strerror}") from error
    return folder


def writable_file(path: str) -> Path:
    """Refuse, before work starts, a file whose folder is not there or cannot be written to."""
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"out: expected a file in a folder that can be written to, got {path}")
    return target
