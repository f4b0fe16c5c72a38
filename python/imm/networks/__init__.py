"""Networks that take two times: G(x, t, s, labels)."""

from torch import nn

from imm.networks.dit import DiT
from imm.networks.unet import UNet

#: Networks that a checkpoint can name; each keeps its constructor's arguments in ``settings``.
NETWORKS: dict[str, type[nn.Module]] = {"DiT": DiT, "UNet": UNet}

__all__ = ["NETWORKS", "DiT", "UNet"]
