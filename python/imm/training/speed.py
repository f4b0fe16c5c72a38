"""Where the time of training goes, and what share of the device's matmul rate it comes to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imm.backends import PRECISIONS
from imm.flow_map import FlowMap

#: Side of the square matmul that is timed, and seconds of timing.
_SIDE = {"cpu": 1024, "cuda": 8192}
_SECONDS = 0.2


class Clock:
    """Seconds between marks, summed by name. On CUDA, those of the device: marking does not wait for it, reading does."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin; marks before this are not kept."""
        self._marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """The time since the mark before was spent on ``name``."""
        if self._marks:
            self._marks.append((name, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds since the start or the last call, by name."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        seconds: dict[str, float] = {}
        for (_, before), (name, now) in zip(self._marks, self._marks[1:], strict=False):
            passed = before.elapsed_time(now) * 1e-3 if self._cuda else now - before
            seconds[name] = seconds.get(name, 0.0) + passed
        self._marks = self._marks[-1:]
        return seconds

    def stop(self) -> None:
        """Keep no marks from here on."""
        self._marks = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        with torch.cuda.device(self._device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event


def flops_of(flow_map: FlowMap, shape: Sequence[int]) -> int:
    """The flops of the matmuls and convolutions of a forward of one image ``[C, H, W]``, counted in one in evaluation mode."""
    network, training = flow_map.network, flow_map.network.training
    device = next(network.parameters()).device
    labels = torch.zeros(1, dtype=torch.int64, device=device) if flow_map.num_classes else None
    t, s = (torch.full((1,), value, dtype=torch.float64, device=device) for value in (flow_map.t_max, flow_map.t_min))
    counted = FlopCounterMode(display=False, custom_mapping={torch.ops.imm.timestep_attention: _attention})
    # With gradients and the kernel of plain matmuls, so that no fused form runs that the counter does not know.
    eager = torch.compiler.set_stance("force_eager")
    network.eval()  # running statistics stay as they are
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), eager, counted:
            flow_map.network_output(torch.zeros(1, *shape, device=device), t, s, labels)
    finally:
        network.train(training)
    return int(counted.get_total_flops())


def _attention(qkv: Sequence[int], *args: Any, **named: Any) -> int:
    """The flops of softmax(q k^T) v: two matmuls a head; ``[B, T, 3 heads d]``."""
    rows, tokens, width = qkv
    return 4 * rows * tokens**2 * width // 3


def matmul_rate(device: torch.device, precision: str) -> float:
    """Flops a second of a large square matmul in a precision of training, the best of some, measured in a fifth of a second."""
    side = _SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    dtype = PRECISIONS[precision] or torch.float32
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    target = torch.empty_like(a)
    torch.mm(a, b, out=target)
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < end:
        clock = Clock(device)
        clock.start()
        torch.mm(a, b, out=target)
        clock.mark("matmul")
        best = min(best, clock.take()["matmul"])
    return 2.0 * side**3 / best
