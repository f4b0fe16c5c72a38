"""Training: EMA, precision, snapshots and exact resume."""

from imm.training.ema import EMA
from imm.training.trainer import TrainConfig, Trainer, TrainingError

__all__ = ["EMA", "TrainConfig", "Trainer", "TrainingError"]
