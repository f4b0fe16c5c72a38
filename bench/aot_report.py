"""What every shipped Triton kernel uses, compiled without a GPU: registers, spills, shared memory, access widths.

    python bench/aot_report.py [--arch 90]

Fails where a configuration spills registers on sm_90. A new kernel adds its configurations to CONFIGURATIONS.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from imm_kernels import flow_step, noise

ARCHITECTURES = (80, 90, 100)
SHIPPED = 90
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Configuration:
    """One compilation of a kernel as its launcher asks for it.

    signature: every run-time argument's type ("*bf16", "i32"). aligned: those the launcher passes divisible by 16 in the case
    that matters. constexprs: flags and block sizes, and None for absent pointers.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """What the machine code of a configuration uses; sizes in bytes. loads, stores: global accesses by width in bits."""

    registers: int
    stack: int
    spills: int
    shared: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]


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
    aligned = tuple(a for a in ("x_ptr", "g_ptr", "g_uncond_ptr", "x_s_ptr", "D") if a in signature)
    return Configuration(name, flow_step._flow_step_fwd_kernel, signature, constexprs, flow_step.NUM_WARPS, aligned)


def _noise() -> Configuration:
    signature = {"seeds_ptr": "*i64", "normal_ptr": "*fp32", "seeds_stride": "i32", "step": "i32", "D": "i32"}
    return Configuration("noise", noise._noise_kernel, signature, {"BLOCK": noise.BLOCK}, noise.NUM_WARPS, ("normal_ptr", "D"))


_PAIRS = (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp64", "fp64"), ("fp32", "bf16"), ("bf16", "fp32"))
CONFIGURATIONS: tuple[Configuration, ...] = (
    *(_flow_step(*pair, guided, noisy) for pair in _PAIRS for guided in (False, True) for noisy in (False, True)),
    _noise(),
)


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _widths(sass: str, access: str) -> dict[int, int]:
    """How many global accesses ("LDG" or "STG") of each width in bits."""
    counts: dict[int, int] = {}
    for suffixes in re.findall(rf"\b{access}\.E((?:\.\w+)*)", sass):
        width = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", suffixes)
        bits = int(width[1]) if width else 32
        counts[bits] = counts.get(bits, 0) + 1
    return dict(sorted(counts.items()))


def usage(configuration: Configuration, arch: int = SHIPPED) -> Usage:
    """Compile a configuration for sm_<arch> and read its machine code. Needs no GPU."""
    c, names = configuration, configuration.kernel.arg_names
    source = ASTSource(
        fn=c.kernel,
        signature={name: "constexpr" if name in c.constexprs else c.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in c.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in c.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": c.num_warps})
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx_file, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx_file.write_text(ptx)
        # Assembled once more for the report: the stack of a math function's slow path is not a spill, and only this tells.
        ptxas = _TOOLS / ("ptxas-blackwell" if arch >= 100 else "ptxas")
        text = _run(ptxas, "-v", "-lineinfo", f"--gpu-name={target[1]}", ptx_file, "-o", cubin)
        sass = _run(_TOOLS / "nvdisasm", "-c", cubin)
    registers = re.search(r"Used (\d+) registers", text)
    assert registers is not None
    stack = re.search(r"(\d+) bytes cumulative stack", text)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))
    shared = compiled.metadata.shared
    return Usage(int(registers[1]), int(stack[1]) if stack else 0, spills, shared, _widths(sass, "LDG"), _widths(sass, "STG"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all three")
    options = parser.parse_args()
    failed = []
    print(f"{'configuration':34s}  arch  regs  spills  shared  stack  loads; stores (bits: count)")
    for configuration in CONFIGURATIONS:
        for arch in options.arch or ARCHITECTURES:
            u = usage(configuration, arch)
            accesses = "; ".join(", ".join(f"{bits}: {n}" for bits, n in kind.items()) for kind in (u.loads, u.stores))
            numbers = f"{u.registers:5d} {u.spills:7d} {u.shared:7d} {u.stack:6d}"
            print(f"{configuration.name:34s} {arch:5d} {numbers}  {accesses}", flush=True)
            if u.spills and arch == SHIPPED:
                failed.append(configuration.name)
    for name in failed:
        print(f"{name}: spills on sm_{SHIPPED}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
