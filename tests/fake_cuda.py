"""A fake in the place of torch.cuda's graphs and events: what the clocks of CUDA do, on a machine without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import timing


class FakeCuda:
    """A replay takes ``launch`` seconds and ``node`` more for each ``_sleep`` of its capture, and calls ``effect``; events read
    this clock, ``now``. What is captured runs at once. Like torch's, a capture ends on whatever stream is current, and an
    ``invalid`` one cannot be ended in a pool. ``log``: captures, replays, events, waits and what cleans up, in their order."""

    POOL = (0, 7)

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        capturable: bool = True,
        invalid: bool = False,
        launch: float = 8e-3,
        node: float = 0.0,
        effect: Callable[[], Any] = lambda: None,
    ) -> None:
        self.capturable, self.invalid, self.launch, self.node, self.effect = capturable, invalid, launch, node, effect
        self.now, self.nodes = 0.0, 0
        self.log: list[Any] = []
        self.callers, self.side = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
        self.stream = self.callers
        self.zeros_on_the_cpu = torch.zeros
        monkeypatch.setattr(torch, "zeros", self.zeros)
        for name in ("endAllocateToPool", "releasePool", "clearCublasWorkspaces"):
            call = lambda *given, name=name: self.log.append((name, *given) if given else name)
            monkeypatch.setattr(torch._C, f"_cuda_{name}", call, raising=False)
        monkeypatch.setattr(timing, "_FAILED", [])
        for name, value in {
            "Event": partial(Event, self),
            "CUDAGraph": partial(Graph, self),
            "graph": self.graph,
            "graph_pool_handle": lambda: self.POOL,
            "current_device": lambda: 0,
            "_sleep": lambda cycles: setattr(self, "nodes", self.nodes + 1),
            "synchronize": lambda: None,
            "Stream": lambda: self.side,
            "current_stream": lambda: self.stream,
            "set_stream": lambda given: setattr(self, "stream", given),
            "stream": lambda side: contextlib.nullcontext(),
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=2),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)

    def zeros(self, *shape: int, **options: Any) -> Any:
        on_device = str(options.get("device")).startswith("cuda")
        return self.log.append("zeros") if on_device else self.zeros_on_the_cpu(*shape, **options)

    @contextlib.contextmanager
    def graph(self, made: Graph, pool: tuple[int, int] | None = None) -> Iterator[None]:
        self.log.append("capture")
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        (before, stream), (self.nodes, self.stream) = (self.nodes, self.stream), (0, self.side)
        try:
            yield
        finally:
            if self.invalid and pool:
                raise RuntimeError("operation failed due to a previous error during capture")
            made.ended, self.stream = True, stream
            made.nodes, self.nodes = self.nodes, before


class Event:
    def __init__(self, cuda: FakeCuda, enable_timing: bool) -> None:
        assert enable_timing
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.log.append("event")
        self.at = self.cuda.now

    def synchronize(self) -> None:
        self.cuda.log.append("wait")

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * max(end.at - self.at, 1e-9)


class Graph:
    nodes, ended = 0, False

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append("replay")
        self.cuda.now += self.cuda.launch + self.cuda.node * self.nodes
        self.cuda.effect()

    def pool(self) -> tuple[int, int]:
        if not self.ended:
            raise RuntimeError("no capture")
        return self.cuda.POOL
