"""What every shipped Triton kernel uses, compiled without a GPU: registers, spills, shared memory, occupancy, access widths.

    python bench/aot_report.py [--arch 90] [--only resident] [--quick]

Fails where a configuration on sm_90 spills registers, moves fewer bytes an access than it should, or overwrites a register
that a running wgmma reads. A new kernel adds its configurations to CONFIGURATIONS. ``--quick`` takes the last of each kernel
for 16, 32 and 64 bits. TRITON_PTXAS_PATH chooses another assembler.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from imm_kernels import adaln, attention, flow_step, mmd, mmd_direct, mmd_dot, mmd_gram, noise, timestep_embedding

#: Shared memory of a multiprocessor in bytes, by architecture.
ARCHITECTURES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
SHIPPED = 90
_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class Configuration:
    """One compilation of a kernel as its launcher asks for it.

    signature: every run-time argument's type ("*bf16", "i32"). aligned: those the launcher passes divisible by 16 in the case
    that matters. constexprs: flags and block sizes, and None for absent pointers. wide: the least loads and stores of 16 bytes.
    only_wide: nothing else but numbers of 8 bytes is read or written. tensor_cores: its products have to be theirs.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()
    num_stages: int = 3
    maxnreg: int | None = None
    wide: tuple[int, int] = (0, 0)
    only_wide: bool = False
    tensor_cores: bool = False


@dataclass(frozen=True)
class Usage:
    """What the machine code of a configuration uses; sizes in bytes. loads, stores: global accesses by width in bits."""

    registers: int
    stack: int
    spills: int
    shared: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    tensor_cores: int = 0  # instructions
    overwrites: int = 0  # by overwritten

    def occupancy(self, num_warps: int, arch: int) -> int:
        """Programs of a multiprocessor at once, by registers (64 Ki, in units of 256 a warp), threads and shared memory."""
        by_registers = 65536 // (num_warps * 32 * -(-self.registers // 8) * 8)
        return min(by_registers, 2048 // (32 * num_warps), 32, ARCHITECTURES[arch] // (self.shared + 1024))


def _flow_step(state: str, output: str, guided: bool, noisy: bool) -> Configuration:
    signature = {"x_ptr": f"*{state}", "g_ptr": f"*{output}", "x_s_ptr": f"*{state}"}
    signature |= {"c_skip_ptr": "*fp64", "c_out_ptr": "*fp64"}
    constexprs: dict[str, Any] = {"HAS_GUIDANCE": guided, "HAS_NOISE": noisy, "BLOCK": flow_step.BLOCK}
    optional = {"g_uncond_ptr": (guided, f"*{output}"), "guidance_ptr": (guided, "*fp64")}
    optional |= {"c_noise_ptr": (noisy, "*fp64"), "seeds_ptr": (noisy, "*i64")}
    for name, (present, kind) in optional.items():
        (signature if present else constexprs)[name] = kind if present else None
    signature |= {f"{name}_stride": "i32" for name in ("c_skip", "c_out", "guidance", "c_noise", "seeds")}
    signature |= {"step": "i32", "D": "i32"}
    name = f"flow_step {state} {output}{' guided' * guided}{' noisy' * noisy}"
    tensors = tuple(a for a in ("x_ptr", "g_ptr", "g_uncond_ptr") if a in signature)
    aligned = (*tensors, "x_s_ptr", "D")
    return Configuration(
        name,
        flow_step._flow_step_fwd_kernel,
        signature,
        constexprs,
        flow_step.NUM_WARPS,
        aligned,
        wide=(len(tensors), 1),
        only_wide=True,
    )


def _noise() -> Configuration:
    signature = {"seeds_ptr": "*i64", "normal_ptr": "*fp32", "seeds_stride": "i32", "step": "i32", "D": "i32"}
    constexprs, aligned = {"BLOCK": noise.BLOCK}, ("normal_ptr", "D")
    return Configuration(
        "noise", noise._noise_kernel, signature, constexprs, noise.NUM_WARPS, aligned, wide=(0, 1), only_wide=True
    )


#: Of the MMD kernels' pointers: types that do not depend on the particles'.
_NUMBERS = {
    **dict.fromkeys(("loss_ptr", "slopes_ptr", "partial_ptr", "products_ptr", "norms_ptr"), "*fp32"),
    **dict.fromkeys(("out_ptr", "coefficient_ptr"), "*fp32"),
}
_STATES, _PARTICLES = ("x_t_ptr", "x_r_ptr"), ("t_ptr", "r_ptr", "x_ptr", "y_ptr", "grad_ptr")


def _mmd(
    name: str,
    kernel: Any,
    element: str,
    state: str | None,
    constexprs: Mapping[str, Any],
    num_warps: int,
    wide: tuple[int, int],
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Configuration:
    """An MMD kernel for contiguous particles of a dtype, formed from states of another where that is given."""
    given = {"KERNEL": "laplace", "BANDWIDTHS": (1.0,), "UNBIASED": False, "HAS_WEIGHT": True, "HAS_UPSTREAM": True}
    given |= {"HAS_MIX": state is not None, **constexprs}
    fixed: dict[str, Any] = {n: v for n, v in given.items() if n in kernel.arg_names}
    signature: dict[str, str] = {}
    aligned = []
    for n in kernel.arg_names:
        if n in fixed:
            continue
        if state is None and (n in _STATES or n.startswith("c_")):
            fixed[n] = None
        elif n in _STATES:
            signature[n] = f"*{state}"
        elif n in _PARTICLES:
            signature[n] = f"*{element}"
        elif n.endswith("_ptr"):
            signature[n] = _NUMBERS.get(n, "*fp64")
        else:
            signature[n] = "fp32" if n == "eps" else "i32"
        if n in (*_STATES, *_PARTICLES, "D", "slice_features") or (n.endswith("stride") and n[0] in "trxy"):
            aligned += [n] if n in signature else []
    of = f"{element}{f' of {state}' if state else ''}"
    return Configuration(f"{name} {of}", kernel, signature, fixed, num_warps, tuple(aligned), num_stages, maxnreg, wide)


_SETS = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", None), ("fp32", None), ("bf16", None))
_BITS = {"fp16": 16, "fp32": 32, "bf16": 16}


def _direct() -> Iterator[Configuration]:
    """Every size that mmd.direct_sizes chooses."""
    for element, state in _SETS:
        for M in range(1, mmd.largest_direct(mix=state is not None) + 1):
            for sizes in {mmd.direct_sizes(M, D, _BITS[element], mix=state is not None) for D in (1024, 2048, 4096)}:
                given = {"M": M, "BLOCK": sizes.BLOCK, "EACH": sizes.EACH}
                options = {"num_warps": sizes.num_warps, "maxnreg": sizes.maxnreg}
                # From M = 5 a thread has four features, of which 16 bits each make 8 bytes.
                narrow = M > 4 and _BITS[element] == 16
                loads, stores = (2 * M if state else 0, 0) if narrow else (2 * M * (2 if state else 1), M)
                for name, kernel, wide in (
                    ("resident", mmd_direct._resident_kernel, (2 * loads, stores)),
                    ("partial", mmd_direct._partial_kernel, (loads, 0)),
                    ("gradient", mmd_direct._gradient_kernel, (loads, stores)),
                ):
                    yield _mmd(f"mmd {name} M={M} {sizes.BLOCK}", kernel, element, state, given, wide=wide, **options)
    for M in range(1, mmd.largest_direct(mix=False) + 1):
        yield _mmd(f"mmd combine M={M}", mmd_direct._combine_kernel, "fp32", None, {"M": M}, 1, (0, 0))


def _products() -> Iterator[Configuration]:
    """Every size that mmd.dot_sizes chooses."""
    for M, (element, state) in itertools.product((16, 32, 64, 256), _SETS):
        exact = element == "bf16" and state is None
        sizes = mmd.dot_sizes(M, exact_bf16=exact, mix=state is not None)
        block = {"EXACT_BF16": exact, "ONE_BLOCK": M <= 64, "BLOCK_M": sizes.rows, "BLOCK_D": sizes.features}
        name = f"{sizes.rows}x{sizes.features}{'' if M <= 64 else ' many'}"
        kernel, warps = mmd_dot._products_kernel, sizes.warps
        loads = 0 if element == "fp16" else 2
        yield _mmd(f"mmd products {name}", kernel, element, state, block, warps, (loads, 0), sizes.stages)
        if M <= 64:
            block = {"EXACT_BF16": exact, "BLOCK_M": sizes.rows, "BLOCK_K": 16, "BLOCK_D": sizes.gradient_features}
            name = f"{sizes.rows}x{sizes.gradient_features}"
            warps = sizes.gradient_warps
            yield _mmd(f"mmd products gradient {name}", mmd_dot._gradient_kernel, element, state, block, warps, (2, 1), 2)
    for columns, (element, state) in itertools.product((16, 32, 64, 128, 256), _SETS):
        block = {"ROWS": mmd._ROWS, "COLUMNS": columns, "BLOCK_D": mmd._FEATURES}
        warps = 8 if columns > 128 else 4
        yield _mmd(f"mmd pairs {columns}", mmd_dot._pairs_kernel, element, state, block, warps, (2, 0), maxnreg=255)


def _gram() -> Iterator[Configuration]:
    for element in _BITS:
        exact = element == "bf16"
        block = {"EXACT_BF16": exact, "ROWS": mmd_gram.ROWS, "BLOCK_D": mmd_gram.FEATURES if exact else mmd_gram.FEATURES // 2}
        for name, grad in (("gram", {"grad_ptr": None}), ("gram slopes", {})):
            yield _mmd(f"mmd {name}", mmd_gram._gram_kernel, element, None, {**block, **grad}, mmd_gram.NUM_WARPS, (2, 0))
        block = {"ROWS": mmd_gram.GRADIENT_ROWS, "BLOCK_D": mmd_gram.GRADIENT_FEATURES}
        kernel, warps = mmd_gram._gram_gradient_kernel, mmd_gram.GRADIENT_WARPS
        yield _mmd("mmd gram gradient", kernel, element, None, block, warps, (1, 1))


def _adaln(kernel: Any, C: int, token: str, output: str, residual: bool) -> Configuration:
    """Modulations are float32 rows of a matrix; tokens are in one dtype, the network's output in another."""
    backward = kernel is adaln._adaln_bwd_kernel
    block, warps = adaln.block_and_warps(C, adaln.ROWS if backward else 1)
    constexprs: dict[str, Any] = {"C": C, "BLOCK_C": block, **({"ROWS": adaln.ROWS} if backward else {})}
    of_residual = ("y_ptr", "gate_ptr", "grad_z_ptr", "grad_y_ptr") if backward else ("y_ptr", "gate_ptr", "z_ptr")
    absent = () if residual else of_residual
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name in absent:
            constexprs[name] = None
        elif name in ("y_ptr", "h_ptr", "grad_h_ptr", "grad_y_ptr"):
            signature[name] = f"*{output}"
        elif name in ("x_ptr", "z_ptr", "grad_x_ptr", "grad_z_ptr"):
            signature[name] = f"*{token}"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    what = f"{'gated residual ' if residual else ''}adaln{' backward' if backward else ''}"
    wide = (4, 2) if residual else (2, 1)
    aligned = tuple(n for n in signature if n not in ("tokens", "eps"))
    return Configuration(f"{what} C={C} {token} {output}", kernel, signature, constexprs, warps, aligned, wide=wide)


def _timestep_embedding(output: str) -> Configuration:
    kernel = timestep_embedding._timestep_embedding_kernel
    constexprs = {"LOG_PERIOD": 9.2, "HALF": 128, "BLOCK": 128}
    signature = {"t_ptr": "*fp64", "s_ptr": "*fp64", "out_ptr": f"*{output}"}
    signature |= dict.fromkeys(("t_stride", "s_stride", "batch"), "i32")
    return Configuration(f"timestep embedding {output}", kernel, signature, constexprs, timestep_embedding.NUM_WARPS)


def _attention(
    name: str, kernel: Any, sizes: attention.Sizes, d: int, T: int, element: str, wide: tuple[int, int], norm: bool = False
) -> Configuration:
    """An attention kernel for 16 heads and contiguous tensors, T divisible by the blocks."""
    main, rest = attention.parts(d)
    given = {"HEADS": 16, "D": d, "MAIN": main, "REST": rest, "BLOCK_M": sizes.queries, "BLOCK_N": sizes.keys}
    given |= {"FULL": T % sizes.queries == 0 and T % sizes.keys == 0, "ONE_BLOCK": sizes.keys >= T}
    given |= {"BLOCK": attention.DELTA_TOKENS, **({} if norm else {"q_norm_ptr": None, "k_norm_ptr": None})}
    fixed = {n: v for n, v in given.items() if n in kernel.arg_names}
    sums = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "grad_qkv_ptr": "*fp32" if norm else f"*{element}"}
    sums |= {"q_norm_ptr": "*fp32", "k_norm_ptr": "*fp32", "scale": "fp32", "eps": "fp32"}
    kinds = {n: sums.get(n, f"*{element}" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in fixed}
    aligned = tuple(n for n in kinds if n.endswith("_ptr"))
    tensor = element != "fp32" and name != "delta"
    title = f"attention {name} d={d} T={T} {element}{' norm' * norm}"
    return Configuration(title, kernel, kinds, fixed, sizes.warps, aligned, sizes.stages, wide=wide, tensor_cores=tensor)


def _attentions() -> Iterator[Configuration]:
    delta = attention.Sizes(attention.DELTA_TOKENS, attention.DELTA_TOKENS, attention.DELTA_WARPS, 3)
    for element, d, T, norm in (
        *(("bf16", d, T, False) for d, T in ((64, 250), (40, 256), (96, 256), (120, 256))),
        *(("bf16", 8, 16, False), *(("bf16", d, 300, norm) for d in (64, 72, 128) for norm in (False, True))),
        *(("fp16", 72, 256, False), ("fp32", 72, 256, False), ("fp32", 128, 1024, True)),
        *(("bf16", d, T, norm) for d in (64, 80, 128, 72) for T in (1024, 256) for norm in (True, False)),
    ):
        bits = _BITS[element]
        for name, kernel, sizes, wide in (
            ("forward", attention._attention_fwd_kernel, attention.forward_sizes(d, T, bits, norm), (3 if d > 8 else 1, 1)),
            ("keys", attention._attention_bwd_keys_kernel, attention.key_sizes(d, bits, norm), (4, 2)),
            ("queries", attention._attention_bwd_queries_kernel, attention.query_sizes(d, bits), (4, 1)),
        ):
            yield _attention(name, kernel, sizes, d, T, element, wide, norm)
        if not norm:
            yield _attention("delta", attention._attention_delta_kernel, delta, d, T, element, (2, 0))


_PAIRS = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp64", "fp64"), ("fp32", "bf16"), ("bf16", "fp32"))
CONFIGURATIONS: tuple[Configuration, ...] = (
    *(_flow_step(*pair, guided, noisy) for pair in _PAIRS for guided in (False, True) for noisy in (False, True)),
    _noise(),
    *_direct(),
    *_products(),
    *_gram(),
    *(
        _adaln(kernel, C, *dtypes, residual)
        for kernel in (adaln._adaln_fwd_kernel, adaln._adaln_bwd_kernel)
        for C in (384, 1152)
        for dtypes in (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16"))
        for residual in (False, True)
    ),
    *(_timestep_embedding(output) for output in ("fp32", "bf16")),
    *_attentions(),
)


def _widths(sass: str, access: str) -> dict[int, int]:
    """How many global accesses ("LDG|LDGSTS" or "STG") of each width in bits."""
    counts: dict[int, int] = {}
    for suffixes in re.findall(rf"\b(?:{access})\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
        bits = int(width[1]) if width else 32
        counts[bits] = counts.get(bits, 0) + 1
    return dict(sorted(counts.items()))


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


def usage(configuration: Configuration, arch: int = SHIPPED) -> Usage:
    """Compile a configuration for sm_<arch> and read its machine code. Needs no GPU."""
    c, names = configuration, configuration.kernel.arg_names
    source = ASTSource(
        fn=c.kernel,
        signature={name: "constexpr" if name in c.constexprs else c.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in c.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in c.aligned},
    )
    # The stack of a math function's slow path is not a spill, and only what the assembler says tells.
    knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": c.num_warps, "num_stages": c.num_stages, "maxnreg": c.maxnreg},
        )
    text = said.getvalue()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        sass = subprocess.run([_NVDISASM, "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None
    stack = re.search(r"(\d+) bytes cumulative stack", text)
    return Usage(
        registers=int(registers[1]),
        stack=int(stack[1]) if stack else 0,
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
        shared=compiled.metadata.shared,
        loads=_widths(sass, "LDG|LDGSTS"),
        stores=_widths(sass, "STG"),
        tensor_cores=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\.", sass)),
        overwrites=len(overwritten(sass)),
    )


def problems(configuration: Configuration, found: Usage) -> list[str]:
    """What a shipped configuration may not do."""
    wrong = []
    if found.spills:
        wrong.append(f"spills {found.spills} bytes")
    for kind, counts, least in (("loads", found.loads, configuration.wide[0]), ("stores", found.stores, configuration.wide[1])):
        if counts.get(128, 0) < least:
            wrong.append(f"expected {least} or more {kind} of 16 bytes, got {dict(counts)}")
    if configuration.tensor_cores and not found.tensor_cores:
        wrong.append("expected products by tensor cores, got none")
    if found.overwrites:
        wrong.append(f"expected no write to a register that a running wgmma reads, got {found.overwrites}")
    # Coefficients, seeds and the tables of log, sin and cos have 8 bytes.
    if configuration.only_wide and not (set(found.loads) <= {64, 128} and set(found.stores) == {128}):
        wrong.append(f"expected no narrow access, got loads {dict(found.loads)} and stores {dict(found.stores)}")
    return wrong


def quick() -> list[int]:
    """The places of the last configuration of each kernel for each size of its narrowest numbers."""
    last = {}
    for place, c in enumerate(CONFIGURATIONS):
        last[c.kernel, min(int(kind[-2:]) for kind in c.signature.values() if kind.startswith("*"))] = place
    return sorted(last.values())


def _row(index: int, arch: int) -> tuple[str, list[str]]:
    """A line of the report, and what is wrong; for a worker process."""
    c = CONFIGURATIONS[index]
    u = usage(c, arch)
    accesses = "; ".join(", ".join(f"{bits}: {n}" for bits, n in kind.items()) for kind in (u.loads, u.stores))
    numbers = (
        f"{u.registers:5d} {u.spills:7d} {u.shared:7d} {u.stack:6d} {u.overwrites:10d} {u.occupancy(c.num_warps, arch):9d}"
    )
    return f"{c.name:42s} {c.num_warps:5d} {arch:5d} {numbers}  {accesses}", [f"{c.name}: {p}" for p in problems(c, u)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES), help="default: all three")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the last of each kernel for 16, 32 and 64 bits")
    options = parser.parse_args()
    named = [i for i in (quick() if options.quick else range(len(CONFIGURATIONS))) if options.only in CONFIGURATIONS[i].name]
    jobs = [(i, arch) for i in named for arch in options.arch or ARCHITECTURES]
    failed = []
    print(f"{'configuration':42s} warps  arch  regs  spills  shared  stack overwrites occupancy  loads; stores (bits: count)")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for (_, arch), (line, wrong) in zip(jobs, pool.map(_row, *zip(*jobs, strict=True)), strict=True):
            print(line, flush=True)
            failed += wrong if arch == SHIPPED else []
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
