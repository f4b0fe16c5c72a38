"""The clocks. Each is made of a peer's steps, one per set of buffers, and gives seconds per step, one sample a call.

Cold: the sets rotate, so that neither inputs nor outputs that were allocated before are in a cache, as where other work lies
between two calls; on the CPU each call takes the set that no peer has touched for longest, and outputs that a step makes lie
where the allocator puts them. Warm: one set, called again and again, as in a loop of calls. On CUDA a captured graph of many
calls is replayed between two events, so that launches cost nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from imm.benchmark.case import Step
from imm.benchmark.graphs import capture

#: Several times the largest L2 cache of a GPU, or last cache of a few cores.
ROTATED_BYTES = 400e6
LEAST_SETS, MOST_CPU_SETS = 8, 64
_WARM_UP = 3
_EVENT_SECONDS = 1e-6  # what events tell apart
_LEAST_SECONDS = 2e-3  # between two events, beside which the launch of a graph, some microseconds, is little
_SETTLE = 2  # calls on the CPU after which another peer's data has left the caches
_LONG = 0.05  # seconds of a call that does so itself
_CPU_TURN = itertools.count()


@dataclass(frozen=True)
class Clock:
    """sample: runs and times once, in seconds per step. outputs: of the first step, current after a sample."""

    method: str
    sample: Callable[[], float]
    outputs: tuple[Tensor, ...]


def do_bench(step: Step) -> float | None:
    """The median that triton.testing.do_bench gives, in seconds: cold, with launches, beside a write-back of what it clears.
    None without triton."""
    try:
        from triton.testing import do_bench as measured
    except ImportError:
        return None
    return float(measured(step, return_mode="median")) * 1e-3


def sets_of_buffers(device: torch.device, bytes_per_set: int) -> int:
    """How many independent sets of inputs a case needs."""
    count = math.ceil(ROTATED_BYTES / bytes_per_set)
    return max(LEAST_SETS, count) if device.type == "cuda" else min(max(2, count), MOST_CPU_SETS)


def clock(device: torch.device, steps: Sequence[Step], cache: str = "cold") -> Clock:
    """The clock for a device, warmed up; ``cache`` "warm" takes the first step only."""
    if device.type == "cuda":
        return _cuda(steps if cache == "cold" else list(steps[:1]) * max(LEAST_SETS, len(steps)), cache)
    return _cold_cpu(steps) if cache == "cold" else _warm_cpu(steps[0])


def captured(step: Step) -> Step:
    """The step as a CUDA graph of its own: what a part of a longer graph takes."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    with capture(graph):
        outputs = step()
    return functools.partial(_replayed, graph, outputs, step)


def _replayed(graph: torch.cuda.CUDAGraph, outputs: tuple[Tensor, ...], kept: Step) -> tuple[Tensor, ...]:
    """``kept``: the step, whose memory the graph reads."""
    graph.replay()
    return outputs


def single_calls(device: torch.device, step: Step) -> Clock:
    """The clock for a long step, or a latency: a call to warm up, on CUDA a few, then one call a sample, nothing between."""
    outputs = step()
    if device.type == "cuda":
        for _ in range(_WARM_UP - 1):  # what captures itself does so at the second or third call
            outputs = step()
        return Clock("events over one call", _between_events(step, 1), outputs)

    def sample() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return Clock("wall clock over one call", sample, outputs)


def _warmed(step: Step) -> tuple[tuple[Tensor, ...], float]:
    """The step's outputs and its seconds after a few calls, of a long one after the second."""
    for call in range(_WARM_UP):
        start = time.perf_counter()
        outputs = step()
        seconds = time.perf_counter() - start
        if call and seconds > _LONG:
            break
    return outputs, seconds


def _warm_cpu(step: Step) -> Clock:
    outputs, seconds = _warmed(step)
    settle = _SETTLE if seconds < _LONG else 0

    def sample() -> float:
        for _ in range(settle):
            step()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return Clock("wall clock over one set", sample, outputs)


def _cold_cpu(steps: Sequence[Step]) -> Clock:
    for step in steps[1:]:
        step()  # touches the memory that it keeps
    outputs, _ = _warmed(steps[0])

    def sample() -> float:
        step = steps[next(_CPU_TURN) % len(steps)]
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return Clock(f"wall clock over {len(steps)} sets", sample, outputs)


def _cuda(steps: Sequence[Step], cache: str) -> Clock:
    """Events around the replay of one graph of all steps; around plain launches for a peer that cannot be captured."""
    sets = f"{len(steps)} sets" if cache == "cold" else f"{len(steps)} calls of one set"
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
        kept: list[tuple[Tensor, ...]] = []
        with capture(graph):
            for step in steps:
                outputs = step()
                if cache == "cold" or not kept:  # cold: all are kept, so that the steps write to different memory
                    kept.append(outputs)
                else:  # warm: one at a time, as in a loop of calls
                    kept[0] = outputs
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0][:80]
        return Clock(f"events over {sets}, no graph: {reason}", _between_events(_all(steps), len(steps)), steps[0]())
    for output in itertools.chain.from_iterable(kept):
        output.zero_()  # what the check sees must come from a replay
    once = _between_events(graph.replay, len(steps))
    once()
    replays = max(1, math.ceil(_LEAST_SECONDS / max(once() * len(steps), _EVENT_SECONDS)))
    sample = _between_events(_all([graph.replay] * replays), replays * len(steps))
    return Clock(f"graph of {sets}", sample, kept[0])


def _all(steps: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


def _between_events(run: Callable[[], object], count: int) -> Callable[[], float]:
    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    return sample
