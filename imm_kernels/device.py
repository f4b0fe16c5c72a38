"""What launchers ask of a device."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # Tensors elsewhere are the interpreter's: as on an H200.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
