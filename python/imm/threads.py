"""How OpenMP's threads wait, where this process is the command line: briefly, then asleep.

By default they spin for milliseconds between two parallel regions. Beside another busy process they then keep the core from the
thread that everybody waits for, and training runs several times slower. libgomp reads its settings when torch loads it, so this
runs before. A program that imports imm decides for itself (docs/training.md).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

#: Turns of libgomp's waiting loop: some microseconds, which two regions of a network are apart.
SPINS = "1000"


def command_line() -> bool:
    """Whether Python was started as ``imm`` or with ``-m imm``."""
    if sys.argv[:1] == ["-m"]:
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["imm"]
    return Path(sys.argv[0]).name == "imm" if sys.argv else False


if command_line() and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = SPINS
