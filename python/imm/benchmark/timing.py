"""The clocks. Each is made of a peer's steps, one per set of buffers, and gives seconds per step, one sample a call.

On the CPU there is one set of buffers, and a peer's turn is calls that are not timed, until what the peers before it left in
the caches is gone, then one that is: what a loop of calls takes. On CUDA the sets rotate, so that no input
is in the L2 cache, and a captured graph of all of them is replayed between two events, so that launches cost nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imm.benchmark.case import Step

#: Several times the largest L2 cache.
ROTATED_BYTES = 400e6
LEAST_SETS = 8
_WARM_UP = 3
_SETTLE_SECONDS = 0.01


@dataclass(frozen=True)
class Clock:
    """sample: runs and times once, in seconds per step. outputs: of the first step, current after a sample."""

    method: str
    sample: Callable[[], float]
    outputs: tuple[Tensor, ...]


def sets_of_buffers(device: torch.device, bytes_per_set: int) -> int:
    """How many independent sets of inputs a case needs."""
    return max(LEAST_SETS, math.ceil(ROTATED_BYTES / bytes_per_set)) if device.type == "cuda" else 1


def clock(device: torch.device, steps: Sequence[Step]) -> Clock:
    """The clock for a device, warmed up."""
    return _cuda(steps) if device.type == "cuda" else _cpu(steps[0])


def _cpu(step: Step) -> Clock:
    for _ in range(_WARM_UP):
        outputs = step()

    def sample() -> float:
        settled = time.perf_counter() + _SETTLE_SECONDS
        step()
        while time.perf_counter() < settled:
            step()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return Clock("wall clock", sample, outputs)


def _cuda(steps: Sequence[Step]) -> Clock:
    """Events around the replay of one graph of all steps; around plain launches for a peer that cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            for step in steps:
                step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Every output is kept, so that the steps write to different memory.
            kept = [step() for step in steps]
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0][:80]
        return Clock(f"events over {len(steps)} sets, no graph: {reason}", _between_events(_all(steps), len(steps)), steps[0]())
    for outputs in kept:
        for output in outputs:
            output.zero_()  # what the check sees must come from a replay
    sample = _between_events(graph.replay, len(steps))
    sample()
    return Clock(f"graph of {len(steps)} sets", sample, kept[0])


def _all(steps: Sequence[Step]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


def _between_events(run: Callable[[], None], count: int) -> Callable[[], float]:
    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    return sample
