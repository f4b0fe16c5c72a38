"""What every shipped Triton kernel uses, compiled without a GPU: registers, spills, shared memory, occupancy, instructions and
access widths.

    python bench/aot_report.py [--arch 90] [--quick]

Every launcher is called at the sizes of check_kernels.py with a driver that compiles and launches nothing. Fails where a kernel
for sm_90 spills registers, moves fewer bytes an access than it should, or overwrites a register that a running wgmma reads.
``--quick`` takes few sizes. TRITON_PTXAS_PATH chooses another assembler.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from check_kernels import shipped

from imm.ops import dispatch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import fake_driver

#: Shared memory of a multiprocessor in bytes, by architecture.
ARCHITECTURES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHIPPED = 90
_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class Usage:
    """What the machine code of a kernel uses; sizes in bytes. loads, stores: global accesses by width in bits."""

    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    products: int = 0  # instructions of the tensor cores
    instructions: int = 0  # in all; those of a loop count once
    overwrites: int = 0  # by overwritten

    def occupancy(self, arch: int) -> int:
        """Programs of a multiprocessor at once, by registers (64 Ki, in units of 256 a warp), threads and shared memory."""
        by_registers = 65536 // (self.warps * 32 * -(-self.registers // 8) * 8)
        return min(by_registers, 2048 // (32 * self.warps), 32, ARCHITECTURES[arch] // (self.shared + 1024))


def least_wide(kernel: str, given: Mapping[str, Any], kinds: Mapping[str, str]) -> tuple[int, int]:
    """The least loads and stores of 16 bytes that a kernel ("mmd_dot._pairs_kernel") has. given: its constants; kinds: its
    arguments' types."""
    M, mixed = given.get("M", 0), kinds.get("t.x", "constexpr") != "constexpr"
    # From M = 5 a thread of the direct kernels has four features, of which 16 bits each make 8 bytes.
    narrow = M > 4 and kinds.get("t.y") in ("*bf16", "*fp16")
    loads, stores = (2 * M if mixed else 0, 0) if narrow else (2 * M * (2 if mixed else 1), M)
    residual = given.get("y_ptr", True) is not None
    if kinds.get("qkv_ptr") == "*fp32":  # 8 warps have 8 bytes a thread of the 16 features that a head's rest, or d = 8, fills
        return (2, 1) if given.get("D", 0) > 16 else (0, 0)
    # From N = 9 a thread has four groups of a line; rows that are not whole blocks have no alignment.
    members, half = given.get("N", 0), kinds.get("x.ptr") in ("*bf16", "*fp16")
    line = (members + 1, members) if members <= 8 or not half else (0, 0)
    chunks = given.get("CHUNKS", 0) if given.get("D", 0) == given.get("BLOCK_D") and given.get("D", 0) >= 16 else 0
    return {
        "noise._noise_kernel": (0, 1),
        "energy_score._line_kernel": line,
        "energy_score._small_kernel": (chunks, chunks),
        "mmd_direct._resident_kernel": (loads, 0) if given.get("grad_ptr", True) is None else (2 * loads, stores),
        "mmd_direct._partial_kernel": (loads, 0),
        "mmd_direct._gradient_kernel": (loads, stores),
        "mmd_dot._products_kernel": (0 if kinds.get("t.y") == "*fp16" else 2, 0),
        "mmd_dot._gradient_kernel": (2, 1),
        "mmd_dot._pairs_kernel": (2, 0),
        "mmd_gram._gram_kernel": (2, 0),
        "mmd_gram._gram_gradient_kernel": (1, 1),
        "adaln._adaln_fwd_kernel": (4, 2) if residual else (2, 1),
        "adaln._adaln_bwd_kernel": (4, 2) if residual else (2, 1),
        "adaln._adaln_jvp_kernel": (10, 4) if residual else (6, 2),
        "attention_jvp._attention_jvp_kernel": (4, 2),
        "attention._attention_fwd_kernel": (3 if given.get("D", 0) > 8 else 1, 1),
        "attention._attention_bwd_keys_kernel": (4, 2),
        "attention._attention_bwd_queries_kernel": (4, 1),
        "attention._attention_delta_kernel": (2, 0),
    }.get(kernel, (0, 0))


def problems(found: Usage, least: tuple[int, int], *, only_wide: bool = False, products: bool = False) -> list[str]:
    """What a shipped kernel may not do. only_wide: nothing else but numbers of 8 bytes is read or written. products: they have
    to be the tensor cores'."""
    wrong = [f"spills {found.spills} bytes"] if found.spills else []
    for kind, counts, count in (("loads", found.loads, least[0]), ("stores", found.stores, least[1])):
        if counts.get(128, 0) < count:
            wrong.append(f"expected {count} or more {kind} of 16 bytes, got {dict(counts)}")
    if products and not found.products:
        wrong.append("expected products by tensor cores, got none")
    if found.overwrites:
        wrong.append(f"expected no write to a register that a running wgmma reads, got {found.overwrites}")
    # Coefficients, seeds and the tables of log, sin and cos have 8 bytes.
    if only_wide and not (set(found.loads) <= {64, 128} and set(found.stores) == {128}):
        wrong.append(f"expected no narrow access, got loads {dict(found.loads)} and stores {dict(found.stores)}")
    return wrong


def _widths(sass: str, access: str) -> dict[int, int]:
    """How many global accesses ("LDG|LDGSTS" or "STG") of each width in bits."""
    widths = [re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", of) for of in re.findall(rf"\b(?:{access})\.E((?:\.\w+)*)", sass)]
    return dict(sorted(Counter(int(width[1]) if width else 32 for width in widths).items()))


#: Instructions whose first register is read: of those that come first elsewhere, the second operand tells.
_READS_ONLY = re.compile(r"BAR|BRX|CALL|FCHK|JMX|NANOSLEEP|RET|R2P|WARPSYNC|\w*SETP")
_TWO, _FOUR = re.compile(r"\.(?:[FSU]?64|WIDE|MT?88\.2)\b|^(?:CS2R|D[A-Z]+)"), re.compile(r"\.(?:128|MT?88\.4)\b|^HMMA")


def _written(instruction: str) -> range:
    """The registers that a machine instruction other than wgmma's writes."""
    opcode, _, operands = instruction.partition(" ")
    first = re.match(r"(?:U?PT?\d*, )*R(\d+)(?=,|$| )", operands)
    if not first or _READS_ONLY.match(opcode):
        return range(0)
    count = 4 if _FOUR.search(opcode) else 2 if _TWO.search(opcode) else 1
    return range(int(first[1]), int(first[1]) + count)


def overwritten(sass: str) -> list[str]:
    """The instructions that may write to an A register of a wgmma before the wait for it, on any way through the code.

    A wgmma reads its registers while what follows runs; ptxas before 13.3 has reused them too early.
    """
    code = re.findall(r"^(\.L_\w+):|/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(.+?) *;", sass, re.MULTILINE)
    labels = {label: place for place, (label, _) in enumerate(code) if label}
    found = {}
    for start, (_, text) in enumerate(code):
        running = re.match(r"HGMMA\S* R\d+, R(\d+)", text)
        if not running:
            continue
        read = range(int(running[1]), int(running[1]) + 4)  # of k = 16 in 16 bits or 8 in 32
        ahead, seen = [start + 1], set()
        while ahead:
            place = ahead.pop()
            if place in seen or place >= len(code):
                continue
            seen.add(place)
            text = code[place][1]
            if re.match(r"WARPGROUP.DEPBAR\S* gsb0, 0x0$", text):
                continue
            if not text.startswith("HGMMA") and set(read) & set(_written(text)):
                found[place] = text
            if jump := re.match(r"BRA\S*.*`\((\.L_\w+)\)", text):
                ahead.append(labels[jump[1]])
            ahead.append(place + 1)
    return [found[place] for place in sorted(found)]


def usage(compiled: Any, said: str) -> Usage:
    """What a compiled kernel uses; ``said``: the assembler. The stack of a math function's slow path is not a spill, and only
    what the assembler says tells."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = subprocess.run([_NVDISASM, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(p, said) for p in (r"Used (\d+) registers", r"(\d+) bytes cumulative stack"))
    assert registers is not None
    return Usage(
        warps=compiled.metadata.num_warps,
        registers=int(registers[1]),
        stack=int(stack[1]) if stack else 0,
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        shared=compiled.metadata.shared,
        loads=_widths(sass, "LDG|LDGSTS"),
        stores=_widths(sass, "STG"),
        products=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\.", sass)),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?!NOP)\S", sass)),
        overwrites=len(overwritten(sass)),
    )


_SAID: dict[bytes, str] = {}  # cubin -> what the assembler said


def compiled(device: int) -> Iterator[tuple[str, Any]]:
    """The kernels of imm_kernels that were compiled for a device, with their names."""
    package = importlib.import_module("imm_kernels")
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"imm_kernels.{found.name}")
        for name, function in vars(module).items():
            if isinstance(function, triton.JITFunction) and function.__module__ == module.__name__:
                yield from ((f"{found.name}.{name}", kernel) for kernel in function.device_caches[device][0].values())


def _rows(index: int, arch: int, quick: bool) -> dict[str, tuple[str, list[str]]]:
    """A line of the report, and what is wrong, for each kernel that a group of calls needs; for a worker process."""
    fake_driver.install(arch, _SAID)
    before = {id(kernel) for _, kernel in compiled(arch)}
    for _, op, given, _ in shipped(quick)[index]():
        row = next((row for row in dispatch._TABLE[op] if row.name == "triton"), None)
        request = dispatch.Request(torch.device("cuda"), given[0].dtype, tuple(given[0].shape))
        if row is not None and not op.endswith(".out") and row.refuses(request) is None:
            row.run(*given)
    found = {}
    for name, kernel in compiled(arch):
        if id(kernel) in before:
            continue
        kinds = fake_driver.flat(kernel.src.signature)
        places = fake_driver.places(kernel.src.fn.arg_names, kernel.src.signature)
        constants = {places[place]: value for place, value in kernel.src.constants.items() if place in places}
        u = usage(kernel, _SAID[kernel.asm["cubin"]])
        half = "*bf16" in kinds.values() or "*fp16" in kinds.values()
        products = half and name.startswith("attention") and "delta" not in name
        only_wide = name == "noise._noise_kernel"
        wrong = problems(u, least_wide(name, constants, kinds), only_wide=only_wide, products=products)
        types = " ".join(dict.fromkeys(kind[1:] for kind in kinds.values() if kind.startswith("*")))
        named = ("N", "M", "D", "C", "BLOCK", "COLUMNS", "FULL", "BLOCKS")
        sizes = " ".join(f"{k}={v}" for k, v in constants.items() if k in named and v)
        numbers = f"{u.registers:5d} {u.spills:7d} {u.shared:7d} {u.stack:6d} {u.overwrites:10d} {u.occupancy(arch):9d}"
        numbers += f" {u.products:8d} {u.instructions:12d}"
        accesses = "; ".join(", ".join(f"{bits}: {n}" for bits, n in kind.items()) for kind in (u.loads, u.stores))
        what = f"{name} {types} {sizes}"
        found[kernel.hash] = f"{what:72s} {u.warps:5d} {arch:5d} {numbers}  {accesses}", [f"{what}: {p}" for p in wrong]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES), help="default: all three")
    parser.add_argument("--quick", action="store_true", help="few sizes")
    options = parser.parse_args()
    jobs = [(i, arch) for arch in options.arch or ARCHITECTURES for i in range(len(shipped(options.quick)))]
    failed, seen = [], set()
    numbers = "regs  spills  shared  stack overwrites occupancy products instructions"
    print(f"{'kernel':72s} warps  arch  {numbers}  loads; stores (bits: count)")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        futures = [(arch, pool.submit(_rows, i, arch, options.quick)) for i, arch in jobs]
        for arch, future in futures:
            for key, (line, wrong) in future.result().items():
                if (key, arch) not in seen:
                    print(line, flush=True)
                    failed += wrong if arch == SHIPPED else []
                seen.add((key, arch))
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed or not seen else 0


if __name__ == "__main__":
    sys.exit(main())
