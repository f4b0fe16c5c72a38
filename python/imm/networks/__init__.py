"""Networks that take two times: G(x, t, s, labels)."""

from torch import nn

from imm.networks.causal import CausalTransformer
from imm.networks.ddpmpp import DDPMpp
from imm.networks.dit import DiT
from imm.networks.embeddings import full_precision, ignore_second_time
from imm.networks.token_head import TokenHead
from imm.networks.token_model import TokenModel
from imm.networks.unet import UNet

#: Networks that a checkpoint can name; each keeps its constructor's arguments in ``settings``.
NETWORKS: dict[str, type[nn.Module]] = {
    "DDPMpp": DDPMpp,
    "DiT": DiT,
    "TokenHead": TokenHead,
    "TokenModel": TokenModel,
    "UNet": UNet,
}

__all__ = [
    "NETWORKS",
    "CausalTransformer",
    "DDPMpp",
    "DiT",
    "TokenHead",
    "TokenModel",
    "UNet",
    "full_precision",
    "ignore_second_time",
]
