"""What an op file ``bench/bench_<op>.py`` declares. To declare a case makes nothing and needs no device, so that ``imm bench
--predict`` can read it anywhere: tensors and networks are made when ``inputs`` is called.

cases(device, quick)   its Cases, real shapes first; ``quick``: the first one only
TESTS                  its own tests, without which it is not timed (:mod:`harness.gate`)
CUDA_TESTS             on CUDA besides: those of the kernels that run there; of a file in both, these
CLAIMS                 ratios of two peers that are published with their bound (optional)
"""

from __future__ import annotations

import importlib
import math
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
L2, ISSUE = "L2", "issue slots"
BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent


def call(function: Callable[..., Any]) -> Peer:
    """A peer whose step calls a function with the inputs."""

    def prepare(*inputs: Any) -> Step:
        def step() -> tuple[Tensor, ...]:
            found = function(*inputs)
            return found if isinstance(found, tuple) else (found,)

        return step

    return prepare


def writing(function: Callable[..., Any], out: Tensor, *inputs: Any) -> Step:
    """A step that calls an ``out=`` form with memory that was there before."""

    def step() -> tuple[Tensor, ...]:
        function(*inputs, out=out)
        return (out,)

    return step


def compiled(function: Callable[..., Any], form: Callable[..., Peer] = call, **options: Any) -> Peer:
    """The peer ``form`` of a function that torch compiles when the peer is prepared."""
    return lambda *inputs: form(torch.compile(function, **options))(*inputs)


def words(dtype: torch.dtype) -> str:
    """A dtype's name: "float32"."""
    return str(dtype).removeprefix("torch.")


def product_shape(flops: int) -> tuple[int, int]:
    """Rows and side of the product ``[rows, side] x [side, side]`` of about as many flops: near a square, with rows of numbers
    of a multiple of 64, since odd ones take libraries another, slower way."""
    side = max(64, 64 * round((flops / 2) ** (1 / 3) / 64))
    return max(1, round(flops / 2 / side**2)), side


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    bytes: what the algorithm must read and write once, whatever a peer does. flops: its arithmetic.
    inputs: makes one independent set of tensors. truth: the inputs -> the right outputs in float64.
    tolerances: per output, the largest error accepted of a peer, relative to the output's largest number.
    late: peers that compile for seconds or minutes: on CUDA every case is measured without them first.
    rough: peers that are known to be less accurate, with the error accepted of all their outputs.
    ceilings: what is timed beside the peers and not checked, since it does a part of the work only.
    products: whether its arithmetic is matrix products, whose rate is then measured in the same run.
    arithmetic: the dtype that it computes in, where that is not the case's or, of 16 bits besides products, float32.
    caches: "cold", "warm" or both: whether the buffers rotate or stay (:mod:`harness.timing`).
    kernel: what our CUDA kernel needs of other units, counted in its machine code for sm_90: ``L2``, bytes from L2 to the
        multiprocessors, and ``ISSUE``, warp instructions.
    rounds: of a long step, how many calls are timed, shared out to the visits, each alone and as the peer launches it; 0: as
        many as the effort says, on CUDA within a graph.
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
        return (self.at_least or 0.0) <= ratio <= (self.at_most or math.inf)

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"at least {self.at_least}" if self.at_least is not None else f"at most {self.at_most}"


def operations() -> list[str]:
    """The ops that have a file, by name. bench_serve.py, a load test of a server, is a program of its own."""
    return sorted(path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py") if path.stem != "bench_serve")


def load(op: str) -> ModuleType:
    """The op's file as a module. Raises ValueError for an op without one."""
    if op not in operations():
        raise ValueError(f"op: expected one of {operations()} or all, got {op!r}")
    return importlib.import_module(f"bench_{op}")


def chosen(op: str) -> dict[str, ModuleType]:
    """The op's file by its name; "all": every one. Raises ValueError for an op without one."""
    return {name: load(name) for name in (operations() if op == "all" else [op])}
