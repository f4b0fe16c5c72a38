"""Studies: claims that anyone can run, each a function that returns rows, figures and criteria (``imm study``)."""

from imm.studies import axes, capacity, losses
from imm.studies.study import Criterion, Result, Study

STUDIES: dict[str, Study] = {"axes": axes.STUDY, "capacity": capacity.STUDY, "losses": losses.STUDY}

__all__ = ["STUDIES", "Criterion", "Result", "Study"]
