"""The wheel and the sdist, built and used in a clean environment outside the checkout; the build switches.

tests/builds.py has the whole installs, each from a clean clone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import builds
import pytest
import torch

from imm.ops.native import refusal
from imm.version import __version__

ROOT = Path(__file__).parent.parent

PROGRAM = """
import pathlib, torch, imm, imm_kernels
assert "site-packages" in imm.__file__ and "site-packages" in imm_kernels.__file__, (imm.__file__, imm_kernels.__file__)
flow_map = imm.FlowMap(imm.networks.UNet())
loss, stats = imm.IMMObjective(flow_map)(torch.randn(8, 1, 16, 16) * 0.5, torch.arange(8))
loss.backward()
imm.checkpoints.save("net.safetensors", flow_map)
print(imm.__version__)
"""


def copied(tree: Path) -> Path:
    """A copy of the sources there."""
    ignore = shutil.ignore_patterns("build", ".git", ".venv*", "runs", "*.so", "build.json", "*.egg-info")
    return Path(shutil.copytree(ROOT, tree, ignore=ignore))


# A native wheel takes minutes; tests/builds.py has a native install from a clean clone.
@pytest.fixture(scope="module", params=["0", pytest.param("1", marks=pytest.mark.full)], ids=["pure", "native"])
def native(request) -> str:
    """What IMM_BUILD_NATIVE is."""
    return request.param


@pytest.fixture(scope="module")
def distributions(native, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    tree = copied(folder / "tree")  # a pure build clears the library of the tree that it is made from
    builds.run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree, IMM_BUILD_NATIVE=native)
    return folder


def test_contents(native, distributions) -> None:
    (wheel,), (sdist,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    assert wheel.name.startswith(f"imm_kernels-{__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for name in ("imm/__init__.py", "imm/ops/mmd.py", "imm/cli/demo.py", "imm/serving/page.html", "imm_kernels/__init__.py"):
        assert name in names
    assert any(name.endswith(".so") for name in names) == (native == "1")
    tops = {name.split("/")[0] for name in names}
    assert tops == {"imm", "imm_kernels", f"imm_kernels-{__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    for name in ("LICENSE", "pyproject.toml", "setup.py", "python/imm/__init__.py", "imm_kernels/__init__.py"):
        assert f"imm_kernels-{__version__}/{name}" in members


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The programs of a clean environment."""
    return builds.environment(tmp_path_factory.mktemp("clean") / "env")[0]


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_install_in_a_clean_environment(pattern, native, distributions, programs, tmp_path) -> None:
    (distribution,) = distributions.glob(pattern)
    run = lambda name, *arguments, **variables: builds.run(programs / name, *arguments, cwd=tmp_path, **variables)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    run("python", "-m", "pip", "install", *options, distribution, IMM_BUILD_NATIVE=native)
    assert run("python", "-c", PROGRAM).strip().endswith(__version__)
    assert (tmp_path / "net.safetensors").exists()
    assert "mmd_loss: " in run("imm", "doctor")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, and beside it an nvcc that fails and a torch that says it is built for CUDA."""
    folder = tmp_path_factory.mktemp("switches")
    copied(folder / "tree")
    (folder / "bin").mkdir()
    (folder / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    (folder / "torch" / "include").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text("__version__ = '1.0+cu1'\ncuda = '1.0'\n")
    return folder / "tree"


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """build_ext in the tree with a compiler that fails."""
    path = f"{tree.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "CXX": "/bin/false", "IMM_BUILD_CUDA": "auto", "IMM_TORCH_DIR": "", **environment}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


def test_a_broken_compiler(tree, monkeypatch) -> None:
    """auto gives the pure install and its reason, which stays for doctor; 1 is an error; 0 builds nothing."""
    monkeypatch.delenv("IMM_NATIVE", raising=False)
    native = tree / "python" / "imm" / "_native"
    reason = "configuring the native library without CUDA failed"
    auto = build(tree, IMM_BUILD_NATIVE="auto", IMM_BUILD_CUDA="0")
    assert auto.returncode == 0, auto.stderr
    assert f"imm: pure install: {reason}; IMM_BUILD_NATIVE=1 makes this an error" in auto.stderr
    assert refusal(native) == f"not built: {reason}"
    demanded = build(tree, IMM_BUILD_NATIVE="1", IMM_BUILD_CUDA="0")
    assert demanded.returncode != 0
    assert f"IMM_BUILD_NATIVE=1, but {reason}" in demanded.stderr
    none = build(tree, IMM_BUILD_NATIVE="0")
    assert none.returncode == 0, none.stderr
    assert "imm: pure install: IMM_BUILD_NATIVE=0" in none.stderr
    assert [path.name for path in native.iterdir()] == ["__init__.py"]
    assert "IMM_BUILD_NATIVE: expected auto, 0 or 1, got 'yes'" in build(tree, IMM_BUILD_NATIVE="yes").stderr
    assert "IMM_WERROR: expected 0 or 1, got 'yes'" in build(tree, IMM_BUILD_CUDA="0", IMM_WERROR="yes").stderr


@pytest.mark.parametrize(
    ("nvcc", "tried", "reason"),
    [
        ("exit 1", [", with CUDA (torch is built for CUDA 1.0 and nvcc is"], "configuring the native library with CUDA failed"),
        # Two CUDA runtimes in one process: nothing is compiled with this one.
        ("echo 'Cuda compilation tools, release 13.0, V13.0.88'", [], "torch is built for CUDA 1.0 and nvcc is of CUDA 13"),
    ],
)
def test_an_nvcc_that_is_broken_or_of_another_cuda(nvcc, tried, reason, tree) -> None:
    """auto goes on without CUDA, for a reason; 1 is an error, as it is for a torch without CUDA."""
    (tree.parent / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
    torch_folder = str(tree.parent / "torch")
    auto = build(tree, IMM_BUILD_NATIVE="auto", IMM_TORCH_DIR=torch_folder)
    *before, last = [line for line in auto.stderr.splitlines() if line.startswith("imm: native build")]
    assert last.endswith(f"without CUDA ({reason})"), auto.stderr
    assert all(text in line for text, line in zip(tried, before, strict=True)), auto.stderr
    demanded = build(tree, IMM_BUILD_CUDA="1", IMM_TORCH_DIR=torch_folder)
    assert demanded.returncode != 0
    assert f"IMM_BUILD_CUDA=1, but {reason}" in demanded.stderr
    if torch.version.cuda is None:
        assert "IMM_BUILD_CUDA=1, but torch" in build(tree, IMM_BUILD_CUDA="1").stderr
