"""A fake in the place of torch.cuda's graphs and events: what the clocks of CUDA do, on a machine without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
        on_capture: Callable[[], Any] = lambda: None,
    ) -> None:
        self.now, self.nodes = 0.0, 0
        self.log: list[str] = []
        outer = self
        self.callers, side = (SimpleNamespace(wait_stream=lambda other: None) for _ in range(2))
        self.stream = self.callers

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                outer.log.append("event")
                self.at = outer.now

            def synchronize(self) -> None:
                outer.log.append("wait")

            def query(self) -> bool:
                return False

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * max(end.at - self.at, 1e-9)

        class CUDAGraph:
            nodes, ended = 0, False

            def replay(self) -> None:
                outer.log.append("replay")
                outer.now += launch + node * self.nodes
                effect()

            def pool(self) -> tuple[int, int]:
                if not self.ended:
                    raise RuntimeError("no capture")
                return outer.POOL

        @contextlib.contextmanager
        def graph(made: CUDAGraph, pool: tuple[int, int] | None = None) -> Iterator[None]:
            outer.log.append("capture")
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            on_capture()
            (before, stream), (outer.nodes, outer.stream) = (outer.nodes, outer.stream), (0, side)
            try:
                yield
            finally:
                if invalid and pool:
                    raise RuntimeError("operation failed due to a previous error during capture")
                made.ended, outer.stream = True, stream
                made.nodes, outer.nodes = outer.nodes, before

        def sleep(cycles: int) -> None:
            outer.nodes += 1

        def zeros(*shape: int, **options: Any) -> Any:
            on_device = str(options.get("device")).startswith("cuda")
            return outer.log.append("zeros") if on_device else on_the_cpu(*shape, **options)

        on_the_cpu = torch.zeros
        monkeypatch.setattr(torch, "zeros", zeros)
        for name in ("endAllocateToPool", "releasePool", "clearCublasWorkspaces"):
            call = lambda *given, name=name: outer.log.append((name, *given) if given else name)
            monkeypatch.setattr(torch._C, f"_cuda_{name}", call, raising=False)
        monkeypatch.setattr(timing, "_FAILED", [])
        for name, value in {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "graph_pool_handle": lambda: self.POOL,
            "current_device": lambda: 0,
            "_sleep": sleep,
            "synchronize": lambda: None,
            "Stream": lambda: side,
            "current_stream": lambda: self.stream,
            "set_stream": lambda given: setattr(self, "stream", given),
            "stream": lambda side: contextlib.nullcontext(),
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=2),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
