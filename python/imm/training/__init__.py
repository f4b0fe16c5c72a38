"""Training: EMA, precision, snapshots and exact resume."""

from imm.training.config import TrainConfig
from imm.training.ema import EMA
from imm.training.trainer import Trainer, TrainingError

__all__ = ["EMA", "TrainConfig", "Trainer", "TrainingError"]
