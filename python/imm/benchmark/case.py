"""What an op file ``bench/bench_<op>.py`` declares.

cases(device, quick)   its Cases, real shapes first; ``quick``: the first one only
TESTS                  its own tests, without which it is not timed (:mod:`imm.benchmark.gate`)
CUDA_TESTS             on CUDA besides: those of the kernels that run there; of a file in both, these
CLAIMS                 ratios of two peers that are published with their bound (optional)
limits(device)         lists of Rows about memory, found in another way than by timing a Case; not in the quick form (optional)

To declare a case costs nothing and needs no device, so that ``imm bench --predict`` can read it anywhere: tensors and networks
are made when ``inputs`` is called (:mod:`imm.benchmark.networks`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: One call of what is measured; returns what the accuracy check looks at.
Step = Callable[[], tuple[Tensor, ...]]
#: Takes the inputs and returns a Step. What a peer keeps across calls (preallocated outputs, compiled code) is made here.
Peer = Callable[..., Step]
COPY = "copy of the same bytes"
MATMUL = "product of as many flops"


def product_shape(flops: int) -> tuple[int, int]:
    """Rows and side of the product ``[rows, side] x [side, side]`` of about as many flops: near a square, with rows of numbers
    of a multiple of 64, since odd ones take libraries another, slower way."""
    side = max(64, 64 * round((flops / 2) ** (1 / 3) / 64))
    return max(1, round(flops / 2 / side**2)), side


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    inputs: makes one independent set of tensors; called once on the CPU, many times where buffers rotate.
    truth: the inputs -> the right outputs in float64.
    tolerances: per output, the largest error accepted of a peer, relative to the output's largest number.
    bytes: what the algorithm must read and write once, whatever a peer does. flops: its arithmetic.
    late: peers that compile for seconds or minutes, the slowest last. On CUDA every case is measured without them first, then
        with one more of them at a time: a time limit may end the run meanwhile.
    rough: peers that are known to be less accurate, with the error accepted of all their outputs.
    ceilings: what is timed beside the peers and not checked, since it does a part of the work only.
    products: whether its arithmetic is matrix products, whose rate is then measured in the same run.
    arithmetic: the dtype that it computes in, where that is not the case's or, of 16 bits besides products, float32.
    caches: "cold", "warm" or both: whether the buffers rotate or stay (:mod:`imm.benchmark.timing`).
    kernel: what our CUDA kernel of the case needs of other units than those, counted in its machine code for sm_90: "L2", bytes
        from L2 to the multiprocessors, and "issue slots", warp instructions.
    rounds: of a step that takes so long that caches and launches do not matter, how many calls are timed, shared out to the
        visits (rounded up), each alone and as the peer launches it; 0: as many as the effort says, on CUDA within a graph.
    """

    op: str
    mode: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    bytes: int
    flops: int
    inputs: Callable[[], tuple[Any, ...]]
    truth: Callable[..., tuple[Tensor, ...]]
    tolerances: tuple[float, ...]
    peers: Mapping[str, Peer]
    late: tuple[str, ...] = ()
    rough: Mapping[str, float] = field(default_factory=dict)
    ceilings: Mapping[str, Peer] = field(default_factory=dict)
    products: bool = False
    arithmetic: torch.dtype | None = None
    caches: tuple[str, ...] = ("cold", "warm")
    kernel: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 0

    @property
    def size(self) -> str:
        """The shape in words: "G=256 M=4 D=3072"."""
        return " ".join(f"{name}={n}" for name, n in self.shape.items())


@dataclass(frozen=True)
class Claim:
    """``slow`` takes ``at_least`` times (or at most ``at_most`` times) as long as ``fast``, on the CPU, at sizes ``up_to``, in
    this ``mode`` (None: in any) and with this ``cache`` (None: with either)."""

    slow: str
    fast: str
    at_least: float | None = None
    at_most: float | None = None
    up_to: Mapping[str, int] = field(default_factory=dict, hash=False)
    mode: str | None = None
    cache: str | None = None

    def concerns(self, mode: str, shape: str, cache: str) -> bool:
        """Whether rows of this mode, shape ("G=256 M=4 D=3072") and cache are meant."""
        sizes = dict(part.split("=") for part in shape.split())
        small = all(int(sizes[name]) <= most for name, most in self.up_to.items())
        return self.mode in (None, mode) and self.cache in (None, cache) and small

    def holds(self, ratio: float) -> bool:
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"at least {self.at_least}" if self.at_least is not None else f"at most {self.at_most}"


def folder() -> Path:
    """The checkout's ``bench``. Raises FileNotFoundError where imm is an installed package without one."""
    path = Path(__file__).resolve().parents[3] / "bench"
    if not (path / "bench_mmd.py").is_file():
        raise FileNotFoundError("bench: needs a checkout of the project (its folder bench/ declares what is measured)")
    return path


def operations() -> list[str]:
    """The ops that have a file, by name."""
    return sorted(path.stem.removeprefix("bench_") for path in folder().glob("bench_*.py"))


def load(op: str) -> ModuleType:
    """The op's file as a module. Raises ValueError for an op without one."""
    if op not in operations():
        raise ValueError(f"op: expected one of {operations()} or all, got {op!r}")
    spec = importlib.util.spec_from_file_location(f"bench_{op}", folder() / f"bench_{op}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
