"""Builds the native library into python/imm/_native with whatever tools there are; installs nothing.

    python bench/build_in_place.py [--cuda] [--out FOLDER] [--by-hand]      (IMM_TORCH_DIR as in setup.py)

setup.py where it can run (setuptools, CMake, Ninja); else, or where that fails, the same steps by hand with the compilers
alone; where CUDA cannot be built either way, the library without it, which is status 1. CMakeLists.txt is the definition: the
flags here that decide numbers (no contraction, one object per instruction set) are its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from cuda_build import run, toolkit  # noqa: E402

CAPABILITIES = {
    "DEFAULT": (),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
}


def lacking() -> list[str]:
    """What setup.py needs and is not here."""
    tools = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    return tools + ["setuptools"] * (importlib.util.find_spec("setuptools") is None)


def with_setup(cuda: bool) -> bool:
    """Whether setup.py built the library."""
    environment = {**os.environ, "IMM_BUILD_NATIVE": "1", "IMM_BUILD_CUDA": "1" if cuda else "0"}
    if cuda and torch.cuda.is_available():
        environment.setdefault("CUDAARCHS", "".join(map(str, torch.cuda.get_device_capability())))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


def by_hand(cuda: bool, out: Path) -> None:
    """Compile every source and link. Raises RuntimeError with the compiler's output."""
    compiler, package = os.environ.get("CXX", "c++"), Path(os.environ.get("IMM_TORCH_DIR") or Path(torch.__file__).parent)
    schemas = ROOT / "python" / "imm" / "ops" / "schemas.py"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, ROOT / "csrc/tools/schemas_header.py", schemas, folder / "imm_schemas.h")
        includes = [f"-I{folder}", f"-I{ROOT / 'csrc'}"]
        includes += [f"-isystem{package / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        common = [
            "-std=c++20",
            "-O3",
            "-fPIC",
            "-fopenmp",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-Wno-maybe-uninitialized",
        ]
        common += [abi, *includes]
        x86 = os.uname().machine in ("x86_64", "AMD64")
        capabilities = CAPABILITIES if x86 else {"DEFAULT": ()}
        common += ["-DIMM_X86_CAPABILITIES"] * x86
        jobs: list[tuple[list[str | Path], Path]] = []
        for source in sorted(ROOT.glob("csrc/*.cpp")):
            if source.name != "python.cpp":
                jobs.append(([compiler, *common, "-c", source], folder / f"{source.stem}.o"))
        for capability, flags in capabilities.items():
            named = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", f"-DHAVE_{capability}_CPU_DEFINITION"]
            for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
                jobs.append(([compiler, *common, *named, *flags, "-c", source], folder / f"{source.stem}.{capability}.o"))
        libraries, torch_libraries, version = [], ["c10", "torch_cpu", "torch"], ""
        if cuda:
            nvcc = shutil.which("nvcc") or "nvcc"
            toolkit_includes, libraries, _ = toolkit(nvcc)
            arch = "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "90"
            torch_libraries += ["c10_cuda", "torch_cuda", "cudart"]
            version = str(torch.version.cuda)
            device_flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-lineinfo", "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}"]
            for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
                jobs.append(([nvcc, *device_flags, "-Xptxas=-v", "-c", source], folder / f"{source.stem}.cuda.o"))
            for source in sorted(ROOT.glob("csrc/cuda/*.cpp")):
                jobs.append(([compiler, *common, *toolkit_includes, "-c", source], folder / f"{source.stem}.host.o"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for text in pool.map(lambda job: run(*job[0], "-o", job[1]), jobs):
                print(text, end="")
        # The baseline comes before the instruction sets, so that the linker keeps its inline functions.
        objects = [target for _, target in jobs]
        search = [f"-L{package / 'lib'}", *libraries]
        shared = [compiler, "-shared", "-fopenmp", "-Wl,--no-as-needed"]
        run(*shared, "-o", folder / "libimm_native.so", *objects, *search, *(f"-l{name}" for name in torch_libraries))
        texts = {"TORCH": torch.__version__, "CUDA": version, "CAPABILITIES": " ".join(capabilities)}
        texts |= {"COMPILER": compiler, "FLAGS": "by hand"}
        definitions = [f'-DIMM_BUILD_{key}="{text}"' for key, text in texts.items()]
        module = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        python = f"-I{sysconfig.get_path('include')}"
        linked = [f"-L{folder}", "-limm_native", "-Wl,-rpath,$ORIGIN", *search]
        linked += [f"-l{name}" for name in (*torch_libraries, "torch_python")]
        run(*shared, *common, python, *definitions, ROOT / "csrc/python.cpp", "-o", folder / module, *linked)
        digest = hashlib.sha256(schemas.read_bytes()).hexdigest()
        (folder / "build.json").write_text(json.dumps({"torch": torch.__version__, "cuda": version, "schemas": digest}))
        out.mkdir(parents=True, exist_ok=True)
        for file in ("libimm_native.so", module, "build.json"):
            shutil.copy(folder / file, out / file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="with csrc/cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "python" / "imm" / "_native", help="with --by-hand only")
    parser.add_argument("--by-hand", action="store_true", help="without setup.py even where it can run")
    options = parser.parse_args()
    absent = lacking()
    if options.by_hand or absent:
        print(f"without setup.py: {'asked for' if options.by_hand else ', '.join(absent) + ' not found'}", flush=True)

    def hand_built(cuda: bool) -> bool:
        try:
            by_hand(cuda, options.out)
        except (RuntimeError, OSError, KeyError) as error:
            print(error, flush=True)
            return False
        return True

    ways = {"setup.py": with_setup} if not (options.by_hand or absent) else {}
    ways["by hand"] = hand_built
    for cuda in (True, False) if options.cuda else (False,):
        for name, way in ways.items():
            what = f"{name}, {'with' if cuda else 'without'} CUDA"
            if way(cuda):
                print(f"built: {what}")
                return 0 if cuda == options.cuda else 1
            print(f"the build failed: {what}", flush=True)
    print("everything runs without the native library")
    return 1


if __name__ == "__main__":
    sys.exit(main())
