"""Where a run's rows and pictures are shown beside its own files: TensorBoard or Weights & Biases."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from imm.files import write_text
from imm.pictures import Picture

#: In a run's folder: the id under which W&B knows the run.
WANDB_ID = "wandb-id"


class Log(Protocol):
    """What a run's rows and pictures are sent to.

    Attributes:
        replays: whether a resumed run sends again what it has, because the log may have lost some of it.
    """

    replays: bool

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def picture(self, step: int, name: str, picture: Picture) -> None:
        """A picture of a step."""

    def flush(self) -> None:
        """Hand over what was given so far: a process that is killed afterwards loses nothing of it."""

    def close(self) -> None:
        """Hand over all, and end."""


def check_log(kind: str) -> None:
    """Raise ValueError for an unknown log, or one whose package is not installed."""
    if kind not in LOGS:
        raise ValueError(f"log: expected one of {', '.join(LOGS)}, got {kind!r}")
    try:
        importlib.import_module("torch.utils.tensorboard" if kind == "tensorboard" else kind)
    except ImportError as error:
        raise ValueError(f"log: expected the package {kind} (pip install {kind}), which is not installed: {error}") from error


def open_log(kind: str, folder: Path, step: int | None, settings: Mapping[str, Any]) -> Log:
    """A log of :data:`LOGS` in a run's folder, to continue after the run's ``step``; None begins it anew.

    Raises:
        ValueError: a log that cannot be opened, such as W&B without a login.
    """
    check_log(kind)
    try:
        return LOGS[kind](folder, step, settings)
    except Exception as error:  # W&B's own
        raise ValueError(f"log: expected {kind} to start, got {type(error).__name__}: {error}") from error


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, those of lists and dictionaries as ``name/key``; what is None is left out."""
    return dict(_flat(row))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is not None:
        for key, one in items:
            yield from _flat(one, f"{name}/{key}" if name else str(key))
    elif isinstance(value, (int, float)):
        yield name, float(value)


class _TensorBoard:
    """Event files in ``tensorboard/``. TensorBoard's purge_step voids what a killed run wrote after its last state."""

    replays = False

    def __init__(self, folder: Path, step: int | None, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0 if step is None else step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A run of W&B: online the same one after a resume or, as its setting WANDB_MODE says, offline in ``wandb/``.

    What a killed process had handed over may be lost. So a resumed run hands over everything again; online, from the step on
    that W&B lacks. Offline nothing tells what it lacks: each start is then a run of its own, and the newest is whole.
    """

    replays = True

    def __init__(self, folder: Path, step: int | None, settings: Mapping[str, Any]) -> None:
        import wandb

        path = folder / WANDB_ID
        if step is None or not path.exists() or wandb.setup().settings.mode == "offline":
            write_text(path, secrets.token_hex(4) + "\n")
        self._image, self._step, self._values = wandb.Image, 0, dict[str, Any]()
        self._run = wandb.init(
            project="imm",
            name=folder.name,
            group=folder.name,
            dir=str(folder),
            id=path.read_text().strip(),
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off"),
        )
        self._lacks = self._run.step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, values)

    def picture(self, step: int, name: str, picture: Picture) -> None:
        self._add(step, {name: self._image(picture)})

    def _add(self, step: int, values: Mapping[str, Any]) -> None:
        """Take values of a step; it is sent as a whole, with the first values of the next one."""
        if step != self._step:
            self.flush()
        self._step = step
        self._values |= values

    def flush(self) -> None:
        if self._values and self._step >= self._lacks:
            self._run.log(self._values, step=self._step, commit=True)
        self._values = {}

    def close(self) -> None:
        self.flush()
        self._run.finish()


LOGS: dict[str, Callable[[Path, int | None, Mapping[str, Any]], Log]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
