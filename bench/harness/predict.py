"""A model of a machine, the roofline: no case is faster than its bytes through the memory, or its flops through the units that
do them; and what our own kernel needs of L2 or issue slots. ``imm bench --predict=NAME`` prints it without the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from harness.case import ISSUE, L2, Case, chosen, words
from harness.rows import aligned, duration

MEMORY = "memory"


@dataclass(frozen=True)
class Machine:
    """Rates per unit: "memory" in bytes a second, read and written together, and "products DTYPE" and "vector DTYPE" in dense
    flop a second. On a GPU, products are those of the tensor cores, and "products float32" are in TF32; "L2" is in bytes a
    second from L2 to the multiprocessors, "issue slots" in warp instructions a second.

    peak: stated by the vendor (``source``). reached: what was measured on one (``measured``); it takes the place of the peak.
    assumed: neither, until it is measured. l2: bytes.
    """

    name: str
    peak: Mapping[str, float]
    source: str
    reached: Mapping[str, float] = field(default_factory=dict)
    measured: str = ""
    assumed: Mapping[str, float] = field(default_factory=dict)
    l2: int = 0

    @property
    def rates(self) -> dict[str, float]:
        """The rates to count with."""
        return {**self.assumed, **self.peak, **self.reached}

    @property
    def description(self) -> str:
        """Sizes, rates and their sources, in words."""
        words = lambda rates: ", ".join(f"{unit} {rate / 1e12:.4g} T/s" for unit, rate in rates.items())
        stated, reached = f"{words(self.peak)} ({self.source})", f"{words(self.reached)} ({self.measured})"
        assumed = f"\n  assumed, neither stated nor measured: {words(self.assumed)}" if self.assumed else ""
        return f"{self.name}: L2 {self.l2 / 2**20:.0f} MiB\n  stated: {stated}\n  measured: {reached}{assumed}"


def _rates(memory: float, half: float, tf32: float, double: float, vector: float, vector_double: float) -> dict[str, float]:
    """Peak rates of a GPU: TB/s, then dense TFLOP/s of the tensor cores and of the plain units. Where a datasheet prints those
    with sparsity, half of them."""
    products = {"products bfloat16": half, "products float16": half, "products float32": tf32, "products float64": double}
    units = {MEMORY: memory, **products, "vector float32": vector, "vector float64": vector_double}
    return {unit: 1e12 * rate for unit, rate in units.items()}


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 1 (p. 20) and table 3 (pp. 39-40)"
_MATMUL = "products: largest found, Bekman, ML Engineering, table of maximum achievable matmul FLOPS"
MACHINES = {
    "h100": Machine(
        name="H100 SXM",
        peak=_rates(3.35, 989.4, 494.7, 66.9, 66.9, 33.5),
        source=_HOPPER,
        reached={MEMORY: 3.01e12, "products bfloat16": 794.5e12},
        measured="memory: a softmax of 16384 x 131072 float32, Guo, Zadouri and Dao, Getting Memory-bound Kernels to "
        f"Speed-of-Light (2025); {_MATMUL}",
        l2=50 * 2**20,
    ),
    "h200": Machine(
        name="H200 SXM",
        peak=_rates(4.8, 989.4, 494.7, 66.9, 66.9, 33.5),
        source=f"NVIDIA H200 datasheet, which has those of the H100 SXM but for the memory: {_HOPPER}",
        reached={MEMORY: 4.3e12, "products bfloat16": 790e12},
        measured="memory: a copy on the device; products: 8192 x 8192 x 8192 of random numbers (769 to 798 TFLOP/s)",
        assumed={L2: 5.5e12, ISSUE: 132 * 4 * 1.98e9},
        l2=60 * 2**20,
    ),
    "b200": Machine(
        name="B200",
        peak=_rates(8.0, 2250.0, 1100.0, 40.0, 80.0, 40.0),
        source="NVIDIA Blackwell Architecture Technical Brief, table of HGX B200 at 1000 W (pp. 19-20); L2: Chips and Cheese, "
        "Nvidia's B200 (2025)",
        reached={"products bfloat16": 1745e12},
        measured=_MATMUL,
        l2=126 * 2**20,
    ),
}


@dataclass(frozen=True)
class Floor:
    """The least time, in seconds: of the memory, and of the arithmetic on ``unit`` (0 where no flops are counted)."""

    memory: float
    arithmetic: float
    unit: str

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic)

    @property
    def bound(self) -> str:
        """What takes that time."""
        return self.unit if self.arithmetic > self.memory else MEMORY


def case_floor(machine: Machine, case: Case) -> Floor:
    """The floor of a case. Products run at their dtype's own rate; sums and exponentials of 16 bits are float32's."""
    dtype = case.arithmetic or case.dtype
    wide = "float64" if dtype == torch.float64 else "float32"
    unit = f"products {words(dtype)}" if case.products else f"vector {wide}"
    return Floor(case.bytes / machine.rates[MEMORY], case.flops / machine.rates[unit], unit)


def kernel_bound(machine: Machine, case: Case) -> tuple[float, str] | None:
    """Seconds that our kernel of the case needs at least of L2 or of issue slots, and which; None where neither is known."""
    times = {unit: amount / machine.rates[unit] for unit, amount in case.kernel.items() if unit in machine.rates}
    return max((seconds, unit) for unit, seconds in times.items()) if times else None


def _line(machine: Machine, case: Case) -> list[str]:
    """Op, mode, shape, dtype, what binds, bytes, flops, times, the roofline, and what our kernel takes at least."""
    first = [case.op, case.mode, case.size, words(case.dtype)]
    amounts = [f"{case.bytes / 1e6:.2f} MB", f"{case.flops / 1e9:.2f} GF" if case.flops else "-"]
    found, own, ours = case_floor(machine, case), kernel_bound(machine, case), "-"
    bound = found.bound + " (in L2)" * (case.bytes <= machine.l2)
    if own is not None:
        ours = duration(1e6 * max(own[0], found.seconds))
        bound += f"; our kernel: {own[1] if own[0] > found.seconds else found.bound}"
    counted = duration(1e6 * found.arithmetic) if case.flops else "-"
    return [*first, bound, *amounts, duration(1e6 * found.memory), counted, duration(1e6 * found.seconds), ours]


def report(op: str, name: str, *, quick: bool, say: Callable[[str], None] = print) -> None:
    """Print the rooflines of an op's cases ("all": every op's) on a machine. Raises ValueError for an unknown op or machine."""
    if name not in MACHINES:
        raise ValueError(f"predict: expected one of {list(MACHINES)}, got {name!r}")
    machine, modules = MACHINES[name], chosen(op)
    say(machine.description)
    say("  roofline: the larger of bytes / memory and flops / the rate of the unit that does them: no kernel is faster")
    say("  our kernel: the larger of the roofline and of what its code, counted for sm_90, needs of L2 or of issue slots")
    say("  in L2: all that the case moves fits there, so that warm buffers can be faster than the memory's time")
    cases = (case for module in modules.values() for case in module.cases(torch.device("cuda"), quick))
    head = ["op", "mode", "shape", "dtype", "bound", "bytes", "flops", "memory", "arithmetic", "roofline", "our kernel"]
    say(aligned([head, *(_line(machine, case) for case in cases)], left=5))
