"""Image data sets: one door to read them (:func:`load`), in memory as bytes; statistics; conversion between layouts."""

from imm.data.augmentation import augment
from imm.data.images import ImageData, load, load_tokens, mnist_5k, to_float
from imm.data.summary import digest, summarize

__all__ = ["ImageData", "augment", "digest", "load", "load_tokens", "mnist_5k", "summarize", "to_float"]
