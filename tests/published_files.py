"""Writes files in the layout of published snapshots, with the globals of packages that are not installed here."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch
from torch import nn

from imm import FlowMap, pickles, unpickling

#: Would leave a mark if a reader ran it.
SOURCE = "import os\nos.environ['IMM_TEST_RAN'] = 'module_src'\n"
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
#: Our classes -> the classes that the published DiT has in their place; other classes of ours are persistent objects there.
TIMM = {
    "PatchEmbed": "timm.layers.patch_embed.PatchEmbed",
    "MLP": "timm.layers.mlp.Mlp",
    "Attention": "timm.models.vision_transformer.Attention",
}


class Name:
    """A global, written by its name."""

    def __init__(self, full: str) -> None:
        self.full = full


class Call:
    """What a global makes of arguments (REDUCE)."""

    def __init__(self, name: str, *args: Any, state: Any = None) -> None:
        self.name, self.args, self.state = Name(name), args, state


class New:
    """An instance of a class with a state (NEWOBJ, BUILD), as torch's own modules are pickled."""

    def __init__(self, name: str, state: Any, items: Mapping[str, Any] | None = None) -> None:
        self.name, self.state, self.items = Name(name), state, items


class Persistent:
    """An object of a class whose source travels in the file."""

    def __init__(self, class_name: str, state: Any, source: str = SOURCE) -> None:
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
        self.call = Call(PERSISTENT, meta)


class Writer(pickle._Pickler):  # the one in Python, whose steps can be told apart
    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def name(self, obj: Name) -> None:
        module, _, name = obj.full.rpartition(".")
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def call(self, obj: Call) -> None:
        self.save(obj.name)
        self.save(obj.args)
        self.write(pickle.REDUCE)
        self.memoize(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def new(self, obj: New) -> None:
        self.save(obj.name)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.memoize(obj)
        if obj.items is not None:
            for key, value in obj.items.items():
                self.save(key)
                self.save(value)
                self.write(pickle.SETITEM)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def persistent(self, obj: Persistent) -> None:
        self.call(obj.call)

    dispatch |= {Name: name, Call: call, New: new, Persistent: persistent}


def dumps(value: Any, protocol: int = 4) -> bytes:
    """The pickle of a tree of plain values, tensors and the classes above."""
    file = io.BytesIO()
    Writer(file, protocol).dump(value)
    return file.getvalue()


def written(path: Path, tree: Any, protocol: int = 4) -> Path:
    """The path, with the tree's pickle, or these bytes, in it."""
    path.write_bytes(tree if isinstance(tree, bytes) else dumps(tree, protocol))
    return path


def torch_file(value: Any, zipped: bool) -> bytes:
    """The same tree as torch.save writes it: in a zip, or in its older format."""
    file = io.BytesIO()
    writer = SimpleNamespace(__name__="writer", Pickler=Writer, dump=pickle.dump)
    torch.save(value, file, writer, 2, zipped)
    return file.getvalue()


def read_here(file: IO[bytes], keys: Sequence[str]) -> Any:
    """In the place of ``imm.pickles._read``: the same without a process of its own, hence without its limits."""
    file.seek(0)
    data = file.read()
    parts = unpickling.answer(io.BytesIO(data), memoryview(data), keys)
    return pickles.decoded(io.BytesIO(b"".join(parts)), len(data))


def module(network: nn.Module, persistent: bool = False) -> Any:
    """A module as it lies in a snapshot; ``persistent``: torch's own layers as persistent objects too, as in a U-Net."""
    kind = type(network)
    state = {name: value for name, value in network.__dict__.items() if name != "settings"}
    state["_modules"] = {name: module(child, persistent) for name, child in network._modules.items()}
    if kind.__name__ in TIMM and kind.__module__.startswith("imm."):
        return New(TIMM[kind.__name__], state)
    if kind.__module__.startswith("torch.nn.modules.") and not (persistent and network._parameters):
        return New(f"{kind.__module__}.{kind.__name__}", state)
    return Persistent(kind.__name__, state)


def precond(network: Any, attributes: Mapping[str, Any], keywords: Mapping[str, Any], name: str = "Precond") -> Persistent:
    """The snapshot's network: settings around ``_modules["model"]``."""
    state = {**nn.Module().__dict__, **attributes, "_init_args": (), "_init_kwargs": dict(keywords)}
    return Persistent(name, {**state, "_modules": {"model": network}})


def flow_map_snapshot(flow_map: FlowMap, model_type: str, **changes: Any) -> dict[str, Any]:
    """The tree of a published IMM checkpoint; ``changes`` replace attributes."""
    channels, resolution, _ = flow_map.image_shape
    keywords = {"img_resolution": resolution, "img_channels": channels, "label_dim": flow_map.num_classes}
    settings = flow_map.settings
    attributes = {
        **keywords,
        "mixed_precision": None,
        "noise_schedule": settings["schedule"],
        "T": settings["t_max"],
        "eps": settings["t_min"],
        "sigma_data": settings["sigma_data"],
        "f_type": settings["parametrization"],
        "time_scale": settings["time_scale"],
        "temb_type": settings["second_time"],
        **changes,
    }
    return {"ema": precond(module(flow_map.network), attributes, {**keywords, "model_type": model_type, "s_embed": True})}


KEYWORDS = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 0}


def ddpmpp_snapshot(flow_map: FlowMap, **keywords: Any) -> dict[str, Any]:
    """The tree of a published DDPM++: every layer is a persistent object, the sizes are the constructor's keywords."""
    tree = flow_map_snapshot(flow_map, "SongUNet")
    state = tree["ema"].call.args[0]["state"]
    attributes = {name: value for name, value in state.items() if not name.startswith("_")}
    given = {**state["_init_kwargs"], **KEYWORDS, "dropout": 0.1, **keywords}
    return {"ema": precond(module(flow_map.network, persistent=True), attributes, given), "augment_pipe": None}


def metadata(kind: str, builtins: str) -> New:
    cache = Call("collections.defaultdict", Name(f"{builtins}.dict"))
    types = {
        "ref_type": Name("typing.Any"),
        "object_type": Name(f"{builtins}.list"),
        "key_type": Name("__builtin__.long" if builtins == "__builtin__" else "builtins.int"),
    }
    return New(f"omegaconf.base.{kind}", {**types, "optional": True, "flags": {}, "resolver_cache": cache})


def record(value: Any, builtins: str = "builtins") -> New:
    """A value as OmegaConf keeps it, with lists and dicts in it."""
    if isinstance(value, list | dict):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        content = {key: record(one, builtins) for key, one in inner}
        kind = "dictconfig.DictConfig" if isinstance(value, dict) else "listconfig.ListConfig"
        whole = content if isinstance(value, dict) else list(content.values())
        return New(f"omegaconf.{kind}", {"_metadata": metadata("ContainerMetadata", builtins), "_content": whole})
    kinds = {int: "Integer", float: "Float", bool: "Boolean", str: "String"}
    kind = kinds.get(type(value), "Any")
    return New(f"omegaconf.nodes.{kind}Node", {"_metadata": metadata("Metadata", builtins), "_parent": None, "_val": value})
