"""imm::timestep_attention and its backward against float64, autograd and torch's attention; properties and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_samples import tensor
from tolerance import assert_close, distance
from torch import Tensor
from torch.nn import functional as F

import imm
from imm.ops import attention, dispatch

HEADS = 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 1), (40, 7), (64, 64), (72, 256), (96, 300), (128, 64), (72, 7), (8, 300)]  # (d, T)
NAMES = ["library", "reference"]


def plain(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """The op as a network would write it."""
    B, T, width = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width // 3)
    return out, torch.logsumexp(q @ k.mT / q.shape[3] ** 0.5, 3)


def projection(d: int, T: int, dtype: torch.dtype, *, B: int = 2, device: str = "cpu") -> Tensor:
    return torch.randn(B, T, 3 * HEADS * d, dtype=torch.float64, device=device).to(dtype).requires_grad_()


def run(op: str, name: str, *args: Any) -> Any:
    """An implementation by its name; of those the device has."""
    (chosen,) = [i for i in dispatch._TABLE[op] if i.name == name]
    if reason := chosen.refuses(dispatch.Request.of(args[0])):
        pytest.skip(reason)
    return dispatch.run(op, name, *args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_match_float64(name: str, dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    qkv = projection(*shape, dtype, device=device)
    (d, T), exact = shape, qkv.detach().double().requires_grad_()
    truth, sums = plain(exact, HEADS)
    up = torch.randn_like(truth).to(dtype)
    (right,) = torch.autograd.grad(truth, exact, up.double())
    with torch.no_grad():
        out, lse = run("timestep_attention", name, qkv, HEADS)
        found = run("timestep_attention_bwd", name, up, qkv, out, lse, HEADS)
    assert (out.shape, out.dtype, out.is_contiguous()) == (truth.shape, dtype, True)
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(out, truth, T + d)
    # Torch's kernels round what enters the sums of the scores.
    assert_close(lse, sums, T + d, dtype if name == "library" else None)
    assert (found.shape, found.dtype, found.is_contiguous()) == (qkv.shape, dtype, True)
    assert_close(found, right, T + d)


@pytest.mark.parametrize("name", NAMES)
def test_equals_torch_in_float64(name: str, device: str) -> None:
    qkv = projection(72, 64, torch.float64, device=device)
    for value, truth in zip(run("timestep_attention", name, qkv, HEADS), plain(qkv, HEADS), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_into_it(name: str, dtype: torch.dtype, device: str) -> None:
    qkv = projection(16, 20, dtype, device=device)
    up = torch.randn(2, 20, HEADS * 16, device=device).to(dtype)

    def results() -> tuple[Tensor, ...]:
        out, lse = run("timestep_attention", name, qkv, HEADS)
        return out, lse, run("timestep_attention_bwd", name, up, qkv, out, lse, HEADS)

    with torch.no_grad():
        expected = results()
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = results()
    for value, right in zip(found, expected, strict=True):
        assert value.dtype == right.dtype
        torch.testing.assert_close(value, right)


def test_autograd_is_that_of_the_plain_form(device: str) -> None:
    qkv = projection(40, 7, torch.float64, device=device)
    out = imm.functional.timestep_attention(qkv, HEADS)
    up = torch.randn_like(out)
    expected = torch.autograd.grad(plain(qkv, HEADS)[0], qkv, up)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, up), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("variant", ["permuted", "sliced"])
@pytest.mark.parametrize("name", NAMES)
def test_any_strides(name: str, variant: str, device: str) -> None:
    qkv = tensor((2, 7, 3 * HEADS * 8), variant, torch.float32, device, grad=False)
    out, lse = run("timestep_attention", name, qkv, HEADS)
    assert out.is_contiguous()
    up = tensor((2, 7, HEADS * 8), variant, torch.float32, device, grad=False)
    same, sums = run("timestep_attention", name, qkv.contiguous(), HEADS)
    torch.testing.assert_close(out, same)
    strided = lse.mT.contiguous().mT
    value = run("timestep_attention_bwd", name, up, qkv, out, strided, HEADS)
    right = run("timestep_attention_bwd", name, up.contiguous(), qkv.contiguous(), same, sums, HEADS)
    torch.testing.assert_close(value, right)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tangent_of_the_cpu_matches_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """On both sides of a block of queries, of any strides, and under autocast."""
    (d, T), exact = shape, torch.float32 if dtype.itemsize == 2 else dtype
    qkv, dqkv = (projection(d, T, dtype).detach() for _ in range(2))
    truth = attention.timestep_attention_jvp(qkv.double(), HEADS, dqkv.double())
    found = run("timestep_attention_jvp", "cpu", qkv, HEADS, dqkv)
    for value, right, of in zip(found, truth, (dtype, exact, dtype, exact), strict=True):
        assert (value.shape, value.dtype, value.is_contiguous()) == (right.shape, of, True)
        assert_close(value, right, T + d)
        assert of.itemsize == 2 or distance(value, right) < (1e-6 if of == torch.float32 else 1e-13)
    turned = (v.mT.contiguous().mT for v in (qkv, dqkv))
    with torch.autocast("cpu", torch.bfloat16):
        again = run("timestep_attention_jvp", "cpu", next(turned), HEADS, next(turned))
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_images_do_not_know_of_each_other(device: str) -> None:
    qkv = projection(72, 20, torch.float32, B=5, device=device)
    with torch.no_grad():
        together = imm.functional.timestep_attention(qkv, HEADS)
        qkv[1:] = float("nan")
        assert torch.equal(imm.functional.timestep_attention(qkv, HEADS)[:1], together[:1])
        alone = imm.functional.timestep_attention(qkv[:1], HEADS)
    torch.testing.assert_close(alone, together[:1])  # a library may take another kernel for another batch


def test_large_scores_do_not_overflow(device: str) -> None:
    qkv = 1e3 * torch.randn(1, 16, 3 * HEADS * 8, device=device)
    out = imm.functional.timestep_attention(qkv, HEADS)
    torch.testing.assert_close(out.double(), plain(qkv.double(), HEADS)[0], rtol=1e-3, atol=1e-3)


def test_equal_keys_average_the_values(device: str) -> None:
    qkv = torch.randn(2, 16, 3, HEADS * 8, device=device)
    qkv[:, :, 1] = 1.0
    out = imm.functional.timestep_attention(qkv.flatten(2), HEADS)
    torch.testing.assert_close(out, qkv[:, :, 2].mean(1, keepdim=True).expand_as(out))


def test_sums_have_no_gradient(device: str) -> None:
    out, lse = torch.ops.imm.timestep_attention(projection(8, 3, torch.float32, device=device), HEADS)
    assert out.requires_grad
    assert not lse.requires_grad


QKV = torch.zeros(2, 4, 3 * 2 * 8)
REFUSED: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((QKV[0], 2), ValueError, r"qkv: expected \[B, T, 3 H d\] for H = 2 heads, got \[4, 48\]"),
    ((QKV, 0), ValueError, "heads: expected a positive number, got 0"),
    ((QKV, 5), ValueError, r"qkv: expected \[B, T, 3 H d\] for H = 5 heads, got \[2, 4, 48\]"),
    ((QKV, 4), ValueError, "qkv: expected heads of a multiple of 8 features up to 128, got 4"),
    ((torch.zeros(1, 2, 3 * 136), 1), ValueError, "up to 128, got 136"),
    ((torch.zeros(1, 2, 0), 1), ValueError, "up to 128, got 0"),
    ((QKV[:, :0], 2), ValueError, "qkv: expected 1 to 1024 tokens, got 0"),
    ((torch.zeros(1, 1025, 24), 1), ValueError, "qkv: expected 1 to 1024 tokens, got 1025"),
    ((QKV.int(), 2), TypeError, "qkv: expected a floating dtype of 16, 32 or 64 bits, got torch.int32"),
]


@pytest.mark.parametrize(("args", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(args: tuple[Any, ...], error: type[Exception], message: str) -> None:
    for name in NAMES:
        with pytest.raises(error, match=message):
            run("timestep_attention", name, *args)
    with pytest.raises(error, match=message):
        torch.ops.imm.timestep_attention(args[0].to("meta"), args[1])
    with pytest.raises(error, match=message):
        torch.ops.imm.timestep_attention_jvp(*args, args[0])


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_refuses_what_is_not_of_its_forward(name: str) -> None:
    out, lse = torch.ops.imm.timestep_attention(QKV, 2)
    for grad, result, sums, message in (
        (out[:1], out, lse, r"grad: expected \[2, 4, 16\] of torch.float32 on cpu, got \[1, 4, 16\]"),
        (out.half(), out, lse, "grad: expected .* got .* of torch.float16 on cpu"),
        (out, out.double(), lse, "out: expected .* got .* of torch.float64 on cpu"),
        (out, out, lse[:, :1], r"lse: expected \[2, 2, 4\] of torch.float32 on cpu, got \[2, 1, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            run("timestep_attention_bwd", name, grad, QKV, result, sums, 2)


def test_the_predicate_of_the_library_names_its_reason() -> None:
    def reason(device: str, dtype: torch.dtype) -> str | None:
        return dict(dispatch.explain("timestep_attention", dispatch.Request(torch.device(device), dtype)))["library"]

    assert reason("cpu", torch.float64) is None
    assert reason("cuda", torch.bfloat16) is None
    assert reason("cuda", torch.float32) == "supports torch.bfloat16, torch.float16 on cuda, got torch.float32"
    assert reason("meta", torch.float32) == "needs tensors on cuda, got meta"


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_on_a_processor_with_amx_16_bits_need_its_avx_512(capability: str, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel would pack them for AMX, and has none that does where ATEN_CPU_CAPABILITY lowers it."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    attention._packs_without_kernels.cache_clear()
    try:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            chosen = dispatch.select("timestep_attention", dispatch.Request(torch.device("cpu"), dtype)).name
            lowered = amx and capability != "AVX512" and dtype != torch.float32
            assert chosen == ("reference" if lowered else "library")
    finally:
        attention._packs_without_kernels.cache_clear()


def test_the_library_of_cuda_takes_these_arguments() -> None:
    """Shapes and dtypes of torch's CUDA kernels, without a GPU."""
    qkv = torch.empty(2, 16, 3 * HEADS * 8, dtype=torch.bfloat16, device="meta")
    out, lse = attention._library(qkv, HEADS)
    assert (out.shape, out.is_contiguous(), lse.shape, lse.dtype) == ((2, 16, 16), True, (2, HEADS, 16), torch.float32)
    assert attention._library_bwd(torch.empty_like(out), qkv, out, lse, HEADS).shape == qkv.shape
