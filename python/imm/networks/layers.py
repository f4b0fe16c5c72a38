"""What torch's kernels leave to their caller: GELU in a matmul's epilogue, and operations that have forward-mode tangents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


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
    if hidden.requires_grad or torch.compiler.is_compiling() or _forward_mode():
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")  # the widest tensor of the network is not allocated twice


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for ``[B, heads, T, d]`` by torch's kernels; in forward mode by the one that has tangents."""
    if _forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def run_block(checkpointing: bool, block: nn.Module, *args: Tensor) -> Any:
    """``block(*args)``; with ``checkpointing``, in training, only ``args`` are kept and the backward runs it again."""
    return checkpoint(block, *args, use_reentrant=False) if checkpointing and torch.is_grad_enabled() else block(*args)


class GroupNorm(nn.GroupNorm):
    """torch's; in forward mode of contiguous memory, which the tangent of torch's asks for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if _forward_mode() else x)


def _forward_mode() -> bool:
    """Whether there may be tangents (torch.func.jvp, dual numbers), which oneDNN and most attention kernels lose or refuse."""
    return forward_ad._current_level >= 0


def _one_dnn(layer: nn.Module, x: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and not _forward_mode()
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
