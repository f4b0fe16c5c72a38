"""imm::timestep_attention: attention of all tokens to all tokens, on q, k and v packed as rows of one projection.

    out = softmax(q k^T / sqrt(d)) v,  lse = log sum_j exp(q k_j^T / sqrt(d))

    tangents: dS = (dq k^T + q dk^T) / sqrt(d), dlse = rowsum(P dS), dout = P (dS - dlse) v + P dv, with P = exp(S - lse)

qkv is [B, T, 3 H d]; out is [B, T, H d], what the projection after it reads, so nothing is copied on either side. lse has no
gradient: it saves the backward the sums. Arithmetic is float32, float64 for float64.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from imm.ops import dispatch, triton_kernels
from imm.ops.dtypes import DTYPES, accumulate_dtype
from imm.ops.registry import no_second_derivative, register, register_autograd, register_tangents

#: Largest number of tokens and of features of a head.
TOKENS, FEATURES = 1024, 128


def _check(qkv: Tensor, heads: int) -> None:
    if heads < 1:
        raise ValueError(f"heads: expected a positive number, got {heads}")
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"qkv: expected [B, T, 3 H d] for H = {heads} heads, got {list(qkv.shape)}")
    if not 0 < qkv.shape[1] <= TOKENS:
        raise ValueError(f"qkv: expected 1 to {TOKENS} tokens, got {qkv.shape[1]}")
    features = qkv.shape[2] // (3 * heads)
    if features % 8 or not 0 < features <= FEATURES:
        raise ValueError(f"qkv: expected heads of a multiple of 8 features up to {FEATURES}, got {features}")
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv: expected a floating dtype of 16, 32 or 64 bits, got {qkv.dtype}")


def _check_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> None:
    _check(qkv, heads)
    B, T, width = qkv.shape
    tokens, sums = (B, T, width // 3), (B, heads, T)
    wanted = (
        ("grad", grad, tokens, qkv.dtype),
        ("out", out, tokens, qkv.dtype),
        ("lse", lse, sums, accumulate_dtype(qkv.dtype)),
    )
    for name, value, shape, dtype in wanted:
        if value.shape != shape or value.dtype != dtype or value.device != qkv.device:
            raise ValueError(
                f"{name}: expected {list(shape)} of {dtype} on {qkv.device}, "
                f"got {list(value.shape)} of {value.dtype} on {value.device}"
            )


def _heads(packed: Tensor, heads: int) -> Tensor:
    """[B, T, H d] -> [B, H, T, d], a view where it can be."""
    B, T, width = packed.shape
    return packed.reshape(B, T, heads, width // heads).transpose(1, 2)


def _unpack(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v, [B, H, T, d] each."""
    return tuple(_heads(part, heads) for part in qkv.chunk(3, dim=2))


def _pack(*parts: Tensor) -> Tensor:
    """[B, H, T, d] tensors side by side: [B, T, parts H d], contiguous."""
    B, H, T, d = parts[0].shape
    return torch.stack([part.transpose(1, 2) for part in parts], dim=2).reshape(B, T, len(parts) * H * d)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Autocast reaches into an op's own products, which are of the dtype that the op accumulates in."""
    return torch.autocast(x.device.type, enabled=False)


def timestep_attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Reference of imm::timestep_attention: [B, T, 3 H d] -> [B, T, H d] and [B, H, T]."""
    q, k, v = _unpack(qkv.to(accumulate_dtype(qkv.dtype)), heads)
    with _no_autocast(qkv):
        scores = q @ k.mT * q.shape[3] ** -0.5
        lse = scores.logsumexp(3)
        out = (scores - lse[..., None]).exp() @ v
    return _pack(out).to(qkv.dtype), lse


def timestep_attention_jvp(qkv: Tensor, heads: int, dqkv: Tensor) -> tuple[Tensor, ...]:
    """Reference of imm::timestep_attention_jvp: out, lse, and their tangents along dqkv [B, T, 3 H d]."""
    dtype = accumulate_dtype(qkv.dtype)
    (q, k, v), (dq, dk, dv) = (_unpack(x.to(dtype), heads) for x in (qkv, dqkv))
    scale = q.shape[3] ** -0.5
    with _no_autocast(qkv):
        scores = q @ k.mT * scale
        lse = scores.logsumexp(3)
        weights = (scores - lse[..., None]).exp()
        slopes = (dq @ k.mT + q @ dk.mT) * scale
        dlse = (weights * slopes).sum(3)
        out, dout = weights @ v, (weights * (slopes - dlse[..., None])) @ v + weights @ dv
    return _pack(out).to(qkv.dtype), lse, _pack(dout).to(qkv.dtype), dlse


def timestep_attention_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    """Gradient of :func:`timestep_attention` to qkv."""
    dtype = accumulate_dtype(qkv.dtype)
    q, k, v = _unpack(qkv.to(dtype), heads)
    up = _heads(grad.to(dtype), heads)
    delta = (up * _heads(out.to(dtype), heads)).sum(3, keepdim=True)
    scale = q.shape[3] ** -0.5
    with _no_autocast(qkv):
        weights = (q @ k.mT * scale - lse[..., None]).exp()
        slopes = weights * (up @ v.mT - delta) * scale
        return _pack(slopes @ k, slopes.mT @ q, weights.mT @ up).to(qkv.dtype)


def _library(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The kernels behind torch's scaled_dot_product_attention, which keeps the sums to itself."""
    q, k, v = _unpack(qkv if qkv.stride(2) == 1 else qkv.contiguous(), heads)
    if qkv.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out.transpose(1, 2).reshape(*qkv.shape[:2], qkv.shape[2] // 3), lse.contiguous()


def _library_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    q, k, v = _unpack(qkv if qkv.stride(2) == 1 else qkv.contiguous(), heads)
    saved = (_heads(grad.contiguous(), heads), q, k, v, _heads(out.contiguous(), heads), lse.contiguous())
    if qkv.device.type == "cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*saved, 0.0, False)
    else:
        none = torch.empty((2,), dtype=torch.uint64, device=qkv.device)  # the generator's state: unread, as nothing drops
        T = qkv.shape[1]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *saved, None, None, T, T, 0.0, False, none, none.new_empty(())
        )
    return _pack(*grads)


@functools.cache
def _packs_without_kernels() -> bool:
    """Whether torch would pack 16-bit products for AMX, which the processor has, with kernels for a lesser one, which cannot:
    where ATEN_CPU_CAPABILITY lowers them."""
    return bool(torch.cpu._is_amx_tile_supported()) and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _library_refuses(request: dispatch.Request) -> str | None:
    if request.device.type == "cpu":
        if request.dtype in (torch.bfloat16, torch.float16) and _packs_without_kernels():
            return f"16 bits on a processor with AMX need AVX-512, got {torch.backends.cpu.get_cpu_capability()}"
        return None
    if reason := dispatch.elsewhere("cuda", request):
        return reason
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"supports torch.bfloat16, torch.float16 on cuda, got {request.dtype}"
    return None


def _fake(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return qkv.new_empty((B, T, width // 3)), qkv.new_empty((B, heads, T), dtype=accumulate_dtype(qkv.dtype))


def _fake_bwd(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return torch.ops.imm.timestep_attention_bwd(grad, *ctx.saved_tensors, ctx.heads), None


_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

register(
    "timestep_attention",
    check=_check,
    reference=timestep_attention,
    fake=_fake,
    triton=triton_kernels.implementation("attention.attention", *_KERNEL_DTYPES),
    library=dispatch.Implementation("library", _library, _library_refuses),
)
register(
    "timestep_attention_bwd",
    check=_check_bwd,
    reference=timestep_attention_bwd,
    fake=_fake_bwd,
    triton=triton_kernels.implementation("attention.attention_bwd", *_KERNEL_DTYPES),
    library=dispatch.Implementation("library", _library_bwd, _library_refuses),
)
register_autograd("timestep_attention", _backward, _setup, tangents=True)
register_tangents(
    "timestep_attention",
    timestep_attention_jvp,
    check=_check,
    fake=_fake,
    backward=_backward,
    setup_context=_setup,
    native=("cpu",),
    triton=triton_kernels.implementation("attention_jvp.attention_jvp", *_KERNEL_DTYPES),
)
no_second_derivative("timestep_attention_bwd")
