"""imm: Inductive Moment Matching, trained, sampled and measured.

``import imm`` never compiles, prints, needs triton or touches CUDA.
"""

import importlib
from typing import Any

from imm import threads  # isort: skip  (before torch, which starts OpenMP)
from imm import checkpoints, functional, latents, networks, package, parametrizations, presets, sampling, schedules
from imm.checkpoints import load
from imm.flow_map import FlowMap
from imm.functional import noise
from imm.objective import IMMObjective
from imm.sampler import Sampler
from imm.version import __version__

__all__ = [
    "FlowMap",
    "IMMObjective",
    "Sampler",
    "__version__",
    "checkpoints",
    "functional",
    "latents",
    "load",
    "networks",
    "noise",
    "package",
    "parametrizations",
    "presets",
    "sampling",
    "schedules",
]

del threads


def __getattr__(name: str) -> Any:
    """Rooms that are imported when they are first asked for."""
    if name in ("data", "evaluation", "training"):
        return importlib.import_module(f"imm.{name}")
    raise AttributeError(f"module 'imm' has no attribute {name!r}")
