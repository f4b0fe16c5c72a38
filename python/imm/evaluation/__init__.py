"""Numbers that say how good samples are, and the protocol that makes them comparable."""

from imm.evaluation.evaluate import METRICS, ReferenceStatistics, evaluate
from imm.evaluation.metrics import MMDReference, Neighbourhoods, inception_score, kernel_distance, neighbourhoods
from imm.evaluation.pixels import PixelReference, PixelScores
from imm.evaluation.points import energy_distance, sliced_wasserstein, total_variation
from imm.evaluation.sequences import covariance_slope, forced_energy_score
from imm.evaluation.sets import PictureSet, load_set, picture_set
from imm.evaluation.statistics import FeatureStatistics, frechet_distance

__all__ = [
    "METRICS",
    "FeatureStatistics",
    "MMDReference",
    "Neighbourhoods",
    "PictureSet",
    "PixelReference",
    "PixelScores",
    "ReferenceStatistics",
    "covariance_slope",
    "energy_distance",
    "evaluate",
    "forced_energy_score",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_set",
    "neighbourhoods",
    "picture_set",
    "sliced_wasserstein",
    "total_variation",
]
