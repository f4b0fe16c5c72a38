"""The installs, each from a clean clone of HEAD in a clean environment, and what they say about themselves.

    python tests/builds.py [pure] [native] [cuda] [fallback]

pure      IMM_BUILD_NATIVE=0: the tests of the ops pass on the reference
native    IMM_BUILD_NATIVE=1: the library is loaded, the tests of its kernels pass
cuda      with IMM_BUILD_CUDA=1 against a CUDA build of torch, fetched once where this torch has none: everything compiles and
          links, no kernel spills, the CUDA runtime is found; where this torch cannot load the result, doctor says so and the
          reference runs
fallback  nvcc fails in auto: the CPU library comes out

Needs git, a C++ compiler and an environment with the dev extra; a stage that cannot run here says why. With CI set and nvcc on
the path, a CUDA build of torch that cannot be fetched is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent
# Of the CUDA wheel: what a compiler and a linker read.
NEEDED = ("torch/include/", "torch/lib/", "torch/share/cmake/", "torch/version.py")


class Skipped(Exception):
    """A stage cannot run on this machine."""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """A command's output, both streams. Raises RuntimeError with it where the command fails."""
    # The switches of the caller are not those of the stages.
    env = {k: v for k, v in os.environ.items() if not k.startswith("IMM_") and k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}\nexit status {done.returncode}")
    return done.stdout


def expect(text: str, where: str) -> None:
    if text not in where:
        raise RuntimeError(f"expected {text!r} in\n{where}")


def environment(folder: Path) -> tuple[Path, Path]:
    """The programs and the packages of a new virtual environment there, which sees this one's libraries but no imm."""
    venv.create(folder, with_pip=True)
    # The setuptools that Python bundles may be too old for the metadata; the libraries' own one is used.
    run(folder / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", cwd=folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(f"{TORCH.parent}\n")
    return folder / "bin", site


class Install:
    """A clone of HEAD and a virtual environment that sees this one's libraries, but no imm until pip has installed it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clone = folder, folder / "clone"
        run("git", "clone", "--quiet", ROOT, self.clone)
        run("git", "checkout", "--quiet", "--detach", run("git", "rev-parse", "HEAD").strip(), cwd=self.clone)
        self.bin, self.site = environment(folder / "env")

    def pip(self, **environment: str) -> str:
        options = ("-v", "--no-deps", "--no-build-isolation", "--force-reinstall")
        environment = {"IMM_WERROR": "1", **environment}
        # Outside the clone: imm_kernels lies in its root.
        text = run(self.bin / "python", "-m", "pip", "install", *options, self.clone, cwd=self.folder, **environment)
        for line in text.splitlines():
            if line.strip().startswith(("imm: ", "IMM_")):
                print(f"  {line.strip()}")
        return text

    def doctor(self) -> str:
        """What doctor says about the native library."""
        text = run(self.bin / "imm", "doctor", cwd=self.folder)
        (line,) = (line for line in text.splitlines() if line.startswith("native library: "))
        print(f"  doctor: {line}")
        return line.removeprefix("native library: ")

    def test(self, *arguments: str) -> str:
        """Tests of the clone on the installed package; pytest's last line."""
        where = run(self.bin / "python", "-c", "import imm; print(imm.__file__)", cwd=self.folder)
        expect(str(self.site), where)
        command = ("-m", "pytest", "-c", self.clone / "pyproject.toml", "--rootdir", self.clone, "-p", "no:cacheprovider")
        paths = [self.clone / "tests" / a if a.endswith(".py") else a for a in arguments] or [self.clone / "tests"]
        return run(self.bin / "python", *command, *paths, cwd=self.folder).strip().splitlines()[-1]


def pure(folder: Path) -> str:
    install = Install(folder)
    install.pip(IMM_BUILD_NATIVE="0")
    expect("not built: this is the pure install", install.doctor())
    return install.test("test_ops.py", "test_mmd.py", "test_noise.py", "test_flow_step.py")


def native(folder: Path) -> str:
    install = Install(folder)
    install.pip(IMM_BUILD_NATIVE="1")
    expect("loaded; ", install.doctor())
    return install.test("test_native.py", "-k", "not other_instruction")


def cuda_torch() -> Path:
    """The package folder of a CUDA build of this torch."""
    return TORCH if torch.version.cuda is not None else fetched_torch(torch.__version__.partition("+")[0])


def fetched_torch(version: str, python: str = "") -> Path:
    """The package folder of the CUDA build of a torch, kept from one run to the next. python: of another version, "3.12"."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imm-ci"
    kept = caches / f"torch-{version}-cuda{python and f'-python{python}'}"
    if not kept.is_dir():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as text:
            folder = Path(text)
            print(f"  fetching the CUDA build of torch {version}, once", flush=True)
            # === takes no local version, such as +cpu.
            download = ["download", "--quiet", "--no-cache-dir", "--no-deps", f"torch==={version}", "--dest", folder]
            if python:
                download += ["--only-binary=:all:", "--python-version", python, "--platform", "manylinux_2_28_x86_64"]
            run(sys.executable, "-m", "pip", *download)
            (wheel,) = folder.glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "kept", [name for name in archive.namelist() if name.startswith(NEEDED)])
            (folder / "kept").rename(kept)
    return kept / "torch"


def cuda(folder: Path) -> str:
    if shutil.which("nvcc") is None:
        raise Skipped("nvcc not found")
    try:
        torch_folder = cuda_torch()
    except RuntimeError as error:
        if os.environ.get("CI"):
            raise
        raise Skipped(f"no CUDA build of torch could be fetched: {error}") from error
    install = Install(folder)
    install.pip(IMM_BUILD_NATIVE="1", IMM_BUILD_CUDA="1", IMM_TORCH_DIR=str(torch_folder))
    built = json.loads((install.site / "imm" / "_native" / "build.json").read_text())
    if not built["cuda"]:
        raise RuntimeError(f"expected a library with CUDA, got {built}")
    # The program and the library find the CUDA runtime of the package that torch comes with.
    runtime = f"nvidia-cuda-runtime=={built['cuda'].partition('.')[0]}.*"
    run(install.bin / "python", "-m", "pip", "install", "--quiet", "--no-deps", runtime)
    for name in ("imm_generate", "libimm_native.so"):
        found = [line for line in run("ldd", install.site / "imm" / "_native" / name).splitlines() if "libcudart" in line]
        expect("/nvidia/", found[0])
    loads = built["torch"] == torch.__version__
    expect("loaded; " if loads else f"built for torch {built['torch']}, this is torch {torch.__version__}", install.doctor())
    result = install.test("test_noise.py", "test_flow_step.py")
    print(run(sys.executable, install.clone / "tests" / "cuda_build.py", "--torch-dir", torch_folder.parent))
    return result


def fallback(folder: Path) -> str:
    # This torch, but built for CUDA as far as version.py says, and an nvcc that fails.
    (folder / "torch").mkdir()
    for name in ("include", "lib", "share"):
        (folder / "torch" / name).symlink_to(TORCH / name)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{torch.__version__}'\ncuda = '13.0'\n")
    (folder / "tools").mkdir()
    (folder / "tools" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "tools" / "nvcc").chmod(0o755)
    install = Install(folder)
    path = f"{folder / 'tools'}{os.pathsep}{os.environ['PATH']}"
    text = install.pip(PATH=path, IMM_BUILD_NATIVE="auto", IMM_TORCH_DIR=str(folder / "torch"))
    expect("without CUDA (configuring the native library with CUDA failed)", text)
    expect("loaded; ", install.doctor())
    return install.test("test_noise.py")


STAGES = {stage.__name__: stage for stage in (pure, native, cuda, fallback)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; default: all")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"expected {', '.join(STAGES)}, got {', '.join(unknown)}")
    if run("git", "status", "--porcelain"):
        print("HEAD is built: what is not committed is left out")
    results = []
    for name in options.stages or STAGES:
        print(f"{name}:", flush=True)
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                result = STAGES[name](Path(folder).resolve())
        except Skipped as reason:
            result = f"SKIPPED: {reason}"
        except RuntimeError as error:
            print(error)
            result = "FAILED"
        results.append(f"{name:9s} {time.monotonic() - start:5.0f} s  {result}")
    print("\n".join(["", *results]))
    return 1 if any(line.endswith("FAILED") for line in results) else 0


if __name__ == "__main__":
    sys.exit(main())
