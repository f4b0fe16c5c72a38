"""The wheel and the sdist, built and used in a clean environment outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_contents(distributions) -> None:
    (wheel,), (sdist,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    assert wheel.name.startswith("imm_kernels-0.1.0-")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for name in ("imm/__init__.py", "imm/ops/mmd.py", "imm/cli/demo.py", "imm_kernels/__init__.py"):
        assert name in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"imm", "imm_kernels", "imm_kernels-0.1.0.dist-info"}
    with tarfile.open(sdist) as archive:
        members = archive.getnames()
    for name in ("LICENSE", "pyproject.toml", "setup.py", "python/imm/__init__.py", "imm_kernels/__init__.py"):
        assert f"imm_kernels-0.1.0/{name}" in members


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment that sees this one's libraries but not this checkout."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=True)
    # Python 3.11 bundles a setuptools that is too old for the metadata; the libraries' own one is used.
    run([folder / "bin" / "python", "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], folder)
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return folder / "bin"


def run(command: list[str | Path], folder: Path) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_install_in_a_clean_environment(pattern, distributions, environment, tmp_path) -> None:
    (distribution,) = distributions.glob(pattern)
    python = environment / "python"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--force-reinstall"]
    run([python, "-m", "pip", "install", *options, distribution], tmp_path)
    assert run([python, "-c", PROGRAM], tmp_path).strip() == "0.1.0"
    assert (tmp_path / "net.safetensors").exists()
    assert "mmd_loss: " in run([environment / "imm", "doctor"], tmp_path)
