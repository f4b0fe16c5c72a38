"""Modulations of a DiT that are computed once for a sampling run instead of in every step.

They depend on the times and the class alone: all images of a step share the times, so a run has as many distinct rows as it has
pairs of a step and a class.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modulations:
    """What adaLN needs in every step of a sampling run: ``modulations[i]``, ``[B, F]``, is for step i.

    rows: ``[N, R, F]``, N steps, R distinct classes, F numbers (``DiT.modulation_features``). index: ``[B]`` int64, each
    image's row.
    """

    rows: Tensor
    index: Tensor

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, step: int) -> Tensor:
        if not 0 <= step < len(self):
            raise IndexError(f"step: expected 0 to {len(self) - 1}, got {step}")
        return self.rows[step].index_select(0, self.index)


class ModulationTable:
    """Keeps the modulations of a fixed schedule by class, the most recently used within a number of bytes.

    Made by :meth:`imm.networks.DiT.table`. Weights that change make it stale: make a new one.
    """

    def __init__(self, compute: Callable[[Tensor | None], Modulations], max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes: expected a number >= 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self._compute = compute
        self._rows: OrderedDict[int, Tensor] = OrderedDict()  # label (-1: without) -> [N, F]

    @property
    def bytes(self) -> int:
        """What the kept modulations take."""
        return sum(row.numel() * row.element_size() for row in self._rows.values())

    @torch.no_grad()
    def __call__(self, labels: Tensor | None, batch: int | None = None) -> Modulations:
        """As ``DiT.condition`` of the table's times; only classes that are not kept are computed. Reads labels on the host."""
        keys = [-1] * (1 if batch is None else batch) if labels is None else labels.tolist()
        distinct = list(dict.fromkeys(keys))
        missing = [key for key in distinct if key not in self._rows]
        found = {key: self._rows[key] for key in distinct if key in self._rows}
        if missing:
            wanted = None if labels is None else torch.tensor(missing, device=labels.device)
            made = self._compute(wanted)
            found |= {key: made.rows[:, int(row)].clone() for key, row in zip(missing, made.index.tolist(), strict=True)}
        for key in distinct:
            self._rows[key] = found[key]
            self._rows.move_to_end(key)
        while self.bytes > self.max_bytes:
            self._rows.popitem(last=False)
        rows = torch.stack([found[key] for key in distinct], dim=1)
        place = {key: i for i, key in enumerate(distinct)}
        return Modulations(rows, torch.tensor([place[key] for key in keys], device=rows.device))
