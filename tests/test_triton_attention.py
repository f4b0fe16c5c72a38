"""The Triton attention against float64, in Triton's interpreter and on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, in_the_interpreter, kernel_test
from op_samples import tensor
from tolerance import assert_close
from torch import Tensor

from imm.ops import dispatch
from imm.ops.attention import timestep_attention as reference
from imm.ops.attention import timestep_attention_bwd as reference_bwd
from imm.ops.attention import timestep_attention_jvp as reference_jvp

pytest.importorskip("triton")

# The interpreter's products of bfloat16 are wrong.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]
HEADS = 2
# (d, T): one part and two, each full or not; below, at and above a block; keys at once and in blocks.
SHAPES = [(8, 1), (64, 16), (72, 7), (72, 64), (40, 65), (96, 70), (120, 20), (128, 33)]


test_in_the_interpreter = in_the_interpreter(__file__)


def run(op: str, *args: Any) -> Any:
    """The op through the dispatch table, as a CUDA tensor would go."""
    chosen = dispatch.select(op, dispatch.Request(torch.device("cuda"), args[0].dtype))
    assert chosen.name == "triton"
    return dispatch.run(op, "triton", *args)


def projection(d: int, T: int, dtype: torch.dtype, *, B: int = 1, layout: str = "contiguous") -> Tensor:
    return tensor((B, T, 3 * HEADS * d), layout, dtype, DEVICE, grad=False)


def check(qkv: Tensor, grad_layout: str = "contiguous") -> None:
    """Forward and backward within the tolerance of float64, and bitwise identical twice."""
    B, T, width = qkv.shape
    terms = T + width // (3 * HEADS)
    truth, sums = reference(qkv.double(), HEADS)
    out, lse = run("timestep_attention", qkv, HEADS)
    assert (out.shape, out.dtype, out.is_contiguous(), lse.dtype) == (truth.shape, qkv.dtype, True, torch.float32)
    assert_close(out, truth, terms)
    assert_close(lse, sums, terms)
    up = tensor((B, T, width // 3), grad_layout, qkv.dtype, DEVICE, grad=False)
    right = reference_bwd(up.double(), qkv.double(), truth, sums, HEADS)
    found = run("timestep_attention_bwd", up, qkv, out, lse, HEADS)
    assert (found.shape, found.dtype, found.is_contiguous()) == (qkv.shape, qkv.dtype, True)
    assert_close(found, right, terms)
    if INTERPRETED:
        return
    for value, again in zip((out, lse), run("timestep_attention", qkv, HEADS), strict=True):
        assert torch.equal(value, again)
    assert torch.equal(found, run("timestep_attention_bwd", up, qkv, out, lse, HEADS))


@kernel_test
@pytest.mark.every(3)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(projection(*shape, dtype))


@kernel_test
@pytest.mark.skipif(INTERPRETED, reason="too much for the interpreter")
@pytest.mark.parametrize("shape", [(d, T) for d in (64, 72, 128) for T in (256, 300, 1024)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_sizes_match_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check(projection(*shape, dtype, B=3))


@kernel_test
@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("d", "T", "multiprocessors", "blocks"),
    [(72, 256, 1, 4), (72, 256, 4, 2), (40, 130, 1, 3), (40, 130, 4, 2), (72, 256, 132, 1), (64, 100, 1, 2)],
)
def test_a_program_walks_blocks_of_queries(
    d: int, T: int, multiprocessors: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head whole, in parts, and block by block; with a last block that is not full, and one of no queries at all."""
    from imm_kernels import attention as kernels

    monkeypatch.setattr(kernels, "multiprocessors", lambda device: multiprocessors)
    assert kernels.forward_sizes(d, T, 16, 2 * HEADS, multiprocessors).blocks == blocks
    check(projection(d, T, torch.float16, B=2))


@kernel_test
def test_large_scores_keep_the_digits_of_lse() -> None:
    """Of scores of a thousand, whose largest is rounded before the weights are taken."""
    qkv = projection(64, 128, torch.float16)
    q, k, _ = qkv.chunk(3, dim=2)
    q *= 16
    k *= 16
    truth, sums = reference(qkv.double(), HEADS)
    assert float(sums.abs().max()) > 500
    out, lse = run("timestep_attention", qkv, HEADS)
    assert_close(out, truth, 192)
    assert_close(lse, sums, 192)


@kernel_test
@pytest.mark.every(5)
@pytest.mark.parametrize("shape", [*SHAPES, (80, 130)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents_match_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    check_tangents(projection(*shape, dtype, B=2), projection(*shape, dtype, B=2, layout="permuted"))


@kernel_test
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_tangent_that_all_keys_share_changes_no_weight(dtype: torch.dtype) -> None:
    """Then dS is one large number in each row, which cancels in dout and stays in dlse."""
    qkv, dqkv = projection(72, 130, dtype), projection(72, 130, dtype)
    dqkv.chunk(3, dim=2)[1].copy_(4.0)
    check_tangents(qkv, dqkv)


def check_tangents(qkv: Tensor, dqkv: Tensor) -> None:
    _, T, width = qkv.shape
    truth = reference_jvp(qkv.double(), HEADS, dqkv.double())
    found = run("timestep_attention_jvp", qkv, HEADS, dqkv)
    for value, other in zip(found[:2], run("timestep_attention", qkv, HEADS), strict=True):
        assert (value.shape, value.dtype, value.is_contiguous()) == (other.shape, other.dtype, True)
    for value, right in zip(found, truth, strict=True):
        assert_close(value, right, 4 * (T + width // (3 * HEADS)))


@kernel_test
@pytest.mark.parametrize("layout", ["permuted", "sliced"])
def test_any_strides(layout: str) -> None:
    check(projection(40, 9, torch.float32, B=3, layout=layout), layout)


@kernel_test
def test_rows_of_a_wider_tensor_are_read_in_place_and_others_are_copied() -> None:
    from imm_kernels.attention import _readable

    wide = torch.randn(2, 9, 3 * HEADS * 8 + 16, device=DEVICE)
    kept, moved = wide[:, :, 8:-8], wide[:, :, 1:-15]
    assert _readable(kept) is kept
    assert _readable(moved).is_contiguous()
    for qkv in (kept, moved):
        check(qkv)
    shifted = torch.randn(1 + 9 * 3 * HEADS * 8, device=DEVICE)[1:].view(1, 9, -1)
    assert _readable(shifted).data_ptr() % 16 == 0
    check(shifted)


@kernel_test
def test_images_may_be_far_apart() -> None:
    apart, width = 2**31, 3 * HEADS * 8
    memory = torch.empty(apart + 9 * width, dtype=torch.float16, device=DEVICE)  # only its ends are touched
    qkv = memory.as_strided((2, 9, width), (apart, width, 1)).copy_(torch.randn(2, 9, width))
    check(qkv)


@kernel_test
def test_images_do_not_know_of_each_other() -> None:
    qkv = projection(72, 20, torch.float32, B=3)
    together, _ = run("timestep_attention", qkv, HEADS)
    qkv[1:] = float("nan")
    assert torch.equal(run("timestep_attention", qkv, HEADS)[0][:1], together[:1])


@kernel_test
def test_very_negative_sums_do_not_poison_the_padding() -> None:
    """e^-lse overflows, and the tokens that fill a block up must still add nothing."""
    qkv = projection(8, 7, torch.float32)
    q, k, _ = qkv.chunk(3, dim=2)
    q += 20
    k -= 20
    out, lse = run("timestep_attention", qkv, HEADS)
    assert float(lse.max()) < -89
    up = torch.randn_like(out)
    truth, sums = reference(qkv.double(), HEADS)
    right = reference_bwd(up.double(), qkv.double(), truth, sums, HEADS)
    torch.testing.assert_close(out.double(), truth, rtol=1e-3, atol=1e-3)
    found = run("timestep_attention_bwd", up, qkv, out, lse, HEADS)
    torch.testing.assert_close(found.double(), right, rtol=1e-2, atol=1e-2)


@kernel_test
def test_nothing_in_nothing_out() -> None:
    qkv = projection(8, 4, torch.float32)[:0]
    out, lse = run("timestep_attention", qkv, HEADS)
    found = run("timestep_attention_bwd", out, qkv, out, lse, HEADS)
    assert (out.shape, lse.shape, found.shape) == ((0, 4, 16), (0, 2, 4), (0, 4, 48))
    assert [v.shape for v in run("timestep_attention_jvp", qkv, HEADS, qkv)] == [out.shape, lse.shape] * 2


@pytest.mark.parametrize("op", ["timestep_attention", "timestep_attention_bwd"])
def test_the_predicate_names_its_reason(op: str) -> None:
    def reason(device: str, dtype: torch.dtype = torch.float32) -> str | None:
        return dict(dispatch.explain(op, dispatch.Request(torch.device(device), dtype)))["triton"]

    assert reason("cpu") == "needs tensors on cuda, got cpu"
    assert reason("cuda") is None
    assert str(reason("cuda", torch.float64)).endswith("got torch.float64")
