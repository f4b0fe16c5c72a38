"""What a figure depends on besides the code: machine, versions, commit, clocks."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from imm.ops import dispatch, native
from imm.version import __version__

_ROOT = Path(__file__).resolve().parents[3]
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> tuple[str, bool | None]:
    """The checkout's commit and whether tracked files differ from it; IMM_COMMIT names it where git cannot."""
    revision = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if revision is None:
        return os.environ.get("IMM_COMMIT", "unknown"), None
    return revision, bool(_output("git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no"))


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks, temperature, power and driver of the GPU now; None on the CPU or where nvidia-smi does not answer."""
    if device.type != "cuda":
        return None
    text = _output("nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", f"--id={device.index or 0}")
    return dict(zip(_CLOCKS, (value.strip() for value in text.split(",")), strict=False)) if text else None


def load() -> float:
    """How many processes wanted to run in the last minute."""
    return round(os.getloadavg()[0], 2)


def after(device: torch.device) -> dict[str, Any]:
    """What may have changed since the first row."""
    return {"load": load(), "clocks": clocks(device)}


def _triton() -> str | None:
    try:
        return version("triton") if importlib.util.find_spec("triton") else None
    except PackageNotFoundError:
        return "unknown"


def record(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge a figure; JSON types only, and nothing that names the machine's owner."""
    revision, dirty = commit()
    request = dispatch.Request(device, torch.float32)
    cuda: dict[str, Any] | None = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cuda = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "runtime": torch.version.cuda,
            "before": clocks(device),
        }
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": cuda["name"] if cuda else cpu_model(),
        "device": device.type,
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": load(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "imm": __version__,
        "commit": revision,
        "dirty": dirty,
        "native": native.build_info() or native.status(),
        "implementations": {op: dispatch.describe(op, request) for op in dispatch.names() if not op.endswith("_bwd")},
        "cuda": cuda,
    }


def write(folder: Path, recorded: dict[str, Any]) -> None:
    """``environment.json`` of a results folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(recorded, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The ``environment.json`` of a results folder. Raises ValueError where it is not JSON, FileNotFoundError without one."""
    path = folder / "environment.json"
    try:
        recorded: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"results: expected what imm bench writes, got {path}: {error}") from error
    return recorded
