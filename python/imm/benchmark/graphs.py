"""Capture of CUDA graphs, for the clocks and the captured peers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: Graphs whose capture failed: torch's allocators may still ask one of them which memory is its own.
_FAILED: list[torch.cuda.CUDAGraph] = []


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """``torch.cuda.graph`` on the current device, with two differences.

    The graph has workspaces of cuBLAS of its own: torch keeps one a stream until anyone clears them, as torch.compile's graphs
    do, or until another graph of the stream ends. And a capture that fails, which is to be expected of any peer, leaves the
    stream as it was, the allocator without it, and random numbers and other graphs in use.
    """
    stream, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    _clear_workspaces()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)  # torch leaves its own where the capture cannot be ended
        if not _ended(graph):
            _abandon(graph, pool)
            torch.cuda.set_stream(stream)
        raise
    finally:
        _clear_workspaces()


def _clear_workspaces() -> None:
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()  # absent without CUDA


def _ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether the capture came to a good end, though perhaps its body did not."""
    try:
        graph.pool()
    except RuntimeError:
        return False
    return True


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """As csrc/cuda/graph.cpp does."""
    _FAILED.append(graph)
    device = torch.cuda.current_device()
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        with contextlib.suppress(RuntimeError):  # ended by torch itself, or never begun
            getattr(torch._C, name)(device, pool)
    # Before torch 2.12 a generator that was told of a capture refuses everything else until one has ended.
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=f"cuda:{device}")
