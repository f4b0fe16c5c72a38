"""What this machine can do at most, and what its measurements cost: the numbers that design choices rest on, in a minute.

    python bench/calibrate.py --out DIR [--device cuda|cpu] [--refused mmd,attention] [--fresh]

DIR/calibration.json gets the result of each part when it ends: numbers with their unit in the name, and a line that reads
them. A part that fails, or has used up its seconds, is recorded with what it has, and the next begins; run again with the same
DIR, the parts that are not done are measured. ``--refused`` names ops of ours that are not timed, because their tests failed.
On the CPU the parts that mean something there run in small. Nothing sets anything on the device.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from imm.benchmark import environment, load
from imm.benchmark.case import Step
from imm.benchmark.graphs import capture
from imm.benchmark.timing import Clock, clock, sets_of_buffers

TOTAL = 54.0  # seconds; with the imports under a minute
LEAST = 1.0  # seconds in which a part can do something
ROUNDS = 7

#: Products of a DiT-XL/2 block, features in and out; 28 blocks of 256 tokens an image.
PRODUCTS = {"qkv": (1152, 3456), "proj": (1152, 1152), "fc1": (1152, 4608), "fc2": (4608, 1152)}
BLOCKS, TOKENS, HEADS, HEAD_SIZE = 28, 256, 16, 72
#: Weights to rotate among, so that they come from memory as in a network that has many.
WEIGHT_BYTES = 128e6
#: (G, M, D) of the MMD: the sizes of ImageNet's latents and of CIFAR-10, and one with few large groups.
MMD_SIZES = ((1024, 4, 4096), (1024, 4, 3072), (32, 16, 16384))
#: Warps of a program of the resident MMD kernel, and programs of a multiprocessor.
MMD_LAUNCHES = ((16, 1), (8, 2), (8, 1), (4, 4))
READ_MEGABYTES = (16, 32, 48, 512)
SUSTAINED = 10.0  # seconds
#: What nvidia-smi says -> the name of the value.
SEEN = {"clocks.sm": "sm_clock_{}_mhz", "power.draw": "power_{}_w", "temperature.gpu": "temperature_{}_celsius"}


@dataclass
class Part:
    """What one calibration is given and fills in. until: time.monotonic() at which it stops. refused: ops not to be timed."""

    device: torch.device
    until: float = math.inf
    refused: frozenset[str] = frozenset()
    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def put(self, **numbers: float) -> None:
        """Add values, in four digits; what is no number, for want of a part of it, is left out."""
        self.values |= {name: float(f"{number:.4g}") for name, number in numbers.items() if math.isfinite(number)}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def timed(part: Part, variants: Mapping[str, Callable[[], Clock]]) -> dict[str, float]:
    """Median seconds of a step of each variant, the variants taking turns; one that does not run is noted and left out."""
    clocks: dict[str, Clock] = {}
    for name, make in variants.items():
        try:
            clocks[name] = make()
            if "no graph" in clocks[name].method:
                part.notes.append(f"{name}: {clocks[name].method}")
        except Exception as error:  # whatever it is, the others are still measured
            part.notes.append(f"{name}: {first_line(error)}")
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(ROUNDS):
        for name, ready in clocks.items():
            samples[name].append(ready.sample())
    return {name: median(values) for name, values in samples.items()}


def of_steps(part: Part, steps: Sequence[Step]) -> Callable[[], Clock]:
    return lambda: clock(part.device, steps)


def copy_bandwidth(part: Part) -> str:
    """Bytes read and written a second by a copy, larger and larger."""
    for size in (2**28, 2**30, 2**31) if part.cuda else (2**20, 2**23):
        source = torch.randn(size // 4, device=part.device)
        target = torch.empty_like(source)
        found = timed(part, {"copy": of_steps(part, [lambda s=source, t=target: (t.copy_(s),)])})
        last = f"copy_of_{size >> 20}_mib_gb_per_s"
        part.put(**{last: 2e-9 * size / found["copy"]})
        if part.over:
            break
    return f"a copy reads and writes {part.values[last]:.0f} GB/s"


def read_bandwidth(part: Part) -> str:
    """Bytes a second that every multiprocessor together reads from L2, and from memory where the buffer is larger."""
    from calibrate_kernels import BLOCK, PROGRAMS, read

    sums = torch.zeros(PROGRAMS * torch.cuda.get_device_properties(part.device).multi_processor_count, device=part.device)
    for megabytes in READ_MEGABYTES:
        x = torch.randn(megabytes * 10**6 // (4 * BLOCK) * BLOCK, device=part.device)
        passes = max(2, 4000 // megabytes)

        def step(x: Tensor = x, passes: int = passes) -> tuple[Tensor, ...]:
            read(x, sums, passes)
            return (sums,)

        found = timed(part, {"read": of_steps(part, [step])})
        part.put(**{f"read_of_{megabytes}_mb_gb_per_s": 1e-9 * passes * x.nbytes / found["read"]})
        if part.over:
            break
    return ", ".join(f"{name.split('_')[2]} MB: {value:.0f} GB/s" for name, value in part.values.items())


def product_steps(part: Part, tokens: int, K: int, N: int, *, gelu: bool) -> dict[str, list[Step]]:
    """A product [tokens, K] x [K, N] with bias in bfloat16, each step with weights of its own; with GELU in it and after it."""
    random = partial(torch.randn, device=part.device)
    count = max(2, math.ceil(WEIGHT_BYTES / (2 * K * N))) if part.cuda else 2
    weights = [(random(N, K) * K**-0.5).bfloat16().t() for _ in range(count)]
    x, bias = random(tokens, K).bfloat16(), random(N).bfloat16()
    out, other = (torch.empty(tokens, N, dtype=x.dtype, device=part.device) for _ in range(2))
    if not gelu:
        return {"with_bias": [lambda w=w: (torch.addmm(bias, x, w, out=out),) for w in weights]}
    # On the CPU torch's is the erf form.
    within, after = partial(torch._addmm_activation, use_gelu=True), partial(torch.ops.aten.gelu.out, approximate="tanh")
    return {
        "with_bias_and_gelu": [lambda w=w: (within(bias, x, w, out=out),) for w in weights],
        "with_bias_then_gelu": [lambda w=w: (after(torch.addmm(bias, x, w, out=out), out=other),) for w in weights],
    }


def matrix_rates(part: Part) -> str:
    """TFLOP/s of the products of a DiT-XL/2 block by rows of the batch, and milliseconds of those of all blocks."""
    side = 8192 if part.cuda else 128
    a, b = (torch.randn(side, side, device=part.device).bfloat16() for _ in range(2))
    target = torch.empty_like(a)
    found = timed(part, {"square": of_steps(part, [lambda: (torch.mm(a, b, out=target),)])})
    part.put(**{f"square_of_{side}_tflop_per_s": 2e-12 * side**3 / found["square"]})
    readings = []
    for rows in (2, 128, 16) if part.cuda else (1,):
        tokens, total = rows * (TOKENS if part.cuda else 16), 0.0
        for name, (K, N) in PRODUCTS.items():
            if part.over:
                return "; ".join([*readings, "the rest not measured"])
            steps = product_steps(part, tokens, K, N, gelu=name == "fc1")
            seconds = timed(part, {form: of_steps(part, each) for form, each in steps.items()})
            part.put(**{f"{name}_{rows}_rows_{form}_tflop_per_s": 2e-12 * tokens * K * N / t for form, t in seconds.items()})
            total += BLOCKS * seconds.get(next(iter(steps)), math.nan)
            if name == "fc1":
                gained = seconds.get("with_bias_then_gelu", math.nan) - seconds.get("with_bias_and_gelu", math.nan)
                part.put(**{f"gelu_in_fc1_{rows}_rows_saves_us": 1e6 * gained})
        part.put(**{f"products_of_{BLOCKS}_blocks_{rows}_rows_ms": 1e3 * total})
        readings.append(f"{rows} rows: products {1e3 * total:.3g} ms a step")
    return "; ".join(readings)


def forced(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend], set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def attention(part: Part) -> str:
    """Microseconds of torch's attention by backend beside ours, and which backend torch takes."""
    declared = load("attention")
    names = {int(getattr(SDPBackend, name)): name.lower() for name in SDPBackend.__members__}
    readings = []
    for rows in (2, 16, 128) if part.cuda else (1,):
        tokens, dtype = (TOKENS, torch.bfloat16) if part.cuda else (16, torch.float32)
        qkv = torch.randn(rows, tokens, 3 * HEADS * HEAD_SIZE, device=part.device).to(dtype)
        q, k, v = qkv.reshape(rows, tokens, 3, HEADS, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        # The first call of a process sets the default order, over one that a caller has set.
        F.scaled_dot_product_attention(q, k, v)
        chosen = names[int(torch._fused_sdp_choice(q, k, v))]
        attentions = {"default": F.scaled_dot_product_attention}
        backends = declared.BACKENDS if part.cuda else {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA math": SDPBackend.MATH}
        attentions |= {name.removeprefix("SDPA ").lower(): forced(backend) for name, backend in backends.items()}
        calls = {name: declared.unpacked(run, HEADS) for name, run in attentions.items()}
        if "attention" not in part.refused:
            calls["imm"] = lambda x: torch.ops.imm.timestep_attention(x, HEADS, None, None, 1e-6)[0]
        steps = {name: [lambda call=call, x=qkv: (call(x),)] for name, call in calls.items()}
        found = timed(part, {name: of_steps(part, step) for name, step in steps.items()})
        part.put(**{f"{name}_{rows}_rows_us": 1e6 * t for name, t in found.items()})
        fastest = min((name for name in found if name not in ("default", "imm")), key=found.__getitem__, default="none")
        readings.append(f"{rows} rows: torch takes {chosen}, its fastest is {fastest}")
        if part.over:
            break
    order = [names[i] for i in torch._C._get_sdp_priority_order()]
    return "; ".join([*readings, f"priority {', '.join(order)}"])


@contextmanager
def mmd_launch(warps: int, programs: int, group_bytes: int) -> Iterator[None]:
    """Within it the resident MMD kernel is launched with so many warps a program and programs a multiprocessor, for groups of
    so many bytes. With 128 registers 16 warps fit there at once."""
    from imm_kernels import mmd

    shipped = mmd.direct_sizes, mmd._NEAR_BYTES

    def sizes(*shape: Any, **options: Any) -> mmd.DirectSizes:
        each = shipped[0](*shape, **options).EACH
        return mmd.DirectSizes(32 * warps * each, each, warps, 128)

    mmd.direct_sizes, mmd._NEAR_BYTES = sizes, programs * group_bytes
    try:
        yield
    finally:
        mmd.direct_sizes, mmd._NEAR_BYTES = shipped


def mmd_launches(part: Part) -> str:
    """Microseconds of the MMD loss and gradient by warps and programs of the launch, beside a copy of the same bytes."""
    if "mmd" in part.refused:
        return "not timed: tests of mmd failed"
    declared, readings = load("mmd"), []
    for G, M, D in MMD_SIZES if part.cuda else ((4, 4, 256),):
        for dtype in (torch.float32, torch.bfloat16):
            if part.over:
                return "; ".join([*readings, "the rest not measured"])
            case = declared.case(G, M, D, part.device, dtype)
            sets = [case.inputs() for _ in range(sets_of_buffers(part.device, case.bytes))]
            steps = [declared.preallocated(*given) for given in sets]
            halves = [torch.empty(2, case.bytes // 8, device=part.device).normal_() for _ in sets]
            copies: list[Step] = [lambda h=half: (h[0].copy_(h[1]),) for half in halves]

            def within(warps: int, programs: int, steps: list[Step] = steps, group: int = 2 * M * D * dtype.itemsize) -> Clock:
                with mmd_launch(warps, programs, group):
                    return of_steps(part, steps)()

            variants = {"copy": of_steps(part, copies), "shipped": of_steps(part, steps)}
            if M <= 8:  # larger sets take other kernels
                variants |= {f"{w}_warps_{p}_programs": partial(within, w, p) for w, p in MMD_LAUNCHES}
            found = timed(part, variants)
            name = f"{G}_{M}_{D}_{str(dtype).removeprefix('torch.')}"
            part.put(**{f"mmd_{name}_{variant}_us": 1e6 * t for variant, t in found.items()})
            if "shipped" in found and "copy" in found:
                best = min((v for v in found if v != "copy"), key=found.__getitem__)
                ratio = found["shipped"] / found["copy"]
                readings.append(f"{name.replace('_', ' ')}: shipped {ratio:.2f} x copy, best {best.replace('_', ' ')}")
    return "; ".join(readings)


def graph_gaps(part: Part) -> str:
    """Microseconds from one empty kernel of a graph to the next that waits for it, of a launch, and of the processor for it."""
    seconds: dict[int, float] = {}
    torch.cuda._sleep(0)  # loads the kernel, which a capture may not
    for nodes in (1, 200, 1600):
        # No cycles: one thread that looks at the clock once.
        replay = captured(lambda nodes=nodes: [torch.cuda._sleep(0) for _ in range(nodes)])
        device, host = [], []
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3 * ROUNDS):
            torch.cuda.synchronize()
            start.record()
            began = time.perf_counter()
            replay()
            host.append(time.perf_counter() - began)
            end.record()
            end.synchronize()
            device.append(1e-3 * start.elapsed_time(end))
        seconds[nodes] = median(device)
        part.put(**{f"replay_of_{nodes}_nodes_us": 1e6 * median(device), f"host_of_{nodes}_nodes_us": 1e6 * median(host)})
    gap = 1e6 * (seconds[1600] - seconds[200]) / 1400
    part.put(gap_per_node_us=gap)
    alone, host_us = 1e6 * seconds[1], part.values["host_of_1600_nodes_us"]
    return f"{gap:.2f} us a node, a replay of one {alone:.1f} us; one of 1600 takes {host_us:.0f} us of the processor"


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """Replays of what ``run`` launches; it has run before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def after(flush: Callable[[], Any], run: Callable[[], Any], count: int = 50) -> float:
    """Median seconds of a run that follows something else each time, between two events."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median(1e-3 * start.elapsed_time(end) for start, end in pairs)


def do_bench_bias(part: Part) -> str:
    """Microseconds of one MMD by rotated buffers in a graph, by Triton's do_bench, and after a flush that writes or reads."""
    if "mmd" in part.refused:
        return "not timed: tests of mmd failed"
    import triton.testing

    declared, readings = load("mmd"), []
    for dtype in (torch.float32, torch.bfloat16):
        case = declared.case(*MMD_SIZES[1], part.device, dtype)
        steps = [declared.preallocated(*case.inputs()) for _ in range(sets_of_buffers(part.device, case.bytes))]
        found = timed(part, {"rotated": of_steps(part, steps)})
        # As a graph, since the processor takes longer for a call than the device, and the events would count that.
        step, replay = steps[0], captured(steps[0])
        buffer = torch.empty(2**26, device=part.device).normal_()  # 256 MiB, as do_bench's
        found["after_reading"] = after(buffer.sum, replay)
        found["after_writing"] = after(buffer.zero_, replay)
        found["do_bench"] = 1e-3 * triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median")
        name = str(dtype).removeprefix("torch.")
        part.put(**{f"{name}_{way}_us": 1e6 * t for way, t in found.items()})
        part.put(**{f"{name}_dirty_l2_bias_us": 1e6 * (found["after_writing"] - found["after_reading"])})
        readings.append(f"{name}: do_bench {1e6 * found['do_bench']:.1f} us, rotated {1e6 * found['rotated']:.1f} us")
        if part.over:
            break
    return "; ".join(readings)


def number(text: str) -> float | None:
    """The number of "1980 MHz"; None for "[N/A]"."""
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return None


def sustained_clocks(part: Part) -> str:
    """Clocks and power while products of 8192 x 8192 follow each other, about a second at a time, and their rate."""
    side, count = (8192, 600) if part.cuda else (64, 6)
    a, b = (torch.randn(side, side, device=part.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    columns: dict[str, list[float]] = {}
    began, rates = time.monotonic(), []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    while not rates or (time.monotonic() - began < SUSTAINED and not part.over):
        start.record()
        for _ in range(count):
            torch.mm(a, b, out=out)
        end.record()
        seen = environment.clocks(part.device) or {}
        busy = not end.query()  # else some of what was seen is of an idle device
        end.synchronize()
        rates.append(2e-12 * count * side**3 / (1e-3 * start.elapsed_time(end)))
        for key, name in SEEN.items():
            if busy and (value := number(seen.get(key, ""))) is not None:
                columns.setdefault(name, []).append(value)
    part.put(measured_s=time.monotonic() - began, samples_count=len(rates))
    part.put(first_tflop_per_s=rates[0], last_tflop_per_s=rates[-1])
    for name, values in columns.items():
        for what, choose in (("least", min), ("median", median), ("most", max)):
            part.put(**{name.format(what): choose(values)})
    clock_mhz = part.values.get("sm_clock_median_mhz")
    seen_clock = "no clock seen" if clock_mhz is None else f"{clock_mhz:.0f} MHz"
    return f"{seen_clock}, {rates[-1]:.0f} TFLOP/s after {part.values['measured_s']:.0f} s, {rates[0]:.0f} in the first"


#: Seconds at most, most valuable first.
CUDA_PARTS: dict[str, tuple[float, Callable[[Part], str]]] = {
    "copy_bandwidth": (4, copy_bandwidth),
    "read_bandwidth": (5, read_bandwidth),
    "matrix_rates": (13, matrix_rates),
    "attention": (9, attention),
    "mmd_launches": (10, mmd_launches),
    "graph_gaps": (4, graph_gaps),
    "do_bench_bias": (5, do_bench_bias),
    "sustained_clocks": (14, sustained_clocks),
}
CPU_PARTS = {name: CUDA_PARTS[name] for name in ("copy_bandwidth", "matrix_rates", "attention")}


def alive(device: torch.device) -> bool:
    """Whether the device still answers: after an illegal access nothing in this process does."""
    try:
        torch.cuda.synchronize() if device.type == "cuda" else None
    except RuntimeError:
        return False
    return True


def calibrate(path: Path, device: torch.device, refused: frozenset[str], say: Callable[[str], None] = print) -> int:
    """Measure the parts that ``path`` does not have; 1 where one of them failed or had no time."""
    began = time.monotonic()
    kept = json.loads(path.read_text()) if path.exists() else {}
    recorded = environment.record(device)
    head = {"device": device.type, **{key: recorded[key] for key in ("machine", "torch", "triton", "commit", "dirty", "time")}}
    same = all(kept.get(key) == head[key] for key in ("device", "machine", "torch", "triton", "commit"))
    done: dict[str, Any] = kept.get("calibrations", {}) if same else {}

    def keep(name: str, **entry: Any) -> None:
        done[name] = entry
        path.write_text(json.dumps({**head, "calibrations": done}, indent=2) + "\n")

    parts = CUDA_PARTS if device.type == "cuda" else CPU_PARTS
    waiting = [name for name in parts if done.get(name, {}).get("status") != "ok"]
    # Those that failed or ended this program before come after those not tried.
    for name in sorted(waiting, key=lambda name: done.get(name, {}).get("status") in ("failed", "started")):
        limit, function = parts[name]
        start = time.monotonic()
        left = TOTAL - (start - began)
        if left < LEAST:
            keep(name, status="no time left")
            continue
        keep(name, status="started")
        part = Part(device, start + min(limit, left), refused)
        torch.manual_seed(0)
        try:
            reading = function(part)
            status = "cut short" if part.over else "ok"
        except Exception as error:
            status, reading = "failed", first_line(error)
        seconds = round(time.monotonic() - start, 2)
        keep(name, status=status, seconds=seconds, reading=reading, values=part.values, notes=part.notes)
        say(f"{name}: {status}, {seconds} s: {reading}")
        if not alive(device):
            say("the device does not answer any more; run again with the same folder")
            break
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0 if all(done.get(name, {}).get("status") in ("ok", "cut short") for name in parts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of calibration.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--refused", default="", help="ops that are not timed: mmd, attention")
    parser.add_argument("--fresh", action="store_true", help="forget what there is")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected a GPU that torch sees, got none")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "calibration.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    refused = frozenset(name for name in options.refused.split(",") if name)
    return calibrate(path, torch.device(options.device), refused)


if __name__ == "__main__":
    sys.exit(main())
