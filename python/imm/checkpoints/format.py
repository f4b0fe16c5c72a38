"""Our file: safetensors, with the settings as JSON under one metadata key."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imm.files import replacing
from imm.flow_map import FlowMap
from imm.networks import NETWORKS
from imm.ops.dtypes import DTYPES
from imm.weights import own_names, plain_names, unwrapped

FORMAT_VERSION = 1
_KEY = "imm"


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message says what was expected and what came."""


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors and settings to one safetensors file, atomically: the old file or the new one, never a part.

    Args:
        path: the file; its folder must exist. tensors: any dtypes and devices. settings: what JSON can hold.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    target = Path(path)
    metadata = {_KEY: json.dumps({"format_version": FORMAT_VERSION, **settings}, allow_nan=False)}
    plain = _apart(tensors)
    try:
        with replacing(target) as part:
            save_file(plain, part, metadata=metadata)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in memory of its own, as safetensors requires."""
    out: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        out[name] = plain
    return out


def read_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_file` wrote.

    Args:
        path: the file. kind: what the settings must call it ("flow_map", "training").

    Returns:
        Tensors on the CPU, and the settings.

    Raises:
        CheckpointError: a missing, truncated or foreign file, another kind, or a newer format.
    """
    settings = read_settings(path, kind)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file, got: {error}") from error
    return tensors, settings


def read_settings(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """:func:`read_file` without the tensors."""
    source = Path(path)
    if not source.is_file():
        raise CheckpointError(f"{source}: expected a checkpoint file, found none")
    if not os.access(source, os.R_OK):
        raise CheckpointError(f"{source}: expected a file that can be read, got one without permission")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        found = f"got: {error}"
        with source.open("rb") as file:
            if file.read(4).startswith((b"\x80", b"PK\x03\x04")):  # as pickle.dump and torch.save begin
                found = "got a pickle; imm import converts published checkpoints"
        raise CheckpointError(f"{source}: expected a whole safetensors file, {found}") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{source}: expected a checkpoint of imm, got a safetensors file without its settings")
    try:
        settings = json.loads(metadata[_KEY])
        version = settings["format_version"]
        found = settings["kind"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source}: expected readable settings, got: {error!r}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(f"{source}: expected format version {FORMAT_VERSION} or older, got {version}")
    if found != kind:
        raise CheckpointError(f"{source}: expected a checkpoint of kind {kind!r}, got {found!r}")
    return settings


def describe(flow_map: FlowMap) -> dict[str, Any]:
    """The settings that :func:`build` makes the flow map from; a network of another class is called "custom"."""
    network = unwrapped(flow_map.network)
    name = next((n for n, cls in NETWORKS.items() if type(network) is cls), "custom")
    settings = dict(network.settings) if name != "custom" else {"num_classes": flow_map.num_classes}  # type: ignore[arg-type]
    return {"network": {"name": name, **settings}, "dtype": _name(flow_map.network_dtype), "flow_map": flow_map.settings}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def build(settings: Mapping[str, Any], network: nn.Module | None = None) -> FlowMap:
    """A flow map with fresh weights from :func:`describe`'s settings; ``network`` where they say "custom".

    Raises:
        CheckpointError: settings that name no known network or do not fit it.
    """
    try:
        arguments = dict(settings["network"])
        name = arguments.pop("name")
        if network is None:
            if name not in NETWORKS:
                raise CheckpointError(f"network: expected one of {sorted(NETWORKS)} or the argument network=, got {name!r}")
            network = NETWORKS[name](**arguments)
        dtype = {_name(dtype): dtype for dtype in DTYPES}[settings["dtype"]]
        network = network.to(dtype)
        return FlowMap(network, **settings["flow_map"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"expected the settings of a flow map, got: {error}") from error


def save(path: str | os.PathLike[str], flow_map: FlowMap, *, extra: Mapping[str, Any] | None = None) -> None:
    """Save a flow map: the network's weights and everything needed to make it again.

    Args:
        path: the file, by custom ``*.safetensors``; replaced atomically. flow_map: any.
        extra: further settings (JSON) for whoever reads the file, under "extra".

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    settings = {"kind": "flow_map", **describe(flow_map), "extra": dict(extra or {})}
    write_file(path, plain_names(flow_map.network.state_dict()), settings)


def load(path: str | os.PathLike[str], *, network: nn.Module | None = None) -> FlowMap:
    """Load a flow map that :func:`save` saved, on the CPU and in evaluation mode.

    Args:
        path: the file, or ``hf://USER/REPO`` on a hub (:func:`imm.checkpoints.hub.fetch`).
        network: the network to fill, where it is not one of ``imm.networks``.

    Raises:
        CheckpointError: a missing, truncated or foreign file, or weights that do not fit the network.
    """
    if str(path).startswith("hf://"):
        from imm.checkpoints.hub import fetch

        path = fetch(str(path))
    tensors, settings = read_file(path, "flow_map")
    tensors = plain_names(tensors)  # files of earlier versions may have torch.compile's
    try:
        if network is None:
            _check_settings(settings, tensors, str(path))
        flow_map = build(settings, network)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    load_state(flow_map.network, tensors, str(path))
    return flow_map.eval()


def _check_settings(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse settings of another network than the tensors', before there is memory for it: a small file may name a huge one."""
    network = settings.get("network")
    blocks, levels = (network.get(n) for n in ("blocks", "multipliers")) if isinstance(network, dict) else (None, None)
    if isinstance(blocks, int) and isinstance(levels, list) and blocks * len(levels) > len(tensors):
        raise CheckpointError(f"{source}: names do not fit the network: its settings have more blocks than there are tensors")
    try:
        with torch.device("meta"):
            expected = build(settings)
    except (RuntimeError, ArithmeticError) as error:  # torch's, for sizes that no tensor has
        text = str(error).partition("\n")[0]
        raise CheckpointError(f"{source}: expected the settings of a flow map, got: {text}") from error
    check_state(expected.network.state_dict(), tensors, source)


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Fill a module; every name must be there, none may be unknown, every shape must fit. Either may be compiled."""
    check_state(plain_names(module.state_dict()), plain_names(tensors), source)
    try:
        with torch.no_grad():
            module.load_state_dict(own_names(module, tensors))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def check_state(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises CheckpointError unless both have the same names and shapes; ``expected`` may be on the meta device."""
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(f"{source}: names do not fit the network: missing {missing[:4]}, unknown {unknown[:4]}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(f"{source}: {name}: expected {list(tensor.shape)}, got {list(tensors[name].shape)}")
