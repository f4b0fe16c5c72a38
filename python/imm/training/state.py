"""The state that a run resumes from, and the snapshots of the averaged weights beside it.

A state is a folder that torch's distributed checkpoint writes: each process its shards, in safetensors files, which a run with
another number of processes reads as well. It is written while training continues, and renamed when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, distributed, nn

from imm import checkpoints
from imm.checkpoints.format import FORMAT_VERSION, build, check_state
from imm.distributed import Processes
from imm.files import remove_part, write_text
from imm.flow_map import FlowMap
from imm.training.config import CHANGEABLE, differences
from imm.training.ema import AVERAGES, EMA, PowerEMA
from imm.training.sharding import Shards, local, whole_network
from imm.weights import plain_names

#: A state's folder is STATE-STEP; SETTINGS_FILE in it holds everything that is not a tensor.
STATE, SETTINGS_FILE = "training-state", "settings.json"
#: The state of versions before 0.2.
EARLIER = "training-state.safetensors"
_KIND = "training"


@dataclass
class State:
    """Network, average, optimizer and loss scale of a run, and the files in its folder that hold them.

    Attributes:
        settings: of the run (:func:`imm.training.config.settings_of`), kept in both files; a run with others cannot resume it.
        keep_every: snapshots of steps that it divides stay; None for none. where: the processes of the run.
        saved_step: that of the state; None where this run has not written or read one.
        skipped: steps that the run has skipped. changes: of settings, since the run began, each with its step, in words.
    """

    folder: Path
    flow_map: FlowMap
    shards: Shards
    ema: EMA
    averages: list[PowerEMA]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict[str, Any]
    keep_every: int | None
    where: Processes
    saved_step: int | None = None
    skipped: int = 0
    changes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._group: distributed.ProcessGroup | None = None
        for message in ("torch.distributed is disabled", "TypedStorage is deprecated"):  # of torch's own code
            warnings.filterwarnings("ignore", message=message)

    def average(self) -> FlowMap:
        """The flow map around the averaged weights, gathered. Collective."""
        return build(self.settings, whole_network(self.ema.network))

    def snapshot_path(self, step: int) -> Path:
        return self.folder / f"snapshot-{step:07d}.safetensors"

    def averages_path(self, step: int) -> Path:
        """The file of the power-function averages of a step; it stays."""
        return self.folder / f"{AVERAGES}-{step:07d}.safetensors"

    def stays(self, step: int) -> bool:
        """Whether the snapshot of a step is never replaced."""
        return self.keep_every is not None and step % self.keep_every == 0

    def write(self, step: int) -> None:
        """Begin to write the state and then the snapshot, each atomically, and to remove those that they replace. Collective.

        The tensors are copied before this returns, so that training may continue. :meth:`finish` waits for the files.

        Raises:
            CheckpointError: the state before could not be written.
        """
        from torch.distributed import checkpoint as dcp

        self.finish()
        if self.where.world > 1 and self._group is None:  # of its own: training exchanges sums while a state is written
            self._group = distributed.new_group(backend="gloo")
        replaced = None if self.saved_step is None or self.stays(self.saved_step) else self.saved_step
        settings = {
            "format_version": FORMAT_VERSION,
            "kind": _KIND,
            "step": step,
            "replaced_step": replaced,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
            "changes": self.changes,
            "settings": self.settings,
        }
        target = self.folder / f"{STATE}-{step:07d}"
        part = target.with_name(f".{target.name}.part")
        self.where.in_first(lambda: _made(part), f"out: expected a folder that rank 0 can write to, got {self.folder}")
        snapshots = self._snapshots(step)
        storage = dcp.HuggingFaceStorageWriter(str(part), save_distributed=True)
        alone = self._group is None
        written = dcp.async_save(self._tensors(), storage_writer=storage, process_group=self._group, no_dist=alone)
        self._writing = self._pool.submit(self._complete, written, part, target, settings, snapshots)
        self.saved_step = step

    def _complete(
        self, written: Any, part: Path, target: Path, settings: dict[str, Any], snapshots: list[tuple[Path, Any, Any]]
    ) -> None:
        """Wait for all processes' shards; on rank 0, rename the state and write the snapshots."""
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            written.result()
            if not self.where.first:
                return
            write_text(part / SETTINGS_FILE, json.dumps(settings, allow_nan=False))
            part.replace(target)
            _sync(self.folder)
            # A run that is killed here does the rest when it resumes: the state says which snapshot to write and to remove.
            for path, tensors, about in snapshots:
                checkpoints.write_file(path, tensors, about)
            self._remove(settings["replaced_step"], target)
        except checkpoints.CheckpointError:
            raise
        except (Exception, CheckpointException) as error:  # of whatever process failed
            raise checkpoints.CheckpointError(f"cannot write {target}: {_last_line(error)}") from error

    def finish(self) -> None:
        """Wait until what was begun is written.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._modules().items():
            tensors |= {f"{prefix}.{name}": value for name, value in plain_names(module.state_dict()).items()}
        for index, parameter in enumerate(self.shards.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{index}.{key}"] = self.shards.like(index, value)
        return tensors

    def _modules(self) -> dict[str, nn.Module]:
        """Networks and what their tensors' names begin with."""
        powers = {f"{AVERAGES}-{i}": average.network for i, average in enumerate(self.averages)}
        return {"network": self.flow_map.network, "ema": self.ema.network, **powers}

    def _snapshots(self, step: int) -> list[tuple[Path, dict[str, Tensor], dict[str, Any]]]:
        """The files beside the state, with copies of their tensors on the CPU, in rank 0; none in the others. Collective."""
        modules = {f"{i}.": average.network for i, average in enumerate(self.averages)}
        named: dict[str, Tensor] = {}
        for prefix, module in modules.items():
            named |= {f"{prefix}{name}": value for name, value in self._copies(module).items()}
        extra = {"step": step, **self.settings, **({"changes": self.changes} if self.changes else {})}
        about = {"kind": "flow_map", **{key: self.settings[key] for key in ("network", "dtype", "flow_map")}, "extra": extra}
        files = [(self.snapshot_path(step), self._copies(self.ema.network), about)]
        if self.averages:
            lengths = [average.length for average in self.averages]
            files.insert(
                0, (self.averages_path(step), named, {"kind": AVERAGES, "step": step, "lengths": lengths, **self.settings})
            )
        return files if self.where.first else []

    def _copies(self, module: nn.Module) -> dict[str, Tensor]:
        state = plain_names(whole_network(module).state_dict())
        if not self.where.first:
            return {}
        return {name: torch.empty_like(value, device="cpu").copy_(value) for name, value in state.items()}

    def _remove(self, replaced: int | None, state: Path) -> None:
        """Remove the snapshot that was replaced, and all states but one."""
        if replaced is not None:
            self.snapshot_path(replaced).unlink(missing_ok=True)
        for path in states_in(self.folder):
            if path != state:
                shutil.rmtree(path, ignore_errors=True)

    def resume(self, allow_change: Collection[str] = ()) -> int | None:
        """Load the newest state and return its step; None where there is none. Collective.

        Args:
            allow_change: names of settings that may differ from the state's (:data:`imm.training.config.CHANGEABLE`).

        Raises:
            CheckpointError: a state of other settings, or that cannot be read. ValueError: snapshots without a state.
        """
        if self.where.first:
            for part in self.folder.glob(f".{STATE}-*.part"):  # of a killed run
                remove_part(part)
        found = states_in(self.folder)
        if not found:
            if self.where.first:
                self._refuse_snapshots()
            return None
        path = found[-1]
        settings = read_settings(path)
        differing, changed = differences(settings.get("settings"), self.settings, allow_change)
        if differing:
            names = [name for name in CHANGEABLE if any(text.startswith(f"config.{name} ") for text in differing)]
            remedy = f" (--allow-change={','.join(names)} takes them)" if len(names) == len(differing) else ""
            raise checkpoints.CheckpointError(
                f"{path}: expected the settings of the run to resume, got others: {'; '.join(differing[:4])}{remedy}"
            )
        self._take(path)
        self.scaler.load_state_dict(settings["scaler"])
        step = self.saved_step = settings["step"]
        self.skipped = settings["skipped"]
        self.changes = [*settings["changes"], *(f"from step {step}: {text}" for text in changed)]
        for target, tensors, about in self._snapshots(step):
            if not target.exists():
                checkpoints.write_file(target, tensors, about)
        if self.where.first:
            self._remove(settings["replaced_step"], path)
        return step

    def _take(self, path: Path) -> None:
        """Fill network, averages and optimizer. Collective."""
        parameters = list(self.flow_map.network.parameters())
        tensors = {name: value for name, value in self._tensors().items() if not name.startswith("optimizer.")}
        moments: dict[int, dict[str, Tensor]] = {}
        sizes = _sizes(path)
        for name, (size, dtype) in sizes.items():
            part, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if part == "optimizer" and index.isdecimal() and int(index) < len(parameters):
                like = parameters[int(index)]
                made = torch.zeros_like(like, dtype=dtype) if len(size) else torch.zeros((), dtype=dtype)
                tensors[name], moments.setdefault(int(index), {})[key] = made, local(made)
        check_state(tensors, {name: torch.empty(size, device="meta") for name, (size, _) in sizes.items()}, str(path))
        _load(path, tensors, alone=self.where.world == 1)
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _refuse_snapshots(self) -> None:
        """Raise ValueError for a run's folder whose state is lost, or of an earlier version: a new run would mix with it."""
        found = sorted(self.folder.glob("snapshot-*.safetensors"))
        remedy = f"; a new run wants another folder, and --init={found[-1]} begins with these weights" if found else ""
        if (self.folder / EARLIER).exists():
            raise ValueError(f"out: expected a run of this version, got the state of an earlier one, {EARLIER}{remedy}")
        if found:
            raise ValueError(f"out: expected a state beside {found[-1].name}, a folder {STATE}-STEP, got none{remedy}")


def states_in(folder: Path) -> list[Path]:
    """The states of a run, all of them whole, the newest last."""
    return sorted(path for path in folder.glob(f"{STATE}-*") if path.name.removeprefix(f"{STATE}-").isdecimal())


def read_settings(path: Path) -> dict[str, Any]:
    """What a state has besides tensors.

    Raises:
        CheckpointError: no state, or one that is broken or of a newer version.
    """
    try:
        settings = json.loads((path / SETTINGS_FILE).read_text())
        version, found = settings["format_version"], (settings["kind"], type(settings["step"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise checkpoints.CheckpointError(f"{path}: expected a readable {SETTINGS_FILE}, got: {error!r}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION or found != (_KIND, int):
        raise checkpoints.CheckpointError(
            f"{path}: expected a state of format {FORMAT_VERSION} or older, got {version}, {found}"
        )
    return settings


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, in one piece on the CPU, and settings of a run's newest state.

    Raises:
        CheckpointError: no state, or one that is broken.
    """
    found = states_in(folder)
    if not found:
        raise checkpoints.CheckpointError(f"{folder}: expected a state, a folder {STATE}-STEP, got none")
    tensors = {name: torch.zeros(size, dtype=dtype) for name, (size, dtype) in _sizes(found[-1]).items()}
    _load(found[-1], tensors, alone=True)
    return tensors, read_settings(found[-1])


def _sizes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise checkpoints.CheckpointError(f"{path}: expected whole safetensors files, got: {error}") from error
    return {name: (one.size, one.properties.dtype) for name, one in found.items() if isinstance(one, TensorStorageMetadata)}


def _load(path: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    """Fill tensors, in place, from a state. Collective, but where ``alone``."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
    except (Exception, CheckpointException) as error:
        raise checkpoints.CheckpointError(f"{path}: expected a whole state, got: {_last_line(error)}") from error


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else repr(error)


def _made(folder: Path) -> None:
    """An empty folder. Raises ValueError where it cannot be made."""
    try:
        remove_part(folder)
        folder.mkdir()
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written to, got {folder.parent}: {error}") from error


def _sync(folder: Path) -> None:
    """Have the names of a folder's files on the disk, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
