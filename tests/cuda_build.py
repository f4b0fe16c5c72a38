"""Compiles and links the CUDA sources without a GPU, and reports what every kernel uses.

    pip download --no-deps torch===VERSION -d DIR && (cd DIR && unzip -q torch-*.whl)
    python tests/cuda_build.py --torch-dir DIR

Every source under csrc/cuda is compiled for sm_90 against the headers and libraries of an unpacked CUDA torch wheel and linked
into one shared library in a temporary folder. Fails where something does not compile or link (device code that includes torch
headers does not), where a kernel spills registers, or where a kernel that should move 16 bytes per access does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from builds import run

ROOT = Path(__file__).resolve().parents[1]
STANDARD = "-std=c++20"
# (kernel, SASS that it must contain, SASS that it must not): the forms that run on aligned rows. Coefficients and seeds are
# 64-bit loads, and the trigonometric tables of noise 128-bit ones, so the absence of narrow accesses is asserted as well.
NARROW_LOAD, NARROW_STORE = r"LDG\.E(\.[US]?(8|16))?(\.CONSTANT)? ", r"STG\.E(?!\.128)"
WIDE = (
    (r"^flow_step_fwd_kernel<.*, true>", (r"LDG\.E\.128", r"STG\.E\.128"), (NARROW_LOAD, NARROW_STORE)),
    (r"^flow_step_bwd_kernel<.*, true>", (r"LDG\.E\.128", r"STG\.E\.128"), (NARROW_LOAD, NARROW_STORE)),
    (r"^noise_kernel<true>", (r"STG\.E\.128",), (NARROW_STORE,)),
)
# What our library may need of torch: nothing that pulls in further parts of the toolkit.
TORCH_LIBRARIES = ("torch_cpu", "torch_cuda", "c10", "c10_cuda")


@dataclass
class Kernel:
    """One row of the report; sizes in bytes."""

    name: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0


def toolkit(nvcc: str) -> tuple[list[str], list[str], Path]:
    """Include flags, library flags and root of the toolkit, as nvcc says: the nvcc on the path may be a wrapper."""
    text = run(nvcc, "--dryrun", "x.cu")
    settings = dict(re.findall(r"^#\$ (\w+)=\s*(.*)$", text, re.MULTILINE))
    includes = re.findall(r'"-I([^"]+)"', settings["INCLUDES"])
    libraries = re.findall(r'"-L([^"]+)"', settings["LIBRARIES"])
    root = Path(settings["TOP"]).resolve()
    return [f"-isystem{i}" for i in includes], [f"-L{path}" for path in libraries if Path(path).is_dir()], root


def cuobjdump(root: Path) -> Path:
    """The toolkit's cuobjdump, or the one inside the triton package."""
    candidates = [root / "bin" / "cuobjdump"]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"cuobjdump: expected one of {[str(c) for c in candidates]}; install the toolkit's or triton")


def demangle(text: str) -> str:
    """C++ names as in the source, without the namespaces that every kernel has."""
    plain = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    return plain.replace("imm::cuda::", "").replace("(anonymous namespace)::", "")


def short(name: str) -> str:
    """A demangled kernel's name and template arguments, without result and parameters."""
    return re.sub(r"\(.*\)$", "", name.strip()).removeprefix("void ")


def resources(ptxas: str) -> list[Kernel]:
    """The kernels of a ``-Xptxas -v`` output; a kernel's device functions count towards its spills."""
    kernels: list[Kernel] = []
    for line in demangle(ptxas).splitlines():
        if entry := re.search(r"Compiling entry function '(.+)' for", line):
            kernels.append(Kernel(short(entry[1])))
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].spill_stores += int(frame[2])
            kernels[-1].spill_loads += int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(used[1])
            stack = re.search(r"(\d+) bytes cumulative stack", line)
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1].stack, kernels[-1].shared = (int(m[1]) if m else 0 for m in (stack, shared))
    return kernels


def narrow(sass: str) -> list[str]:
    """Which kernels of WIDE break their rule, or are not there at all."""
    functions = (part.partition("\n") for part in demangle(sass).split("Function : ")[1:])
    bodies = {short(name): body for name, _, body in functions}
    wrong = []
    for pattern, needed, forbidden in WIDE:
        names = [name for name in bodies if re.search(pattern, name)]
        wrong += [f"no kernel matches {pattern}"] * (not names)
        for name in names:
            wrong += [f"{name}: expected {i}" for i in needed if not re.search(i, bodies[name])]
            wrong += [f"{name}: expected no {i}" for i in forbidden if re.search(i, bodies[name])]
    return wrong


def build(torch_dir: Path, folder: Path, nvcc: str, compiler: str) -> tuple[list[Kernel], list[str], Path]:
    """Compile and link everything into ``folder``; the kernels, what is wrong with their accesses, and the library."""
    includes, libraries, root = toolkit(nvcc)
    torch_root = torch_dir / "torch"
    if not (torch_root / "lib" / "libtorch_cuda.so").is_file():
        raise FileNotFoundError(f"{torch_dir}: expected an unpacked CUDA wheel with torch/lib/libtorch_cuda.so")
    torch_includes = [f"-isystem{torch_root / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    host = [*torch_includes, *includes]

    def compile_one(source: Path) -> tuple[Path, str]:
        out = folder / f"{'_'.join(source.relative_to(ROOT).parts)}.o"
        if source.suffix == ".cu":
            # No torch headers on this line: device code must not need them.
            flags = [STANDARD, "-O3", "-arch=sm_90", "-lineinfo", "-Xcompiler=-fPIC", "-Xptxas=-v", "-Werror=all-warnings"]
            return out, run(nvcc, *flags, "-c", source, "-o", out)
        return out, run(compiler, STANDARD, "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", *host, "-c", source, "-o", out)

    sources = [*sorted(ROOT.glob("csrc/cuda/*.cpp")), *sorted(ROOT.glob("csrc/cuda/*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "libimm.so"
    names = [f"-l{name}" for name in (*TORCH_LIBRARIES, "cudart")]
    # Every symbol of ours must be found; what torch's libraries need in turn is theirs.
    checks = ["-Wl,--no-undefined", "-Wl,--allow-shlib-undefined", "-Wl,--no-warnings"]
    run(compiler, "-shared", "-o", library, *(o for o, _ in objects), f"-L{torch_root / 'lib'}", *libraries, *checks, *names)
    kernels = [k for source, (_, text) in zip(sources, objects, strict=True) if source.suffix == ".cu" for k in resources(text)]
    return kernels, narrow(run(cuobjdump(root), "-sass", library)), library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-dir", type=Path, required=True, help="folder of an unpacked CUDA torch wheel")
    parser.add_argument("--nvcc", default=shutil.which("nvcc"), help="default: the one on the path")
    parser.add_argument("--compiler", default=os.environ.get("CXX", "c++"), help="host compiler; default: $CXX or c++")
    options = parser.parse_args()
    if options.nvcc is None:
        parser.error("nvcc: expected on the path or as --nvcc")
    with tempfile.TemporaryDirectory() as folder:
        try:
            kernels, wrong, library = build(options.torch_dir, Path(folder), options.nvcc, options.compiler)
        except (RuntimeError, FileNotFoundError) as error:
            print(error, file=sys.stderr)
            return 1
        print(f"linked {len(kernels)} kernels into {library.name}, {library.stat().st_size / 1e6:.1f} MB")
    print(f"{'kernel':72s} {'regs':>5s} {'spill st/ld':>12s} {'shared':>7s} {'stack':>6s}")
    for k in sorted(kernels, key=lambda k: k.name):
        print(f"{k.name:72s} {k.registers:5d} {f'{k.spill_stores}/{k.spill_loads}':>12s} {k.shared:7d} {k.stack:6d}")
    wrong += [f"{k.name}: spills" for k in kernels if k.spill_stores or k.spill_loads]
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
