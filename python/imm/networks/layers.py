"""What torch's kernels leave to their caller: GELU in a matmul's epilogue, and operations that have forward-mode tangents."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

#: Devices on which the GELU of ``torch._addmm_activation`` is tanh's. On the CPU it is erf's.
TANH_GELU = ("cuda",)


def linear(layer: nn.Module, x: Tensor, *, gelu: bool = False) -> Tensor:
    """``layer(x)``, then tanh-GELU where asked for; ``[..., in]`` -> ``[..., out]``.

    Where no gradient is needed, the matmul applies the function to what it is about to write: oneDNN's on the CPU, cuBLASLt's
    on CUDA. Under torch.compile the compiler chooses, and a layer that somebody has replaced or hooked is called as it is.
    """
    device = x.device.type
    if _alone(layer, x):
        if device == "cpu" and _one_dnn(x):
            function, form = ("gelu", "tanh") if gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, function, [], form)
        if device in TANH_GELU and gelu and layer.bias is not None:
            rows = x.reshape(-1, layer.in_features)
            return torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True).reshape(
                *x.shape[:-1], layer.out_features
            )
    hidden = layer(x)
    if not gelu:
        return hidden
    if hidden.requires_grad or torch.compiler.is_compiling() or _forward_mode():
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")  # the widest tensor of the network is not allocated twice


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; "meta" has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def is_linear(layer: object) -> TypeGuard[nn.Linear]:
    """Whether a call of ``layer`` is its matmul and no more: nobody has replaced, parametrized or hooked it."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for ``[B, heads, T, d]`` by torch's kernels; in forward mode by the one that has tangents."""
    if _forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def run_block(checkpointing: bool, block: nn.Module, *args: Tensor) -> Any:
    """``block(*args)``; with ``checkpointing``, in training, only ``args`` are kept and the backward runs it again. In forward
    mode everything is kept: the backward would run it again without the tangents."""
    if checkpointing and torch.is_grad_enabled() and not _forward_mode():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class GroupNorm(nn.GroupNorm):
    """torch's; in forward mode of contiguous memory, which the tangent of torch's asks for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if _forward_mode() else x)


def _forward_mode() -> bool:
    """Whether there may be tangents (torch.func.jvp, dual numbers), which oneDNN and most attention kernels lose or refuse."""
    return forward_ad._current_level >= 0


def _alone(layer: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``layer(x)`` is a matmul that nobody differentiates, compiles or runs in another precision."""
    return (
        not torch.compiler.is_compiling()
        and not _forward_mode()
        and is_linear(layer)
        and layer.weight.dtype == x.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad))
        and not autocasts(x.device.type)
    )


def _one_dnn(x: Tensor) -> bool:
    return bool(
        x.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    )
