"""Builds the native library (CMakeLists.txt is its definition) with CMake and Ninja; metadata is in pyproject.toml.

IMM_BUILD_NATIVE=auto|0|1  auto builds where the tools are and falls back to the pure install; 1 fails where it cannot.
IMM_BUILD_CUDA=auto|0|1    auto builds csrc/cuda where torch is a CUDA build and nvcc is there; no GPU is looked for.
IMM_WERROR=0|1             1 makes the compilers' warnings errors, as CI does.
IMM_TORCH_DIR              another torch package folder to compile and link against, such as an unpacked CUDA wheel.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
IN_PLACE = ROOT / "python" / "imm" / "_native"
BUILT = ("*.so", "imm_generate", "build.json")


def switch(name: str, values: tuple[str, ...] = ("auto", "0", "1")) -> str:
    """A setting; its first value where it is not set."""
    value = os.environ.get(name, values[0])
    if value not in values:
        raise SystemExit(f"{name}: expected {', '.join(values[:-1])} or {values[-1]}, got {value!r}")
    return value


def tool(*names: str) -> str | None:
    """A program on the path or beside this Python (pip's cmake and ninja)."""
    path = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def torch_folder() -> Path | None:
    if given := os.environ.get("IMM_TORCH_DIR"):
        return Path(given).resolve()
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def missing() -> str | None:
    """What the native build lacks, or None."""
    folder = torch_folder()
    if folder is None or not (folder / "include").is_dir():
        return "torch is not here (pip: --no-build-isolation)"
    names = {"CMake": ("cmake",), "Ninja": ("ninja",), "a C++ compiler": (os.environ.get("CXX", "c++"), "g++", "clang++")}
    absent = [what for what, candidates in names.items() if tool(*candidates) is None]
    return f"{' and '.join(absent)} not found" if absent else None


def cuda() -> tuple[bool, str]:
    """Whether to build csrc/cuda, and why."""
    choice = switch("IMM_BUILD_CUDA")
    version: dict[str, object] = {}
    exec((torch_folder() / "version.py").read_text(), version)
    if choice == "0":
        return False, "IMM_BUILD_CUDA=0"
    if version["cuda"] is None:
        reason = f"torch {version['__version__']} is built without CUDA"
    elif tool("nvcc") is None:
        reason = "nvcc not found"
    else:
        said = re.search(r"release (\d+)\.", subprocess.getoutput(f"'{tool('nvcc')}' --version"))
        if said is None or said[1] == str(version["cuda"]).partition(".")[0]:  # an nvcc that does not say fails in the build
            return True, f"torch is built for CUDA {version['cuda']} and nvcc is {tool('nvcc')}"
        # Both CUDA runtimes would be loaded.
        reason = f"torch is built for CUDA {version['cuda']} and nvcc is of CUDA {said[1]}"
    if choice == "1":
        raise SystemExit(f"IMM_BUILD_CUDA=1, but {reason}")
    return False, reason


def say(text: str) -> None:
    print(f"imm: {text}", file=sys.stderr, flush=True)


def clear(folder: Path) -> None:
    for path in [path for pattern in BUILT for path in folder.glob(pattern)]:
        path.unlink()


class BuildNative(build_ext):
    """build_ext that asks CMake for everything; files go to imm/_native of the wheel or, for an editable one, of the tree."""

    def folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return IN_PLACE if in_place else Path(self.build_lib).resolve() / "imm" / "_native"

    def run(self) -> None:
        clear(self.folder())
        if absent := missing():
            if switch("IMM_BUILD_NATIVE") == "1":
                raise SystemExit(f"IMM_BUILD_NATIVE=1, but {absent}")
            return self.pure(absent)
        with_cuda, why = cuda()
        for attempt in [True, False] if with_cuda else [False]:
            say(f"native build against {torch_folder()}, {'with' if attempt else 'without'} CUDA ({why})")
            try:
                return self.cmake(attempt)
            except RuntimeError as error:
                clear(self.folder())
                name = "IMM_BUILD_CUDA" if attempt else "IMM_BUILD_NATIVE"
                if switch(name) == "1":
                    raise SystemExit(f"{name}=1, but {error}") from error
                why = str(error)
        self.pure(why)

    def pure(self, why: str) -> None:
        """Go without; build.json keeps the reason for imm doctor, since pip hides what a build prints."""
        say(f"pure install: {why}; IMM_BUILD_NATIVE=1 makes this an error")
        self.folder().mkdir(parents=True, exist_ok=True)
        (self.folder() / "build.json").write_text(json.dumps({"reason": why}))

    def cmake(self, with_cuda: bool) -> None:
        options = {
            "IMM_TORCH_DIR": torch_folder(),
            "IMM_WITH_CUDA": "ON" if with_cuda else "OFF",
            "IMM_WERROR": "ON" if switch("IMM_WERROR", ("0", "1")) == "1" else "OFF",
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
        }
        # A folder per configuration: CMake keeps the compilers that it found first.
        cached = [tool("nvcc"), *(os.environ.get(name) for name in ("CXX", "CXXFLAGS", "CUDAARCHS"))]
        key = sha256(repr((options, cached)).encode()).hexdigest()[:12]
        build = ROOT / "build" / f"native-{key}"
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        for what, *arguments in (
            ("configuring", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items())),
            ("compiling", "--build", build, "--parallel", jobs),
            ("installing", "--install", build, "--prefix", self.folder()),
        ):
            if subprocess.run([tool("cmake"), *arguments], check=False).returncode:
                raise RuntimeError(f"{what} the native library {'with' if with_cuda else 'without'} CUDA failed")

    def get_outputs(self) -> list[str]:
        return [str(path) for pattern in BUILT for path in self.folder().glob(pattern)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


native = switch("IMM_BUILD_NATIVE") != "0"
if not native:
    clear(IN_PLACE)
    say("pure install: IMM_BUILD_NATIVE=0")
setup(**({"ext_modules": [Extension("imm._native._C", [])], "cmdclass": {"build_ext": BuildNative}} if native else {}))
