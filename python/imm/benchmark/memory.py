"""How much memory a peer needs: its inputs, what it keeps across steps, and the most that is allocated within a step."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from imm.benchmark.case import Peer, Step


def peak_bytes(peer: Peer, inputs: tuple[Any, ...], device: torch.device) -> int:
    """Peak bytes of a peer's second step, from torch's allocator; what existed before (a network's weights) is not counted."""
    given = sum(value.nbytes for value in inputs if isinstance(value, Tensor))
    measured = _cuda if device.type == "cuda" else _cpu

    def first() -> Step:
        step = peer(*inputs)
        step()  # compiles, and leaves what it keeps
        return step

    step, kept, _ = measured(first)
    _, _, most = measured(step)
    return given + kept + most


def _cuda(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """What the call returns, the bytes more than before after it, and at most within it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


def _cpu(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The same from the profiler, which notes every allocation of torch's CPU allocator."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    recorded = profiler.profiler.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return result, held, most


def bytes_of_two_steps(make: Callable[[], Step]) -> int | None:
    """The most that torch's CUDA allocator gives out while a step is made and called twice; None where it has less."""
    found = _tried(make)
    gc.collect()  # not before the frames of a step that failed are gone, and with them what they held
    torch.cuda.empty_cache()
    return found


def _tried(make: Callable[[], Step]) -> int | None:
    torch.cuda.reset_peak_memory_stats()
    try:
        step = make()
        for _ in range(2):  # the first one makes the optimizer's state
            step()
        torch.cuda.synchronize()
    except RuntimeError as error:
        # Near the limit libraries find no work space, and say so in their own words.
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("ALLOC_FAILED|unable to find an engine", str(error)):
            raise
        return None
    return torch.cuda.max_memory_allocated()


@contextlib.contextmanager
def allocator_limit(most: int, device: torch.device) -> Iterator[None]:
    """Within this context torch's CUDA allocator has ``most`` bytes."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device.index)


def largest(peak: Callable[[int], int | None], unit: int, seconds: float) -> tuple[int, int, int | None]:
    """The largest multiple of ``unit`` found to fit, its bytes, and the smallest found not to (None: the time was over before).

    ``peak`` gives the bytes of a size, None where it does not fit. Sizes double until one does not fit; then the interval is
    halved until it is an eighth of the size, or ``seconds`` are over.
    """
    began = time.monotonic()
    fits, taken, fails = 0, 0, None
    while time.monotonic() - began < seconds:
        if fails is not None and fails - fits <= max(unit, fits // 8):
            break
        size = max(unit, 2 * fits) if fails is None else (fits + fails) // 2 // unit * unit
        found = peak(size)
        if found is None:
            fails = size
        else:
            fits, taken = size, found
    return fits, taken, fails
