"""Few-step sampling: time grids, pushforward and restart, the sampler that runs them in one call, packages, folders."""

from imm.sampling import package
from imm.sampling.grid import KINDS, METHODS, StepTable, step_table, time_grid
from imm.sampling.loop import initial_state, pushforward, restart
from imm.sampling.sampler import Sampler
from imm.sampling.tokens import TokenSampler

__all__ = [
    "KINDS",
    "METHODS",
    "Sampler",
    "StepTable",
    "TokenSampler",
    "initial_state",
    "package",
    "pushforward",
    "restart",
    "step_table",
    "time_grid",
]
