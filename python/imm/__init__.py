"""imm: Inductive Moment Matching, trained, sampled and measured.

``import imm`` never compiles, prints, needs triton or touches CUDA.
"""

import importlib
from typing import TYPE_CHECKING, Any

from imm import startup  # isort: skip  (before torch, which starts OpenMP)

if TYPE_CHECKING or not startup.command_line():  # the command line imports what a command needs, so that --help is quick
    from imm import checkpoints, functional, latents, networks, objectives, parametrizations, presets, sampling, schedules
    from imm.checkpoints import load
    from imm.flow_map import FlowMap
    from imm.functional import noise
    from imm.objectives import IMM as IMMObjective
    from imm.sampling import Sampler, TokenSampler, package
from imm.version import __version__

__all__ = [
    "FlowMap",
    "IMMObjective",
    "Sampler",
    "TokenSampler",
    "__version__",
    "checkpoints",
    "functional",
    "latents",
    "load",
    "networks",
    "noise",
    "objectives",
    "package",
    "parametrizations",
    "presets",
    "sampling",
    "schedules",
]

_ROOM_OF = {
    "FlowMap": "flow_map",
    "Sampler": "sampling",
    "TokenSampler": "sampling",
    "load": "checkpoints",
    "noise": "functional",
    "package": "sampling",
}

del startup


def __getattr__(name: str) -> Any:
    """Import a name that was not imported above when it is first used."""
    if name == "IMMObjective":  # its name before there were others
        return importlib.import_module("imm.objectives").IMM
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"imm.{_ROOM_OF[name]}"), name)
    if name in (*__all__, "data", "evaluation", "training"):
        return importlib.import_module(f"imm.{name}")
    raise AttributeError(f"module 'imm' has no attribute {name!r}")
