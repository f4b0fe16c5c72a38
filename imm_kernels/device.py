"""What launchers ask of a device, and what they compute on the host."""

from __future__ import annotations

import functools

import torch


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # Tensors elsewhere are the interpreter's: as on an H200.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def next_power_of_2(n: int) -> int:
    """Triton's own takes a tenth of a launch on the host."""
    return 1 << (n - 1).bit_length()
