"""A fake in the place of torch.cuda's graphs and events: what the clocks of CUDA do, on a machine without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeCuda:
    """A replay takes ``launch`` seconds and ``node`` more for each ``_sleep`` of its capture, and calls ``effect``; events read
    this clock, ``now``. What is captured runs at once. ``log``: captures, replays, events and waits, in their order."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        capturable: bool = True,
        launch: float = 8e-3,
        node: float = 0.0,
        effect: Callable[[], Any] = lambda: None,
        on_capture: Callable[[], Any] = lambda: None,
    ) -> None:
        self.now, self.nodes = 0.0, 0
        self.log: list[str] = []
        outer = self

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
            nodes = 0

            def replay(self) -> None:
                outer.log.append("replay")
                outer.now += launch + node * self.nodes
                effect()

            def pool(self) -> tuple[int, int]:
                return (0, 1)

        @contextlib.contextmanager
        def graph(made: CUDAGraph, pool: tuple[int, int] | None = None) -> Iterator[None]:
            outer.log.append("capture")
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            on_capture()
            before, outer.nodes = outer.nodes, 0
            yield
            made.nodes, outer.nodes = outer.nodes, before

        def sleep(cycles: int) -> None:
            outer.nodes += 1

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "graph_pool_handle": lambda: (0, 1),
            "_sleep": sleep,
            "synchronize": lambda: None,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "set_stream": lambda given: None,
            "stream": lambda side: contextlib.nullcontext(),
            "get_device_properties": lambda device: SimpleNamespace(multi_processor_count=2),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
