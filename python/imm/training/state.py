"""The state that a run resumes from, one file, and the snapshots of the averaged weights beside it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm import checkpoints
from imm.checkpoints.format import build, describe, load_state
from imm.flow_map import FlowMap
from imm.training.config import CHANGEABLE, differences
from imm.training.ema import AVERAGES, EMA, PowerEMA
from imm.weights import plain_names

STATE_FILE = "training-state.safetensors"


@dataclass
class State:
    """Network, average, optimizer and loss scale of a run, and the files in its folder that hold them.

    Attributes:
        settings: of the run (:func:`imm.training.config.settings_of`), kept in both files; a run with others cannot resume it.
        keep_every: snapshots of steps that it divides stay; None for none. writes: whether this process writes the files.
        saved_step: that of the state file; None where this run has not written or read one.
        skipped: steps that the run has skipped. changes: of settings, since the run began, each with its step, in words.
    """

    folder: Path
    flow_map: FlowMap
    ema: EMA
    averages: list[PowerEMA]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict[str, Any]
    keep_every: int | None
    writes: bool
    saved_step: int | None = None
    skipped: int = 0
    changes: list[str] = field(default_factory=list)

    @property
    def average(self) -> FlowMap:
        """The flow map around the averaged weights."""
        return build(describe(self.flow_map), self.ema.network)

    def snapshot_path(self, step: int) -> Path:
        return self.folder / f"snapshot-{step:07d}.safetensors"

    def averages_path(self, step: int) -> Path:
        """The file of the power-function averages of a step; it stays."""
        return self.folder / f"{AVERAGES}-{step:07d}.safetensors"

    def stays(self, step: int) -> bool:
        """Whether the snapshot of a step is never replaced."""
        return self.keep_every is not None and step % self.keep_every == 0

    def write(self, step: int) -> None:
        """Write the state and the snapshot, each atomically, and remove the snapshot that it replaces."""
        if self.writes:
            replaced = None if self.saved_step is None or self.stays(self.saved_step) else self.saved_step
            settings = {
                "kind": "training",
                "step": step,
                "replaced_step": replaced,
                "scaler": self.scaler.state_dict(),
                "skipped": self.skipped,
                "changes": self.changes,
                "settings": self.settings,
            }
            checkpoints.write_file(self.folder / STATE_FILE, self._tensors(), settings)
            # A run that is killed here does the rest when it resumes: the state says which snapshot to write and to remove.
            self._write_averages(step)
            self._write_snapshot(step)
            self._drop_snapshot(replaced)
        self.saved_step = step

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._modules().items():
            tensors |= {f"{prefix}.{name}": value for name, value in plain_names(module.state_dict()).items()}
        for index, parameter in enumerate(self.flow_map.network.parameters()):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        return tensors

    def _modules(self) -> dict[str, nn.Module]:
        """Networks and what their tensors' names begin with."""
        powers = {f"{AVERAGES}-{i}": average.network for i, average in enumerate(self.averages)}
        return {"network": self.flow_map.network, "ema": self.ema.network, **powers}

    def _write_snapshot(self, step: int) -> None:
        changes = {"changes": self.changes} if self.changes else {}
        checkpoints.save(self.snapshot_path(step), self.average, extra={"step": step, **self.settings, **changes})

    def _write_averages(self, step: int) -> None:
        if self.averages:
            modules = (average.network for average in self.averages)
            named = {f"{i}.{k}": v for i, m in enumerate(modules) for k, v in plain_names(m.state_dict()).items()}
            settings = {"kind": AVERAGES, "step": step, "lengths": [a.length for a in self.averages], **self.settings}
            checkpoints.write_file(self.averages_path(step), named, settings)

    def _drop_snapshot(self, step: int | None) -> None:
        if step is not None:
            self.snapshot_path(step).unlink(missing_ok=True)

    def resume(self, allow_change: Collection[str] = ()) -> int | None:
        """Load the state file and return its step; None where there is none.

        Args:
            allow_change: names of settings that may differ from the state's (:data:`imm.training.config.CHANGEABLE`).

        Raises:
            CheckpointError: a state of other settings, or that cannot be read. ValueError: snapshots without a state.
        """
        path = self.folder / STATE_FILE
        if not path.exists():
            if self.writes:
                self._refuse_snapshots()
            return None
        tensors, settings = checkpoints.read_file(path, "training")
        differing, changed = differences(settings.get("settings"), self.settings, allow_change)
        if differing:
            names = [name for name in CHANGEABLE if any(text.startswith(f"config.{name} ") for text in differing)]
            remedy = f" (--allow-change={','.join(names)} takes them)" if len(names) == len(differing) else ""
            raise checkpoints.CheckpointError(
                f"{path}: expected the settings of the run to resume, got others: {'; '.join(differing[:4])}{remedy}"
            )
        self._take(tensors, str(path))
        self.scaler.load_state_dict(settings["scaler"])
        step = self.saved_step = settings["step"]
        self.skipped = settings.get("skipped", 0)  # no such entries in states of earlier versions
        self.changes = [*settings.get("changes", []), *(f"from step {step}: {text}" for text in changed)]
        if self.writes:
            if not self.averages_path(step).exists():
                self._write_averages(step)
            if not self.snapshot_path(step).exists():
                self._write_snapshot(step)
            self._drop_snapshot(settings.get("replaced_step"))  # no such entry in states of earlier versions
        return step

    def _take(self, tensors: dict[str, Tensor], source: str) -> None:
        modules = self._modules()
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in (*modules, "optimizer")}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        for name, module in modules.items():
            load_state(module, parts[name], source)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        for parameter in self.flow_map.network.parameters():
            values = self.optimizer.state[parameter]
            for key, value in values.items():
                # In memory of its own, the file is mapped; and fused optimizers pair numbers by their place in memory.
                same = value.shape == parameter.shape
                values[key] = torch.empty_like(parameter).copy_(value) if same else value.clone()

    def _refuse_snapshots(self) -> None:
        """Raise ValueError for a run's folder whose state is lost: a new run would mix with it."""
        found = sorted(self.folder.glob("snapshot-*.safetensors"))
        if found:
            raise ValueError(
                f"out: expected {STATE_FILE} beside {found[-1].name}, got a folder without; a new run wants another folder, "
                f"and --init={found[-1]} begins with these weights"
            )
