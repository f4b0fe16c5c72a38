"""A linear layer of inference, with tanh-GELU in the product's epilogue where the library has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """``layer(x)``, then tanh-GELU where asked for; ``[..., in]`` -> ``[..., out]``.

    On the CPU, where no gradient is needed, oneDNN's product applies the function to what it is about to write. Under
    torch.compile the compiler chooses, and a layer that somebody has replaced or hooked is called as it is.
    """
    if _one_dnn(layer, x):
        function, form = ("gelu", "tanh") if gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, function, [], form)
    hidden = layer(x)
    if not gelu:
        return hidden
    if hidden.requires_grad or torch.compiler.is_compiling():
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")  # the widest tensor of the network is not allocated twice


def _one_dnn(layer: nn.Module, x: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and type(layer) is nn.Linear
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and layer.weight.dtype == x.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )
