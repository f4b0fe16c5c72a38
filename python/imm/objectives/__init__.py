"""Losses of flow maps, all with one call: see :class:`Objective`."""

from imm.objectives.base import T_BINS, Batch, Draws, Objective
from imm.objectives.imm import IMM

#: ``imm train --loss`` -> class.
OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (IMM,)}

__all__ = ["IMM", "OBJECTIVES", "T_BINS", "Batch", "Draws", "Objective"]
