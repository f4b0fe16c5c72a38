"""Numbers that say how good samples are, without a pretrained network."""

from imm.evaluation.pixels import PixelReference, PixelScores

__all__ = ["PixelReference", "PixelScores"]
