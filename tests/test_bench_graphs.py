"""The capture of CUDA graphs for benchmarks: what a failure leaves behind, and whose memory a graph uses."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda

from harness import timing

POOL = FakeCuda.POOL


@pytest.mark.parametrize(
    ("invalid", "error", "expected"),
    [
        (False, None, ["body"]),
        (False, KeyboardInterrupt, ["body"]),  # the graph's destructor releases the pool, once
        (True, RuntimeError, ["body", ("endAllocateToPool", 0, POOL), ("releasePool", 0, POOL), "capture", "zeros"]),
    ],
)
def test_a_capture_has_workspaces_of_its_own_and_is_cleaned_up(invalid: bool, error: Any, expected: Any, monkeypatch) -> None:
    fake = FakeCuda(monkeypatch, invalid=invalid)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(error) if error else contextlib.nullcontext(), timing.capture(graph):
        fake.log.append("body")
        if error:
            raise error
    assert fake.log == ["clearCublasWorkspaces", "capture", *expected, "clearCublasWorkspaces"]
    assert fake.stream is fake.callers
    assert ([graph] if invalid else []) == timing._FAILED


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.cuda
@cuda
def test_after_a_failed_capture_everything_works() -> None:
    drawn, x = torch.cuda.CUDAGraph(), torch.ones(8, device="cuda")
    with timing.capture(drawn):
        y = torch.randn(8, device="cuda")
    stream, failed = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    reserved = torch.cuda.memory_reserved()

    def waits() -> None:
        torch.empty(1 << 28, device="cuda")
        x.sum().item()

    with pytest.raises(RuntimeError), timing.capture(failed):
        waits()
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved + (1 << 28)  # a GiB was the failed graph's
    torch.manual_seed(5)
    expected = torch.randn(8, device="cuda")
    torch.manual_seed(5)
    drawn.replay()
    assert torch.equal(y, expected)
    torch.empty(1 << 20, pin_memory=True)
    again = torch.cuda.CUDAGraph()
    with timing.capture(again):
        doubled = 2 * x
    again.replay()
    assert torch.equal(doubled, 2 * x)


@pytest.mark.cuda
@cuda
def test_a_graph_outlives_others_of_its_stream_and_cleared_workspaces() -> None:
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    expected, made = x @ x, []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with timing.capture(graph):
            y = x @ x
        made.append((graph, y))
    made.pop()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]  # whatever was freed
    graph, y = made[0]
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, expected)
    assert all(bool(other.isnan().all()) for other in others)
