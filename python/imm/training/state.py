"""The state that a run resumes from, one file, and the snapshots of the averaged weights beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm import checkpoints
from imm.checkpoints.format import build, describe, load_state
from imm.flow_map import FlowMap
from imm.training.config import differences
from imm.training.ema import EMA
from imm.weights import plain_names

STATE_FILE = "training-state.safetensors"


@dataclass
class State:
    """Network, average, optimizer and loss scale of a run, and the files in its folder that hold them.

    Attributes:
        settings: of the run (:func:`imm.training.config.settings_of`), kept in both files; a run with others cannot resume it.
        keep_every: snapshots of steps that it divides stay; None for none. writes: whether this process writes the files.
        saved_step: that of the state file; None where this run has not written or read one.
    """

    folder: Path
    flow_map: FlowMap
    ema: EMA
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    settings: dict[str, Any]
    keep_every: int | None
    writes: bool
    saved_step: int | None = None

    @property
    def average(self) -> FlowMap:
        """The flow map around the averaged weights."""
        return build(describe(self.flow_map), self.ema.network)

    def snapshot_path(self, step: int) -> Path:
        return self.folder / f"snapshot-{step:07d}.safetensors"

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
                "settings": self.settings,
            }
            checkpoints.write_file(self.folder / STATE_FILE, self._tensors(), settings)
            # A run that is killed here does the rest when it resumes: the state says which snapshot to write and to remove.
            self._write_snapshot(step)
            self._drop_snapshot(replaced)
        self.saved_step = step

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for prefix, module in (("network", self.flow_map.network), ("ema", self.ema.network)):
            tensors |= {f"{prefix}.{name}": value for name, value in plain_names(module.state_dict()).items()}
        for index, parameter in enumerate(self.flow_map.network.parameters()):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{index}.{key}"] = value
        return tensors

    def _write_snapshot(self, step: int) -> None:
        checkpoints.save(self.snapshot_path(step), self.average, extra={"step": step, **self.settings})

    def _drop_snapshot(self, step: int | None) -> None:
        if step is not None:
            self.snapshot_path(step).unlink(missing_ok=True)

    def resume(self) -> int | None:
        """Load the state file and return its step; None where there is none.

        Raises:
            CheckpointError: a state of other settings, or that cannot be read. ValueError: snapshots without a state.
        """
        path = self.folder / STATE_FILE
        if not path.exists():
            if self.writes:
                self._refuse_snapshots()
            return None
        tensors, settings = checkpoints.read_file(path, "training")
        differing = differences(settings.get("settings"), self.settings)
        if differing:
            raise checkpoints.CheckpointError(
                f"{path}: expected the settings of the run to resume, got others: {'; '.join(differing[:4])}"
            )
        self._take(tensors, str(path))
        self.scaler.load_state_dict(settings["scaler"])
        step = self.saved_step = settings["step"]
        if self.writes:
            if not self.snapshot_path(step).exists():
                self._write_snapshot(step)
            self._drop_snapshot(settings.get("replaced_step"))  # no such entry in states of earlier versions
        return step

    def _take(self, tensors: dict[str, Tensor], source: str) -> None:
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        load_state(self.flow_map.network, parts["network"], source)
        load_state(self.ema.network, parts["ema"], source)
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
