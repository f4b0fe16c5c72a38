"""Losses of flow maps, all with one call: see :class:`Objective`."""

from collections.abc import Callable
from functools import partial

from imm.objectives.base import T_BINS, Batch, Draws, Objective
from imm.objectives.consistency import Consistency
from imm.objectives.energy_score import EnergyScore
from imm.objectives.flow_matching import FlowMatching
from imm.objectives.imm import IMM
from imm.objectives.meanflow import MeanFlow
from imm.objectives.self_distillation import SelfDistillation
from imm.objectives.sequences import TRAIN_BACKBONE, AnyDraws, AnyObjective, SequenceObjective
from imm.objectives.shortcut import Shortcut

#: ``imm train --loss`` -> what makes the objective of a flow map.
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "imm": IMM,
    "fm": FlowMatching,
    "consistency": Consistency,
    "shortcut": Shortcut,
    "progressive": partial(SelfDistillation, kind="progressive"),
    "lagrangian": partial(SelfDistillation, kind="lagrangian"),
    "meanflow": MeanFlow,
    "energy": EnergyScore,
}

#: What samples a network that was trained by a loss; "pushforward" where it is not here.
SAMPLED_BY = {"fm": "ddim", "consistency": "restart", "energy": "restart"}

__all__ = [
    "IMM",
    "OBJECTIVES",
    "SAMPLED_BY",
    "TRAIN_BACKBONE",
    "T_BINS",
    "AnyDraws",
    "AnyObjective",
    "Batch",
    "Consistency",
    "Draws",
    "EnergyScore",
    "FlowMatching",
    "MeanFlow",
    "Objective",
    "SelfDistillation",
    "SequenceObjective",
    "Shortcut",
]
