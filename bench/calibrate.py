"""What this machine can do at most: the numbers that design choices rest on, in a minute.

    python bench/calibrate.py --out DIR [--device cuda|cpu]

DIR/calibration.json gets the numbers of each part, with their unit in the name, when it ends. A part that fails is recorded
with what it has, and the next begins; run again with the same DIR, the parts that are not done are measured. On the CPU the
parts that mean something there run in small. Nothing sets anything on the device.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl

from harness import environment
from harness.case import Step
from harness.timing import Clock, captured, clock, single_calls

TOTAL = 54.0  # seconds in which parts begin; with the imports under a minute
ROUNDS = 7
#: Products of a DiT-XL/2 block, features in and out; 28 blocks of 256 tokens an image.
PRODUCTS = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}
BLOCKS, TOKENS = 28, 256
WEIGHT_BYTES = 128e6  # to rotate among, so that they come from memory as in a network that has many
READ_MEGABYTES = (16, 32, 48, 512)
#: Of the kernel that reads: numbers of a block, warps, and programs of a multiprocessor, at 64 registers a thread.
BLOCK, NUM_WARPS, PROGRAMS = 4096, 8, 4
SIDE = 8192  # of a square product

#: What a part gives, one after the other: a name with its unit, and the number (NaN for want of a part of it).
Numbers = Iterator[tuple[str, float]]
CPU = torch.device("cpu")


def timed(device: torch.device, variants: Mapping[str, Callable[[], Clock] | Sequence[Step]]) -> dict[str, float]:
    """Median seconds of a step of each variant, interleaved; a variant that does not run is reported and is NaN."""
    clocks: dict[str, Clock] = {}
    for name, given in variants.items():
        try:
            clocks[name] = given() if callable(given) else clock(device, given)
        except Exception as error:  # whatever it is, the others are still measured
            print(f"{name}: {type(error).__name__}: {str(error)[:160]}")
    rounds = [{name: ready.sample() for name, ready in clocks.items()} for _ in range(ROUNDS)]
    return {name: median(one[name] for one in rounds) if name in clocks else math.nan for name in variants}


def copy_bandwidth(device: torch.device) -> Numbers:
    """Bytes read and written a second by a copy, larger and larger."""
    for size in (2**20, 2**23) if device == CPU else (2**28, 2**30, 2**31):
        source, target = torch.randn(2, size // 4, device=device)
        found = timed(device, {"copy": [lambda s=source, t=target: (t.copy_(s),)]})
        yield f"copy_of_{size >> 20}_mib_gb_per_s", 2e-9 * size / found["copy"]


@triton.jit
def _read_kernel(x_ptr, sum_ptr, blocks, passes, BLOCK: tl.constexpr):
    """The sum, ``passes`` times, of what a program reads of x [blocks BLOCK], into sum [programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(passes):
        for place in range(program, blocks, programs):
            # Every pass reads other blocks than the one before, and .cg keeps them out of L1: L2 is what answers.
            block = (place + turn) % blocks
            total += tl.load(x_ptr + block * BLOCK + offsets, cache_modifier=".cg")
    tl.store(sum_ptr + program, tl.sum(total))


def read(x, sums, passes):
    """Read x [n BLOCK] float32 ``passes`` times; sums [programs] gets what each program added up."""
    _read_kernel[(len(sums),)](x, sums, x.numel() // BLOCK, passes, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return (sums,)


def read_bandwidth(device: torch.device) -> Numbers:
    """Bytes a second that every multiprocessor together reads from L2, and from memory where the buffer is larger."""
    sums = torch.zeros(PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count, device=device)
    for megabytes in READ_MEGABYTES:
        x, passes = torch.randn(megabytes * 10**6 // (4 * BLOCK) * BLOCK, device=device), max(2, 4000 // megabytes)
        found = timed(device, {"read": [partial(read, x, sums, passes)]})
        yield f"read_of_{megabytes}_mb_gb_per_s", 1e-9 * passes * x.nbytes / found["read"]


def product_steps(device: torch.device, tokens: int, K: int, N: int, *, gelu: bool) -> dict[str, list[Step]]:
    """A product [tokens, K] x [K, N] with bias in bfloat16, each step with weights of its own; with GELU in it and after it."""
    random = partial(torch.randn, device=device)
    count = 2 if device == CPU else max(2, math.ceil(WEIGHT_BYTES / (2 * K * N)))
    weights = [(random(N, K) * K**-0.5).bfloat16().t() for _ in range(count)]
    x, bias = random(tokens, K).bfloat16(), random(N).bfloat16()
    out, other = (torch.empty(tokens, N, dtype=x.dtype, device=device) for _ in range(2))
    if not gelu:
        return {"with_bias": [lambda w=w: (torch.addmm(bias, x, w, out=out),) for w in weights]}
    # On the CPU torch's is the erf form.
    within, after = partial(torch._addmm_activation, use_gelu=True), partial(torch.ops.aten.gelu.out, approximate="tanh")
    return {
        "with_bias_and_gelu": [lambda w=w: (within(bias, x, w, out=out),) for w in weights],
        "with_bias_then_gelu": [lambda w=w: (after(torch.addmm(bias, x, w, out=out), out=other),) for w in weights],
    }


def matrix_rates(device: torch.device) -> Numbers:
    """TFLOP/s of the products of a DiT-XL/2 block by rows of the batch, and milliseconds of those of all blocks."""
    side = 128 if device == CPU else SIDE
    a, b, target = (torch.randn(side, side, device=device).bfloat16() for _ in range(3))
    found = timed(device, {"square": [lambda: (torch.mm(a, b, out=target),)]})
    yield f"square_of_{side}_tflop_per_s", 2e-12 * side**3 / found["square"]
    for rows in (1,) if device == CPU else (2, 128, 16):
        tokens, total = rows * (16 if device == CPU else TOKENS), 0.0
        for name, (K, N) in PRODUCTS.items():
            found = timed(device, product_steps(device, tokens, K, N, gelu=name == "fc1"))
            for form, seconds in found.items():
                yield f"{name}_{rows}_rows_{form}_tflop_per_s", 2e-12 * tokens * K * N / seconds
            total += BLOCKS * next(iter(found.values()))
            if name == "fc1":
                gained = found["with_bias_then_gelu"] - found["with_bias_and_gelu"]
                yield f"gelu_in_fc1_{rows}_rows_saves_us", 1e6 * gained
        yield f"products_of_{BLOCKS}_blocks_{rows}_rows_ms", 1e3 * total


def graph_gaps(device: torch.device) -> Numbers:
    """Microseconds of replays of graphs of empty kernels, and from one kernel to the next that waits for it."""
    # No cycles: one thread that looks at the clock once.
    replays = {nodes: captured(lambda nodes=nodes: [torch.cuda._sleep(0) for _ in range(nodes)]) for nodes in (1, 200, 1600)}
    found = timed(device, {f"{nodes}": partial(single_calls, device, replay) for nodes, replay in replays.items()})
    for nodes, seconds in found.items():
        yield f"replay_of_{nodes}_nodes_us", 1e6 * seconds
    yield "gap_per_node_us", 1e6 * (found["1600"] - found["200"]) / 1400


def sustained_clocks(device: torch.device) -> Numbers:
    """Rate, clock and power while products of 8192 x 8192 follow each other, about a second at a time."""
    a, b, out = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(3))
    for second in range(10):
        began = time.perf_counter()
        for _ in range(600):
            torch.mm(a, b, out=out)
        seen = environment.clocks(device)  # while the device works
        torch.cuda.synchronize()
        yield f"second_{second}_tflop_per_s", 600 * 2e-12 * SIDE**3 / (time.perf_counter() - began)
        for key, name in (("clocks.sm", "sm_clock_mhz"), ("power.draw", "power_w")):
            number = seen.get(key, "").partition(" ")[0]  # "1980 MHz", or "[N/A]"
            if number.replace(".", "", 1).isdigit():
                yield f"second_{second}_{name}", float(number)


#: Most valuable first.
PARTS = (copy_bandwidth, read_bandwidth, matrix_rates, graph_gaps, sustained_clocks)
ON_CPU = (copy_bandwidth, matrix_rates)


def calibrate(path: Path, device: torch.device, parts: Sequence[Callable[[torch.device], Numbers]]) -> int:
    """Measure the parts that ``path`` does not have, those that failed or ended this program before last; 1 where one is not
    done."""
    began, recorded = time.monotonic(), environment.record(device)
    head = {key: recorded[key] for key in ("device", "machine", "torch", "triton", "commit")}
    kept = json.loads(path.read_text()) if path.exists() else {}
    done: dict[str, Any] = kept.get("calibrations", {}) if head.items() <= kept.items() else {}
    state = lambda part: done.get(part.__name__, {}).get("status", "")
    for part in sorted((part for part in parts if state(part) != "ok"), key=lambda part: state(part) in ("failed", "started")):
        values: dict[str, float] = {}
        entry = done[part.__name__] = {"status": "no time left", "values": values}
        if time.monotonic() - began < TOTAL:
            entry["status"] = "started"
            path.write_text(json.dumps({**head, "calibrations": done}, indent=2) + "\n")
            torch.manual_seed(0)
            try:
                for name, number in part(device):
                    values |= {name: float(f"{number:.4g}")} if math.isfinite(number) else {}
                    print(f"{name}: {number:.4g}", flush=True)
                entry["status"] = "ok"
            except Exception as error:
                entry |= {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:160]}"}
        path.write_text(json.dumps({**head, "calibrations": done}, indent=2) + "\n")
    return 0 if all(state(part) == "ok" for part in parts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of calibration.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    parts = ON_CPU if options.device == "cpu" else PARTS
    return calibrate(options.out / "calibration.json", torch.device(options.device), parts)


if __name__ == "__main__":
    sys.exit(main())
