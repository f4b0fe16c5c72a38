"""Loads the native library, once; importing this never raises.

``build.json`` beside the library says what it was built for, or why it was not, and is read first: a library for another torch
is not loaded.
``IMM_NATIVE=0`` asks for none; ``IMM_NATIVE_DIR`` names another folder to load from (a sanitizer build).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent


def _folder() -> Path:
    return Path(os.environ.get("IMM_NATIVE_DIR") or _HERE.parent / "_native")


def refusal(folder: Path) -> str | None:
    """Why the library in ``folder`` must not be loaded, or None."""
    if os.environ.get("IMM_NATIVE") == "0":
        return "IMM_NATIVE=0 asks for none"
    try:
        built = json.loads((folder / "build.json").read_text())
        if "reason" in built:
            return f"not built: {built['reason']}"
        torch_version, schemas = built["torch"], built["schemas"]
    except FileNotFoundError:
        return "not built: this is the pure install"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"build.json is unreadable ({error!r}); rebuild"
    if torch_version != torch.__version__:
        return f"built for torch {torch_version}, this is torch {torch.__version__}; rebuild"
    if schemas != hashlib.sha256((_HERE / "schemas.py").read_bytes()).hexdigest():
        return "built from another list of op schemas; rebuild"
    return None


def _load() -> tuple[str | None, ModuleType | None]:
    folder = _folder()
    reason = refusal(folder)
    if reason is not None:
        return reason, None
    try:
        torch.ops.load_library(str(folder / "libimm_native.so"))
        path = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        spec = importlib.util.spec_from_file_location("imm._native._C", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is not an extension module of this Python")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the loader says, imm works without
        return f"not loadable: {error}", None
    return None, module


_STATUS, _MODULE = _load()


def status() -> str | None:
    """None where the native library is loaded, else the reason why not."""
    return _STATUS


def module() -> ModuleType | None:
    """The extension module of the loaded library: what of it is not an op."""
    return _MODULE


def program(name: str) -> Path | None:
    """A program that was built beside the loaded library, or None."""
    path = _folder() / name
    return path if _STATUS is None and path.is_file() else None


def build_info() -> dict[str, Any] | None:
    """What the loaded library was built for and with: torch, cuda (or None), capabilities, compiler, flags."""
    return None if _MODULE is None else _MODULE.build_info()
