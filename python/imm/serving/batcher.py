"""A dynamic batcher: images that many requests ask for share the calls of a sampler.

While calls run, requests gather. The next call takes the oldest image and those of the same kind (number of steps, guided or
not) behind it, up to ``rows``. So an idle server begins at once, and a busy one fills its calls. An image does not depend on
its batch, because the samplers run every call in the same number of rows.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


class Full(Exception):
    """The queue has no room. ``retry_after``: seconds until there may be some."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the server is busy")
        self.retry_after = retry_after


class Late(Exception):
    """An image was not begun before its deadline."""


@dataclass(frozen=True)
class Image:
    """One image that a request asks for. label: a class, the number of classes for "none", or None for "none" too. floats: the
    network's own numbers, not pixels."""

    seed: int
    label: int | None
    guidance: float | None
    steps: int
    floats: bool = False

    @property
    def kind(self) -> tuple[int, bool]:
        return self.steps, self.guidance is not None


@dataclass
class _Waiting:
    image: Image
    result: asyncio.Future[Any]
    queued: bool = True
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Runs images in batches.

    Args:
        runs: each makes one batch, ``[image, ...]`` of one kind -> one result an image, in a thread of its own; never called
            twice at once.
        rows: most images of a call.
        queue: most images that wait; more are refused (:class:`Full`).
        max_wait: seconds that an idle server waits for more images before it begins a call that is not full.
        deadline: seconds after which an image that has not begun is given up (:class:`Late`).
        on_batch: told of each call (images, seconds).
    """

    def __init__(
        self,
        runs: Sequence[Callable[[Sequence[Image]], Sequence[Any]]],
        *,
        rows: int,
        queue: int,
        max_wait: float = 0.0,
        deadline: float = 30.0,
        on_batch: Callable[[int, float], Any] = lambda images, seconds: None,
    ) -> None:
        self.rows, self.queue, self.max_wait, self.deadline, self.on_batch = rows, queue, max_wait, deadline, on_batch
        self._runs = runs
        self._threads = ThreadPoolExecutor(len(runs), thread_name_prefix="imm-batch")
        self._waiting: dict[tuple[int, bool], deque[_Waiting]] = {}
        self._count = 0
        self._arrived = asyncio.Event()
        self._seconds = 0.05  # of a call, a running mean
        self._workers: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Images that wait for a call."""
        return self._count

    def start(self) -> None:
        """Begin to make images."""
        self._workers = [asyncio.create_task(self._work(run)) for run in self._runs]

    async def stop(self) -> None:
        """End after the calls that run. Images that still wait are cancelled."""
        for worker in self._workers:
            worker.cancel()
        for line in self._waiting.values():
            for entry in line:
                entry.result.cancel()
        await asyncio.to_thread(self._threads.shutdown)

    async def submit(self, images: Sequence[Image]) -> list[Any]:
        """The results of a request's images, in their order. Cancelled, its images leave the queue.

        Raises:
            Full: the queue has no room for all of them. Late: the deadline passed. Whatever ``run`` raises.
        """
        if self._count + len(images) > self.queue:
            raise Full(max(1.0, self._seconds * self._count / self.rows))
        loop = asyncio.get_running_loop()
        entries = [_Waiting(image, loop.create_future()) for image in images]
        for entry in entries:
            self._waiting.setdefault(entry.image.kind, deque()).append(entry)
        self._count += len(entries)
        self._arrived.set()
        try:
            return list(await asyncio.gather(*(entry.result for entry in entries)))
        finally:
            for entry in entries:
                self._leave(entry)
                entry.result.cancel()

    def _leave(self, entry: _Waiting) -> None:
        """An image that is taken, late or whose client left waits no longer."""
        self._count -= entry.queued
        entry.queued = False

    def _oldest(self) -> tuple[int, bool] | None:
        """The kind whose first image waits longest; images of clients that left, and late ones, go."""
        now = time.perf_counter()
        for kind, line in list(self._waiting.items()):
            while line and (line[0].result.done() or now - line[0].since > self.deadline):
                entry = line.popleft()
                self._leave(entry)
                if not entry.result.done():
                    entry.result.set_exception(Late())
            if not line:
                del self._waiting[kind]
        return min(self._waiting, key=lambda kind: self._waiting[kind][0].since, default=None)

    def _take(self, kind: tuple[int, bool]) -> list[_Waiting]:
        line = self._waiting[kind]
        taken: list[_Waiting] = []
        while line and len(taken) < self.rows:
            entry = line.popleft()
            self._leave(entry)
            if not entry.result.done():
                taken.append(entry)
        return taken

    async def _work(self, run: Callable[[Sequence[Image]], Sequence[Any]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            kind = self._oldest()
            if kind is None:
                self._arrived.clear()
                await self._arrived.wait()
                if self.max_wait:
                    await asyncio.sleep(self.max_wait)
                continue
            batch = self._take(kind)
            start = time.perf_counter()
            try:
                results = await loop.run_in_executor(self._threads, run, [entry.image for entry in batch])
            except Exception as error:
                for entry in batch:
                    if not entry.result.done():
                        entry.result.set_exception(error)
                continue
            seconds = time.perf_counter() - start
            self._seconds += 0.1 * (seconds - self._seconds)
            self.on_batch(len(batch), seconds)
            for entry, result in zip(batch, results, strict=True):
                if not entry.result.done():
                    entry.result.set_result(result)
