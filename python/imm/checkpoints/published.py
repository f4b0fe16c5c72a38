"""The published IMM checkpoints: their files, names and settings, turned into a FlowMap."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm.checkpoints.format import CheckpointError, check_state, load_state, save
from imm.files import sha256_of
from imm.flow_map import SECOND_TIMES, FlowMap
from imm.networks import DDPMpp, DiT
from imm.pickles import OTHER, PickleError, Record, TensorView, plain_name, read_pickle
from imm.weights import plain_names

_PREFIX = "model."
#: Of the modules' dicts that are walked; a dict that several modules share counts each time.
_MAX_ENTRIES = 1_000_000
_MAX_TENSORS = 10_000
_MAX_DEPTH = 32
#: All tensors together may have this many times the bytes of the file: some names may share a storage.
_MAX_SHARING = 2
#: No setting has as many characters or items, nor a message.
_MAX_SETTING = 1_000
#: Largest values of the settings that say how large a network is; its shapes are compared with the file's after that.
_LARGEST = {"img_resolution": 4096, "img_channels": 4096, "label_dim": 1_000_000, "model_channels": 8192, "num_blocks": 64}


def import_published(path: str | os.PathLike[str], out: str | os.PathLike[str], *, second_time: str | None = None) -> FlowMap:
    """Turn a published snapshot (``.pkl``) into a checkpoint of this package, with the averaged weights (``ema``).

    Nothing in the snapshot is run (:mod:`imm.pickles`). The new file keeps the snapshot's name, sha256 and
    ``mixed_precision`` under ``extra["source"]``.

    Args:
        path: the snapshot. out: the file to write, by custom ``*.safetensors``; replaced atomically.
        second_time: "stride" or "identity" in place of the snapshot's own ``temb_type``.

    Returns:
        The flow map that was saved, as :func:`from_published` makes it.

    Raises:
        CheckpointError: a snapshot that cannot be read or holds no IMM network, or a folder that cannot be written to. Nothing
            is written then.
        ValueError: an unknown second_time.
    """
    source, target = Path(path), Path(out)
    if second_time is not None and second_time not in SECOND_TIMES:
        raise ValueError(f"second_time: expected one of {list(SECOND_TIMES)}, got {second_time!r}")
    if target.is_dir() or not target.parent.is_dir() or (source.exists() and target.exists() and target.samefile(source)):
        raise CheckpointError(f"out: expected another file than the snapshot, in a folder that is there, got {target}")
    state_dict, settings = read_published(source)
    if second_time is not None:
        settings["temb_type"] = second_time
    try:
        absent = [name for name in ("noise_schedule", "f_type", "time_scale", "temb_type") if name not in settings]
        if absent:
            name = settings["class_name"]
            raise CheckpointError(f"expected an IMM network, which takes a second time, got {name} without {absent}")
        flow_map = from_published(state_dict, settings)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {str(error)[:_MAX_SETTING]}") from error  # which may quote the file's settings
    precision = settings.get("mixed_precision")
    precision = str(precision).removeprefix("torch.") if isinstance(precision, torch.dtype) else None
    save(target, flow_map, extra={"source": {"name": source.name, "sha256": sha256_of(source), "mixed_precision": precision}})
    return flow_map


def read_published(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a snapshot's averaged network without running anything: IMM's, and others that EDM's code base wrote.

    Args:
        path: a pickle of a dict whose key ``ema`` is the network.

    Returns:
        The network's state dict (CPU, the snapshot's dtypes), and its settings: the plain attributes of the network's object
        (numbers, strings, dtypes, None, lists and dicts of these, OmegaConf's too), its constructor's keywords where no
        attribute has their name, ``class_name`` and, where nothing else is called so, ``dropout``: the largest of its modules.

    Raises:
        CheckpointError: a file that is missing, truncated or malformed, names anything that no snapshot holds, or declares
            sizes beyond its own.
    """
    source = Path(path)
    try:
        return _snapshot(read_pickle(source, ("ema",)), _MAX_SHARING * source.stat().st_size)
    except PickleError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _snapshot(tree: Any, room: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    network = tree.get("ema") if type(tree) is dict else None
    if type(network) is not Record or network.attributes is None:
        raise PickleError("expected a dict with a network under the key 'ema', got none")
    walk = _Walk(room)
    walk.module(network, "", 0)
    attributes = network.attributes
    keywords = walk.opened(attributes.get("_init_kwargs"))
    given = walk.fields(keywords, "_init_kwargs") if type(keywords) is dict else {}
    own = {name: value for name, value in attributes.items() if not name.startswith("_")}
    settings = {name: walk.plain(value, 0) for name, value in {**given, **own}.items()}
    settings = {name: value for name, value in settings.items() if value is not OTHER}
    if walk.dropout:
        settings.setdefault("dropout", walk.dropout)
    return walk.tensors, {**settings, "class_name": network.class_name}


class _Walk:
    """Collects tensors and settings; what a hostile file could repeat by reference is counted each time."""

    def __init__(self, room: int) -> None:
        self.room, self.left = room, _MAX_ENTRIES
        self.tensors: dict[str, Tensor] = {}
        self.dropout: float = 0.0  # the largest of the Dropout modules

    def spend(self, entries: int) -> None:
        self.left -= entries
        if self.left < 0:
            raise PickleError("expected a snapshot of a network, got more objects than one has")

    def module(self, module: Any, prefix: str, depth: int) -> None:
        """Add a module's parameters and buffers, and its children's."""
        if type(module) is not Record or depth > _MAX_DEPTH:
            raise PickleError(f"{prefix[:80]!r}: expected a module, at most {_MAX_DEPTH} deep, got something else")
        fields = self.fields(module.attributes, "attributes")
        rate = fields.get("p")
        if module.class_name == "Dropout" and isinstance(rate, int | float) and rate > self.dropout:
            self.dropout = rate
        passing = fields.get("_non_persistent_buffers_set")
        passing = [name for name in passing if type(name) is str] if type(passing) is list and len(passing) < 100 else []
        for kind in ("_parameters", "_buffers"):
            for name, value in self.fields(fields.get(kind), "module").items():
                if value is not None and not (kind == "_buffers" and name in passing):
                    self.tensor(prefix + name, value)
        for name, child in self.fields(fields.get("_modules"), "module").items():
            if child is not None:
                self.module(child, f"{prefix}{name}.", depth + 1)

    def fields(self, table: Any, what: str) -> dict[str, Any]:
        if table is None:
            return {}
        if type(table) is not dict:
            raise PickleError("module: expected dicts of parameters, buffers and modules, got others")
        self.spend(1 + len(table))
        return {plain_name(key, what): value for key, value in table.items()}

    def tensor(self, name: str, view: Any) -> None:
        if type(view) is not TensorView or name in self.tensors or len(self.tensors) == _MAX_TENSORS:
            raise PickleError(f"{name[:80]!r}: expected one of at most {_MAX_TENSORS} tensors, got something else")
        self.room -= view.nbytes
        if self.room < 0:
            raise PickleError(f"{name[:80]!r}: expected tensors of about the file's size in all, got more")
        self.tensors[name] = view.tensor()

    def opened(self, value: Any) -> Any:
        """What a record of OmegaConf holds; any other value as it is."""
        if type(value) is not Record or not value.class_name.startswith("omegaconf."):
            return value
        return self.fields(value.attributes, "attributes").get("_val" if "Node" in value.class_name else "_content", OTHER)

    def plain(self, value: Any, depth: int) -> Any:
        """A setting's value; ``OTHER`` where it holds anything that is none."""
        self.spend(1)
        value = self.opened(value)
        if value is None or type(value) in (bool, int, float, str, torch.dtype):
            return value
        if type(value) not in (list, dict) or len(value) >= _MAX_SETTING or depth == 8:
            return OTHER
        if type(value) is dict and not all(type(key) is str for key in value):
            return OTHER
        items = [self.plain(item, depth + 1) for item in (value.values() if type(value) is dict else value)]
        if any(item is OTHER for item in items):
            return OTHER
        return dict(zip(value, items, strict=True)) if type(value) is dict else items


def from_published(state_dict: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FlowMap:
    """A flow map from the names and settings of a published checkpoint.

    Args:
        state_dict: weights under their published names, each with the prefix ``model.``. Buffers whose values follow from the
            settings (``model.pos_embed``, resample filters) may be absent; any other missing or unknown name is an error.
        settings: the checkpoint's attributes with its constructor's keywords merged in: ``model_type`` ("DiT_XL_2", ...,
            or "SongUNet", DDPM++), ``img_resolution``, ``img_channels``, ``label_dim``, ``noise_schedule``, ``T``, ``eps``,
            ``sigma_data``, ``f_type``, ``time_scale``, ``temb_type``; for "SongUNet" also, where they are not those of
            CIFAR-10, ``model_channels``, ``channel_mult``, ``num_blocks``, ``attn_resolutions``, ``dropout``, ``augment_dim``.
            Others are ignored. A DiT's ``dropout`` is ignored with a warning, because ours has none.

    Returns:
        The flow map in evaluation mode, float32.

    Raises:
        CheckpointError: a missing setting, an unknown network, or names and shapes that do not fit it.
    """
    needed = ("model_type", "img_resolution", "img_channels", "label_dim", "noise_schedule", "T", "eps", "sigma_data")
    absent = [name for name in (*needed, "f_type", "time_scale", "temb_type") if name not in settings]
    if absent:
        raise CheckpointError(f"settings: expected {absent} among the checkpoint's settings, got {sorted(settings)}")
    for name in (*needed, "f_type", "time_scale", "temb_type", *_DDPMPP, *_SIZES):
        if "${" in str(settings.get(name)):
            text = f"{name}: expected a value, got OmegaConf's reference to another setting: {settings[name]!r:.200}"
            raise CheckpointError(f"{text}; save the settings resolved (OmegaConf.resolve)")
    for name, largest in _LARGEST.items():
        size = settings.get(name, 0)
        if type(size) is not int or not 0 <= size <= largest:
            raise CheckpointError(f"{name}: expected 0..{largest}, got {size!r}")
    for name in ("T", "eps", "sigma_data", "time_scale"):
        number = settings[name]
        if type(number) not in (int, float) or not math.isfinite(number):
            raise CheckpointError(f"{name}: expected a finite number, got {number!r}")
    state_dict = plain_names(state_dict)
    foreign = sorted(name for name in state_dict if not name.startswith(_PREFIX))
    if foreign:
        raise CheckpointError(f"state_dict: expected names with the prefix {_PREFIX!r}, got {foreign[:4]}")
    weights = {name[len(_PREFIX) :]: tensor.float() for name, tensor in state_dict.items()}
    try:
        with torch.device("meta"):  # compared before memory of the size that the settings say is taken
            skeleton = _network(settings)
    except CheckpointError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # RuntimeError: a size that no tensor can have
        raise CheckpointError(f"settings: {str(error).splitlines()[0]}") from error
    derived = dict(skeleton.named_buffers()).keys() - weights.keys()
    check_state({k: v for k, v in skeleton.state_dict().items() if k not in derived}, weights, "state_dict")
    try:
        flow_map = FlowMap(
            _network(settings),
            schedule=settings["noise_schedule"],
            parametrization=settings["f_type"],
            second_time=settings["temb_type"],
            sigma_data=settings["sigma_data"],
            time_scale=settings["time_scale"],
            t_min=settings["eps"],
            t_max=settings["T"],
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"settings: {error}") from error
    for name, buffer in flow_map.network.named_buffers():
        weights.setdefault(name, buffer)
    load_state(flow_map.network, weights, "state_dict")
    dropout = settings.get("dropout")
    if isinstance(flow_map.network, DiT) and isinstance(dropout, int | float) and dropout > 0:
        text = f"the DiT's dropout of {dropout:g} is left out: ours has none; images are the same, training goes on without it"
        warnings.warn(text, UserWarning, stacklevel=2)
    return flow_map.eval()


def _network(settings: Mapping[str, Any]) -> nn.Module:
    kind = str(settings["model_type"])
    if kind == "SongUNet":
        return _ddpmpp(settings)
    family, _, rest = kind.partition("_")
    size, _, patch = rest.partition("_")
    if family != "DiT" or not patch.isdigit():
        raise CheckpointError(f'model_type: expected "DiT_SIZE_PATCH" such as "DiT_XL_2", or "SongUNet", got {kind!r}')
    return DiT(
        size=size,
        patch=int(patch),
        channels=settings["img_channels"],
        resolution=settings["img_resolution"],
        num_classes=settings["label_dim"],
    )


#: Settings of a DDPM++'s size that a checkpoint need not have.
_SIZES = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout", "augment_dim")
#: Of the published U-Net's constructor: what DDPM++ has. Other values (NCSN++ and further relatives) are other networks.
_DDPMPP: dict[str, Any] = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
    "channel_mult_emb": 4,
    "channel_mult_noise": 1,
    "s_embed": True,
}


def _ddpmpp(settings: Mapping[str, Any]) -> DDPMpp:
    for name, expected in _DDPMPP.items():
        value = settings.get(name, expected)
        if (list(value) if isinstance(value, tuple) else value) != expected:
            raise CheckpointError(f"{name}: expected {expected!r}, as DDPM++ has it, got {value!r}")
    dropout = settings.get("dropout", 0.2)
    if not 0 <= dropout <= 1:  # torch takes a NaN
        raise CheckpointError(f"dropout: expected 0..1, got {dropout!r}")
    resolution, multipliers = settings["img_resolution"], list(settings.get("channel_mult", (2, 2, 2)))
    sides = [resolution >> level for level in range(len(multipliers))]
    return DDPMpp(
        channels=settings["img_channels"],
        resolution=resolution,
        num_classes=settings["label_dim"],
        width=settings.get("model_channels", 128),
        multipliers=multipliers,
        blocks=settings.get("num_blocks", 4),
        attention=[side for side in settings.get("attn_resolutions", (16,)) if side in sides],
        dropout=dropout,
        augment_dim=settings.get("augment_dim") or 0,
    )
