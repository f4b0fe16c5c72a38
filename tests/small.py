"""Networks as small as they come, with weights that are not 0 anywhere."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def spread(network: Network, std: float = 0.1) -> Network:
    """The network with all of its weights drawn anew: its output is not 0."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network
