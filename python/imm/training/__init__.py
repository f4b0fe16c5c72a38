"""Training: averages, precision, snapshots and exact resume; what can be watched while it runs."""

from imm.training.config import TrainConfig
from imm.training.ema import EMA, PowerEMA, reconstruct
from imm.training.trainer import Trainer, TrainingError
from imm.training.watch import Scoring, Watch

__all__ = ["EMA", "PowerEMA", "Scoring", "TrainConfig", "Trainer", "TrainingError", "Watch", "reconstruct"]
