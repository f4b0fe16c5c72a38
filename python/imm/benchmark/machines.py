"""What a machine can do at most: rates that vendors state, rates that were reached, and machines made of measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from imm.benchmark.case import COPY, MATMUL
from imm.benchmark.environment import read as read_environment
from imm.benchmark.rows import OK, Row, read

#: A copy of fewer bytes also measures how long threads or a kernel take to start: the cold copies of 3 to 30 MB in
#: a run on two cores of an AMD EPYC move 18 to 32 GB/s, the larger ones 25 to 34.
LARGE = 32e6
MEMORY, L2, ISSUE = "memory", "L2", "issue slots"
_WORDS = {MEMORY: "B/s", L2: "B/s", ISSUE: "instructions/s"}


@dataclass(frozen=True)
class Machine:
    """Rates per unit: "memory" in bytes a second, read and written together, and "products DTYPE" and "vector DTYPE" in dense
    flop a second. On a GPU, products are those of the tensor cores, and "products float32" are in TF32; "L2" is in bytes a
    second from L2 to the multiprocessors, "issue slots" in warp instructions a second.

    devices: what :mod:`imm.benchmark.environment` calls such a machine. peak: stated by the vendor (``source``). reached: what
    was measured on one (``measured``); it takes the place of the peak. assumed: neither, until it is measured. l2, memory:
    bytes; None where not recorded.
    """

    name: str
    devices: tuple[str, ...]
    peak: Mapping[str, float]
    source: str
    reached: Mapping[str, float] = field(default_factory=dict)
    measured: str = ""
    assumed: Mapping[str, float] = field(default_factory=dict)
    l2: int | None = None
    memory: int | None = None
    multiprocessors: int | None = None
    device: str = "cuda"
    threads: int | None = None

    def rate(self, unit: str) -> float | None:
        """The rate to count with; None where nobody states or measured it."""
        return self.reached.get(unit, self.peak.get(unit, self.assumed.get(unit)))

    def matches(self, environment: Mapping[str, Any]) -> bool:
        """Whether an ``environment.json`` is of such a machine, with as many threads where those are known."""
        return environment["machine"] in self.devices and self.threads in (None, environment["threads"])

    @property
    def description(self) -> str:
        """Sizes, rates ("reached of peak") and their sources, in words."""
        sizes = [] if self.multiprocessors is None else [f"{self.multiprocessors} multiprocessors"]
        sizes += [] if self.memory is None else [f"memory {self.memory / 1e9:.0f} GB"]
        sizes += ["L2 not recorded"] if self.l2 is None else [f"L2 {self.l2 / 2**20:.0f} MiB"]

        def words(unit: str, *known: float) -> str:
            scale, prefix = (1e12, "T") if known[0] >= 1e12 else (1e9, "G")
            return f"{unit} {' of '.join(f'{rate / scale:.4g}' for rate in known)} {prefix}{_WORDS.get(unit, 'FLOP/s')}"

        known = {unit: [of[unit] for of in (self.reached, self.peak) if unit in of] for unit in {**self.peak, **self.reached}}
        rates = [words(unit, *found) for unit, found in known.items()]
        lines = [f"{self.name}: {', '.join(sizes)}", f"  rates: {', '.join(rates)}"]
        assumed = [words(unit, rate) for unit, rate in self.assumed.items()]
        lines += [f"  stated: {self.source}"] if self.source else []
        lines += [f"  measured: {self.measured}"] if self.measured else []
        lines += [f"  assumed, neither stated nor measured: {', '.join(assumed)}"] if assumed else []
        return "\n".join(lines)


def _rates(memory: float, half: float, tf32: float, double: float, vector: float, vector_double: float) -> dict[str, float]:
    """Peak rates of a GPU: TB/s, then dense TFLOP/s of the tensor cores and of the plain units."""
    products = {"products bfloat16": half, "products float16": half, "products float32": tf32, "products float64": double}
    units = {MEMORY: memory, **products, "vector float32": vector, "vector float64": vector_double}
    return {unit: 1e12 * rate for unit, rate in units.items()}


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 1 (p. 20) and table 3 (pp. 39-40)"
_MATMUL = "largest product found, Bekman, ML Engineering, table of maximum achievable matmul FLOPS"

#: Dense rates: where a datasheet prints those with sparsity, half of them.
MACHINES = {
    "a100": Machine(
        name="A100 80 GB SXM",
        devices=("NVIDIA A100-SXM4-80GB",),
        peak=_rates(2.039, 312.0, 156.0, 19.5, 19.5, 9.7),
        source="NVIDIA A100 80GB datasheet, table of specifications; L2 and multiprocessors: NVIDIA A100 Tensor Core GPU "
        "Architecture, comparison of data center GPUs",
        reached={"products bfloat16": 271.2e12},
        measured=f"products bfloat16: {_MATMUL}",
        l2=40 * 2**20,
        memory=80 * 10**9,
        multiprocessors=108,
    ),
    "h100": Machine(
        name="H100 SXM",
        devices=("NVIDIA H100 80GB HBM3",),
        peak=_rates(3.35, 989.4, 494.7, 66.9, 66.9, 33.5),
        source=_HOPPER,
        reached={MEMORY: 3.01e12, "products bfloat16": 794.5e12},
        measured="memory: a softmax of 16384 x 131072 float32, Guo, Zadouri and Dao, Getting Memory-bound Kernels to "
        f"Speed-of-Light (2025); products bfloat16: {_MATMUL}",
        l2=50 * 2**20,
        memory=80 * 10**9,
        multiprocessors=132,
    ),
    "h100-pcie": Machine(
        name="H100 PCIe",
        devices=("NVIDIA H100 PCIe",),
        peak=_rates(2.0, 756.0, 378.0, 51.2, 51.2, 25.6),
        source=f"{_HOPPER}; memory: NVIDIA H100 datasheet, table of specifications",
        l2=50 * 2**20,
        memory=80 * 10**9,
        multiprocessors=114,
    ),
    "h200": Machine(
        name="H200 SXM",
        devices=("NVIDIA H200",),
        peak=_rates(4.8, 989.4, 494.7, 66.9, 66.9, 33.5),
        source=f"NVIDIA H200 datasheet, table of specifications, which are those of the H100 SXM but for the memory: {_HOPPER}",
        reached={MEMORY: 4.3e12, "products bfloat16": 790e12},
        measured="memory: a copy on the device; products bfloat16: 8192 x 8192 x 8192 of random numbers (769 to 798 TFLOP/s); "
        "size of L2: as the device reports it",
        assumed={L2: 5.5e12, ISSUE: 132 * 4 * 1.98e9},
        l2=60 * 2**20,
        memory=141 * 10**9,
        multiprocessors=132,
    ),
    "b200": Machine(
        name="B200",
        devices=("NVIDIA B200",),
        peak=_rates(8.0, 2250.0, 1100.0, 40.0, 80.0, 40.0),
        source="NVIDIA Blackwell Architecture Technical Brief, table of HGX B200 at 1000 W (pp. 19-20); memory size: NVIDIA "
        "DGX B200 datasheet; L2 and multiprocessors, as the device reports them: Chips and Cheese, Nvidia's B200 (2025)",
        reached={"products bfloat16": 1745e12},
        measured=f"products bfloat16: {_MATMUL}",
        l2=126 * 2**20,
        memory=180 * 10**9,
        multiprocessors=148,
    ),
    "l4": Machine(
        name="L4",
        devices=("NVIDIA L4",),
        peak=_rates(0.3, 121.0, 60.0, 30.3 / 64, 30.3, 30.3 / 64),
        source="NVIDIA L4 datasheet, table of specifications; float64 at 1/64 of float32, L2 and multiprocessors: NVIDIA Ada "
        "GPU Architecture, V2.01, L4",
        l2=48 * 2**20,
        memory=24 * 10**9,
        multiprocessors=58,
    ),
    "rtx4090": Machine(
        name="GeForce RTX 4090",
        devices=("NVIDIA GeForce RTX 4090",),
        peak=_rates(1.008, 165.2, 82.6, 82.6 / 64, 82.6, 82.6 / 64),
        source="NVIDIA Ada GPU Architecture, V2.1, appendix A, table 2 (products summed in float32); float64 at 1/64",
        l2=72 * 2**20,
        memory=24 * 10**9,
        multiprocessors=128,
    ),
}


def ceilings(rows: Iterable[Row]) -> dict[str, float]:
    """Rates of the ceilings that were timed with the peers: the medians of the large cold copies, and of the products of
    each dtype. Vector units are given the rate of float32 products, for which torch uses them on the CPU, and by default on a
    GPU too."""
    copies: list[float] = []
    products: dict[str, list[float]] = {}
    for row in rows:
        if row.status != OK or row.median_us is None:
            continue
        if row.peer == COPY and row.cache == "cold" and row.bytes >= LARGE:
            copies.append(1e6 * row.bytes / row.median_us)
        if row.peer == MATMUL:
            products.setdefault(row.dtype, []).append(1e6 * row.flops / row.median_us)
    found = {MEMORY: median(copies)} if copies else {}
    found |= {f"products {dtype}": median(rates) for dtype, rates in products.items()}
    return found | ({"vector float32": median(products["float32"])} if "float32" in products else {})


def from_rows(rows: Sequence[Row], environment: Mapping[str, Any], source: str) -> Machine:
    """A machine with the ceilings of these rows."""
    known = {machine.l2 for machine in MACHINES.values() if environment["machine"] in machine.devices}
    return Machine(
        name=f"{environment['machine']}, {environment['threads']} threads",
        devices=(environment["machine"],),
        peak={},
        source="",
        reached=ceilings(rows),
        measured=f"{source}: medians of the cold copies of {LARGE / 1e6:.0f} MB or more, and of the products",
        l2=next(iter(known), None),
        device=environment["device"],
        threads=environment["threads"],
    )


def find(name: str) -> Machine:
    """A machine of the table, or the one whose ceilings are in a results folder. Raises ValueError for neither."""
    if name in MACHINES:
        return MACHINES[name]
    folder = Path(name)
    if not (folder / "rows.csv").is_file():
        raise ValueError(f"predict: expected one of {list(MACHINES)} or a results folder, got {name!r}")
    machine = from_rows(read(folder / "rows.csv"), read_environment(folder), name)
    if machine.rate(MEMORY) is None:
        raise ValueError(f"predict: expected a cold copy of {LARGE / 1e6:.0f} MB or more among the rows, got none in {name!r}")
    return machine
