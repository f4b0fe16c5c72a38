"""Image data sets held in memory: real digits that ship inside a package, folders of images, npz files."""

from imm.data.images import ImageData, load, mnist_5k

__all__ = ["ImageData", "load", "mnist_5k"]
