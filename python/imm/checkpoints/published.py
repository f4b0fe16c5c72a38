"""The published IMM checkpoints' names and settings, turned into a FlowMap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from imm.checkpoints.format import CheckpointError, load_state
from imm.flow_map import FlowMap
from imm.networks import DDPMpp, DiT

_PREFIX = "model."


def from_published(state_dict: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FlowMap:
    """A flow map from the names and settings of a published checkpoint.

    Args:
        state_dict: weights under their published names, each with the prefix ``model.``. Buffers whose values follow from the
            settings (``model.pos_embed``, resample filters) may be absent; any other missing or unknown name is an error.
        settings: the checkpoint's attributes with its constructor's keywords merged in: ``model_type`` ("DiT_XL_2", ...,
            or "SongUNet", DDPM++), ``img_resolution``, ``img_channels``, ``label_dim``, ``noise_schedule``, ``T``, ``eps``,
            ``sigma_data``, ``f_type``, ``time_scale``, ``temb_type``; for "SongUNet" also, where they are not those of
            CIFAR-10, ``model_channels``, ``channel_mult``, ``num_blocks``, ``attn_resolutions``, ``dropout``, ``augment_dim``.
            Others are ignored.

    Returns:
        The flow map in evaluation mode, float32.

    Raises:
        CheckpointError: a missing setting, an unknown network, or names and shapes that do not fit it.
    """
    needed = ("model_type", "img_resolution", "img_channels", "label_dim", "noise_schedule", "T", "eps", "sigma_data")
    absent = [name for name in (*needed, "f_type", "time_scale", "temb_type") if name not in settings]
    if absent:
        raise CheckpointError(f"settings: expected {absent} among the checkpoint's settings, got {sorted(settings)}")
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
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"settings: {error}") from error
    foreign = sorted(name for name in state_dict if not name.startswith(_PREFIX))
    if foreign:
        raise CheckpointError(f"state_dict: expected names with the prefix {_PREFIX!r}, got {foreign[:4]}")
    weights = {name[len(_PREFIX) :]: tensor.float() for name, tensor in state_dict.items()}
    for name, buffer in flow_map.network.named_buffers():
        weights.setdefault(name, buffer)
    load_state(flow_map.network, weights, "state_dict")
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
        dropout=settings.get("dropout", 0.2),
        augment_dim=settings.get("augment_dim") or 0,
    )
