"""The statistics of a run: sums between two rows, and the file of the rows."""

from __future__ import annotations

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.distributed import Processes
from imm.files import write_text
from imm.objectives import T_BINS

STATS_FILE = "stats.jsonl"


class Window:
    """Sums of the statistics between two rows, kept on the device until they are read.

    Attributes:
        count: steps between the rows, with those that were skipped. skipped: how many were; their statistics do not count.
    """

    def __init__(self) -> None:
        self.count = self.skipped = 0
        self.start = time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._pairs: Tensor | None = None

    def add(self, stats: dict[str, Tensor], norm: Tensor) -> None:
        values = {**stats, "t_bin_loss": _bin_sums(stats), "grad_norm": norm}
        self._pairs = values.pop("pairs", None)
        self._sums = {n: self._sums[n] + v if self._sums else v for n, v in values.items()}
        self.count += 1

    def skip(self) -> None:
        """A step that was skipped."""
        self.count += 1
        self.skipped += 1

    def row(self, batch: int, particles: int, where: Processes) -> dict[str, Any]:
        """The row of all processes' statistics. Collective."""
        sums = {name: where.sums(value.double().cpu()) for name, value in self._sums.items()}
        pairs = None if self._pairs is None else where.sums(self._pairs.double().cpu()).tolist()
        seconds = time.perf_counter() - self.start
        row: dict[str, Any] = {"images_per_second": batch * self.count / seconds, "seconds": seconds}
        if not sums:  # every step was skipped
            return row
        kept = (self.count - self.skipped) * where.world
        means = {name: float(sums[name]) / kept for name in ("loss", "grad_norm", "gap", "at_s")}
        means["loss_times_m"] = means["loss"] * particles
        if pairs is not None:
            means["matched_share"] = pairs[0] / pairs[1] if pairs[1] else math.nan
        bins = sums["t_bin_loss"] / sums["t_bin_count"]
        return {
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
            "t_bin_loss": [v if math.isfinite(v) else None for v in bins.tolist()],
            "t_bins": T_BINS,
            "nonfinite": int(sums["nonfinite"]),
            **row,
        }


def combined(parts: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The statistics of a batch from those of its parts, each with its share of the batch."""
    out = {name: torch.stack([share * stats[name] for share, stats in parts]).sum(0) for name in ("loss", "gap", "at_s")}
    for name in ("t_bin_count", "nonfinite"):
        out[name] = torch.stack([stats[name] for _, stats in parts]).sum(0)
    if all("pairs" in stats for _, stats in parts):
        out["pairs"] = torch.stack([stats["pairs"] for _, stats in parts]).sum(0)
    out["t_bin_loss"] = torch.stack([_bin_sums(stats) for _, stats in parts]).sum(0) / out["t_bin_count"]
    return out


def _bin_sums(stats: dict[str, Tensor]) -> Tensor:
    """The sum of the losses in each bin of t; 0 for an empty bin, whose mean is NaN."""
    return torch.where(stats["t_bin_count"] > 0, stats["t_bin_loss"] * stats["t_bin_count"], 0.0)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of rows."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file but for a last one that is being written; none where there is no file.

    Raises:
        ValueError: lines that are no rows.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i + 1 < len(lines):
                raise ValueError(f"rows: expected those of a training run in {path}, got {line[:60]!r}") from error
    return rows


def trim(path: Path, step: int | None) -> None:
    """Drop the rows after the state's step: a killed run may have written some, the last one in part.

    Without a state (None) the rows are of a run that never saved one: they are kept beside, as ``stats-1.jsonl`` and so on.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for i, line in enumerate(lines) if _stays(path, line, step or 0, last=i + 1 == len(lines))]
    try:
        if step is None and any(line.strip() for line in lines):
            names = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
            path.rename(next(name for name in names if not name.exists()))
        if lines or path.name == STATS_FILE:
            write_text(path, "".join(line + "\n" for line in kept))
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written to, got {path.parent}: {error}") from error


def _stays(path: Path, line: str, step: int, *, last: bool) -> bool:
    """Whether a line is a row of a step up to this one. Raises ValueError for one that is no row, but for the last."""
    if not line.strip():
        return False
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError) as error:
        if last and isinstance(error, json.JSONDecodeError):
            return False
        raise ValueError(f"out: expected rows of a training run in {path}, got {line[:60]!r}") from error
