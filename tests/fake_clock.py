"""A clock in the place of the module ``time``, for what is timed in a test: a busy machine changes nothing."""

from __future__ import annotations

from collections.abc import Callable


class FakeClock:
    """A look takes ``look`` seconds, a pause what it says times ``pace(now)``: 1 on a machine that does not change."""

    def __init__(self, look: float, pace: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now, self.look, self.pace = 0.0, look, pace

    def perf_counter(self) -> float:
        self.now += self.look
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds * self.pace(self.now)
