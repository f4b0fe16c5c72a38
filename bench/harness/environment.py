"""What a figure depends on besides the code: machine, versions, commit, clocks."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.utils import collect_env

from harness.case import ROOT
from imm.ops import dispatch, native
from imm.version import __version__

_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "driver_version")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> tuple[str, bool | None]:
    """The checkout's commit and whether tracked files differ from it; IMM_COMMIT names it where git cannot."""
    revision = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if revision is None:
        return os.environ.get("IMM_COMMIT", "unknown"), None
    return revision, bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, temperature, power and driver of the GPU now; nothing on the CPU or where nvidia-smi does not answer."""
    query = ("nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", f"--id={device.index or 0}")
    text = _output(*query) if device.type == "cuda" else None
    return dict(zip(_CLOCKS, text.split(", "), strict=False)) if text else {}


def now(device: torch.device) -> dict[str, Any]:
    """What changes during a run: how many processes wanted to run in the last minute, and the clocks."""
    return {"load": round(os.getloadavg()[0], 2), "clocks": clocks(device)}


def record(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge a figure; JSON types only, and nothing that names the machine's owner."""
    system = collect_env.get_env_info()._asdict()
    request, (revision, dirty) = dispatch.Request(device, torch.float32), commit()
    cpu = re.search(r"Model name:\s*(.+)", str(system["cpu_info"]))
    packages = dict(re.findall(r"(\w+)==(\S+)", str(system["pip_packages"])))
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu[1] if cpu else platform.machine(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": packages.get("triton"),
        "imm": __version__,
        "commit": revision,
        "dirty": dirty,
        "native": native.build_info() or native.status(),
        "implementations": {op: dispatch.describe(op, request) for op in dispatch.names() if not op.endswith("_bwd")},
        **now(device),
        "system": system,
    }


def write(folder: Path, recorded: dict[str, Any]) -> None:
    """``environment.json`` of a results folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "environment.json").write_text(json.dumps(recorded, indent=2) + "\n")


def read(folder: Path) -> dict[str, Any]:
    """The ``environment.json`` of a results folder. Raises ValueError where it is not JSON, FileNotFoundError without one."""
    path = folder / "environment.json"
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"results: expected what imm bench writes, got {path}: {error}") from error
