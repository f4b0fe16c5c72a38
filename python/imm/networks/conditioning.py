"""Modulations of a DiT that are computed once for a sampling run instead of in every step.

They depend on the times and the class alone: all images of a step share the times, so a run has as many distinct rows as it has
pairs of a step and a class.
"""

from __future__ import annotations

from dataclasses import dataclass

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
