"""``imm doctor``: what is installed, and which implementation runs for each op, with the reason."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import click
import torch

from imm.cli.options import device_line
from imm.ops import dispatch, native
from imm.version import __version__


def op_lines(device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """One line per op (backwards and out= forms go with their op): the implementation that runs, and why not a better one."""
    request = dispatch.Request(device, dtype)
    ops = [op for op in dispatch.names() if not op.endswith(("_bwd", ".out"))]
    return [f"{op}: {dispatch.describe(op, request)}" for op in ops]


def _package(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        return version({"PIL": "pillow"}.get(name, name))
    except PackageNotFoundError:
        return "installed"


def run() -> None:
    """Run ``imm doctor``."""
    click.echo(f"imm {__version__}, Python {platform.python_version()}, {platform.platform()}")
    click.echo(f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}")
    for name in ("triton", "safetensors", "numpy", "PIL", "matplotlib", "mlxtend"):
        click.echo(f"{name}: {_package(name)}")
    info = native.build_info()
    if info is None:
        click.echo(f"native library: {native.status()}")
    else:
        click.echo(f"native library: loaded; {', '.join(f'{key} {value}' for key, value in info.items())}")
        click.echo(f"CPU kernels: {torch.backends.cpu.get_cpu_capability()}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    else:
        click.echo("cuda: no device found; everything runs on the CPU")
    forced = [f"{op}:{choice}" for op in dispatch.names() if (choice := dispatch.forced(op))]
    if forced:
        click.echo(f"{dispatch.VARIABLE} forces {', '.join(forced)}")
    for device in devices:
        click.echo(f"ops on {device_line(device)}:")
        for line in op_lines(device):
            click.echo(f"  {line}")
