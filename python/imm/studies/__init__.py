"""Studies: claims that anyone can run, each a function that returns rows, figures and criteria (``imm study``)."""

from imm.studies import axes, capacity, factorisation, losses, particles, second_time
from imm.studies.study import Criterion, Result, Study

STUDIES: dict[str, Study] = {
    "capacity": capacity.STUDY,
    "second-time": second_time.STUDY,
    "particles": particles.STUDY,
    "factorisation": factorisation.STUDY,
    "losses": losses.STUDY,
    "axes": axes.STUDY,
}

#: Those that train nothing longer than seconds: what ``imm study all --quick`` runs.
TOYS = ("capacity", "second-time", "particles", "factorisation")

__all__ = ["STUDIES", "TOYS", "Criterion", "Result", "Study"]
