"""How much memory a peer needs: its inputs, what it keeps across steps, and the most that is allocated within a step."""

from __future__ import annotations

import os
from collections.abc import Callable
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
