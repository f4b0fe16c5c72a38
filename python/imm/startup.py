"""What the command line asks of the C libraries before torch loads. A program that imports imm decides for itself.

OpenMP's threads wait briefly, then sleep. By default they spin for milliseconds between two parallel regions; beside another
busy process they then keep the core from the thread that everybody waits for, and training runs several times slower.

malloc keeps freed memory. By default glibc gives activations back to the system after every training step and takes them again,
page by page, a fifth to a third of a step (docs/howto/training.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

#: Turns of libgomp's waiting loop: some microseconds, which two regions of a network are apart.
SPINS = "1000"
#: glibc's names and numbers (malloc.h) and our sizes in bytes: from which on a request gets pages of its own; how much freed
#: memory stays; by how much the heap grows.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 256 << 20),
    "MALLOC_TRIM_THRESHOLD_": (-1, (2 << 30) - 1),
    "MALLOC_TOP_PAD_": (-2, 64 << 20),
}


def command_line() -> bool:
    """Whether Python was started as ``imm`` or with ``-m imm``."""
    if sys.argv[:1] == ["-m"]:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["imm"]
    return Path(sys.argv[0]).name == "imm" if sys.argv else False


def prepare() -> None:
    """Make both settings, each unless the environment has one of its kind."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if sys.platform == "linux" and not {*MALLOC, "GLIBC_TUNABLES"} & os.environ.keys():
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # another C library has none
            for number, size in MALLOC.values():
                mallopt(number, size)


if command_line():
    prepare()
