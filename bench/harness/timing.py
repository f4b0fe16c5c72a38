"""The clocks. Each is made of a peer's steps, one per set of buffers, and gives seconds per step, one sample a call.

Cold: the sets rotate, so that neither inputs nor preallocated outputs are in a cache; on the CPU each call takes the set that
no peer has touched for longest. Warm: one set, called again and again. On CUDA a captured graph of many calls is replayed
between two events, so that launches cost nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.case import Step

#: Several times the largest L2 cache of a GPU, or last cache of a few cores.
ROTATED_BYTES = 400e6
LEAST_SETS, MOST_CPU_SETS = 8, 64
_WARM_UP = 3
_EVENT_SECONDS = 1e-6  # what events tell apart
_LEAST_SECONDS = 2e-3  # between two events, beside which the launch of a graph, some microseconds, is little
_SETTLE = 2  # calls on the CPU after which another peer's data has left the caches
_LONG = 0.05  # seconds of a call that does so itself
_CPU_TURN = itertools.count()
#: Graphs whose capture failed: torch's allocators may still ask one of them which memory is its own.
_FAILED: list[torch.cuda.CUDAGraph] = []


@dataclass(frozen=True)
class Clock:
    """sample: runs and times once, in seconds per step. outputs: of the first step, current after a sample."""

    method: str
    sample: Callable[[], float]
    outputs: tuple[Tensor, ...]


def sets_of_buffers(device: torch.device, bytes_per_set: int) -> int:
    """How many independent sets of inputs a case needs."""
    count = math.ceil(ROTATED_BYTES / bytes_per_set)
    return max(LEAST_SETS, count) if device.type == "cuda" else min(max(2, count), MOST_CPU_SETS)


def clock(device: torch.device, steps: Sequence[Step], cache: str = "cold") -> Clock:
    """The clock for a device, warmed up; ``cache`` "warm" takes the first step only."""
    if device.type == "cuda":
        return _cuda(steps if cache == "cold" else list(steps[:1]) * max(LEAST_SETS, len(steps)), cache)
    return _cpu(steps if cache == "cold" else steps[:1])


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """``torch.cuda.graph`` on the current device, but the graph has workspaces of cuBLAS of its own (torch keeps one a stream
    until anyone clears them), and a capture that fails, as that of any peer may, leaves stream, allocator and random numbers
    as they were."""
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)  # absent without CUDA
    clear_workspaces()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)  # torch leaves its own where the capture cannot be ended
        try:
            graph.pool()  # raises unless the capture came to a good end, though its body did not
        except RuntimeError:
            _abandon(graph, pool)
            torch.cuda.set_stream(stream)
        raise
    finally:
        clear_workspaces()


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """As csrc/cuda/graph.cpp does."""
    _FAILED.append(graph)
    device = torch.cuda.current_device()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with contextlib.suppress(RuntimeError):  # ended by torch itself, or never begun
            getattr(torch._C, name)(device, pool)
    # Before torch 2.12 a generator that is registered with a capture refuses everything else until the capture ends.
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=f"cuda:{device}")


def warmed_on_a_side_stream(run: Callable[[], Any]) -> None:
    """A few calls, as before a capture: what libraries and the step itself allocate once is not made within it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)


def captured(step: Step) -> Step:
    """The step as a CUDA graph of its own: what a part of a longer graph takes."""
    warmed_on_a_side_stream(step)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        outputs = step()
    kept = outputs, step  # whose memory the graph reads

    def replayed() -> tuple[Tensor, ...]:
        graph.replay()
        return kept[0]

    return replayed


def single_calls(device: torch.device, step: Step) -> Clock:
    """The clock for a long step, or a latency: a call to warm up, on CUDA a few, then one call a sample, nothing between."""
    cuda = device.type == "cuda"
    for _ in range(_WARM_UP if cuda else 1):  # what captures itself does so at the second or third call
        outputs = step()
    if cuda:
        return Clock("events over one call", _between_events(step, 1), outputs)
    return Clock("wall clock over one call", lambda: _wall_clock(step), outputs)


def _wall_clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cpu(steps: Sequence[Step]) -> Clock:
    """The sets in rotation; a single set after calls that warm the caches."""
    outputs = steps[0]()
    for step in steps[1:]:
        step()  # touches the memory that it keeps
    _wall_clock(steps[0])
    long = _wall_clock(steps[0]) > _LONG

    def sample() -> float:
        step = steps[next(_CPU_TURN) % len(steps)]
        for _ in range(_SETTLE if len(steps) == 1 and not long else 0):
            step()
        return _wall_clock(step)

    return Clock(f"wall clock over {'one set' if len(steps) == 1 else f'{len(steps)} sets'}", sample, outputs)


def _cuda(steps: Sequence[Step], cache: str) -> Clock:
    """Events around the replay of one graph of all steps; around plain launches for a peer that cannot be captured."""
    sets = f"{len(steps)} sets" if cache == "cold" else f"{len(steps)} calls of one set"
    warmed_on_a_side_stream(lambda: [step() for step in steps])
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        kept: list[tuple[Tensor, ...]] = []
        with capture(graph):
            for step in steps:
                outputs = step()
                if cache == "warm":  # one at a time, as in a loop of calls; cold, the steps write to different memory
                    kept.clear()
                kept.append(outputs)
    except RuntimeError as error:
        torch.cuda.synchronize()
        reason = str(error).splitlines()[0][:80]
        plain = _between_events(lambda: [step() for step in steps], len(steps))
        return Clock(f"events over {sets}, no graph: {reason}", plain, steps[0]())
    for output in itertools.chain.from_iterable(kept):
        output.zero_()  # what the check sees must come from a replay
    once = _between_events(graph.replay, len(steps))
    once()
    replays = max(1, math.ceil(_LEAST_SECONDS / max(once() * len(steps), _EVENT_SECONDS)))
    sample = _between_events(lambda: [replay() for replay in [graph.replay] * replays], replays * len(steps))
    return Clock(f"graph of {sets}", sample, kept[0])


def _between_events(run: Callable[[], object], count: int) -> Callable[[], float]:
    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / count

    return sample
