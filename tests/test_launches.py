"""Every launcher of imm_kernels through Triton's real JIT, on a machine without a GPU: what is compiled, and what is launched.

The driver of tests/fake_driver.py belongs to a process, so that a child runs the tests of this file.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_driver
import pytest
import torch
from fake_driver import Launch
from op_samples import SAMPLES
from torch import Tensor

from imm.ops import dispatch

pytest.importorskip("triton")

OPS = [op for op in dispatch.names() if "triton" in [i.name for i in dispatch._TABLE[op]]]
#: Launches of a small call; one where not named.
COUNTS = {"timestep_attention_bwd": 3, "mmd_gram_bwd": 3}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
SEEN: set[str] = set()
RECORDED = fake_driver.install() if fake_driver.ACTIVE else []


def launch_test(function: Any) -> Any:
    """Collected in the child that has the driver."""
    return function if fake_driver.ACTIVE else None


@pytest.mark.skipif(fake_driver.ACTIVE, reason="this is the child")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter")
def test_every_launch_on_a_driver_that_records(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, fake_driver.VARIABLE: "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    """Those of this test, which a device has to be able to run."""
    RECORDED.clear()
    yield RECORDED
    for launch in RECORDED:
        assert 1 <= launch.grid[0] < 2**31, launch
        assert all(1 <= n < 2**16 for n in launch.grid[1:]), launch
        assert launch.shared <= fake_driver.SHARED, launch
        assert (launch.maxnreg or 1) * 32 * launch.warps <= 65536, launch
        for name, kind in launch.types.items():
            given = launch.given[name]
            assert kind == "constexpr" or kind == (TYPES.get(given.dtype, "*i64") if isinstance(given, Tensor) else kind), (
                launch
            )
            assert given is not None or kind == "constexpr", launch
        SEEN.add(launch.kernel)


def run(op: str, *given: Any, **out: Tensor) -> Any:
    """The Triton row of an op, on tensors that it takes for those of a GPU."""
    row = next(i for i in dispatch._TABLE[op] if i.name == "triton")
    first = dispatch.Request(torch.device("cuda"), given[0].dtype, tuple(given[0].shape))
    if reason := row.refuses(first):
        pytest.skip(reason)
    return dispatch.run(op, "triton", *given, **out)


def summary(launches: list[Launch]) -> list[tuple[str, int, int]]:
    return [(launch.kernel, launch.grid[0], launch.warps) for launch in launches]


@launch_test
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_every_op_in_every_dtype(op: str, dtype: torch.dtype, layout: str, launches: list[Launch]) -> None:
    """Small odd sizes: the launches an op has, none for nothing, and results like those of the op's fake."""
    given = [a.detach() if isinstance(a, Tensor) else a for a in SAMPLES[op](layout, dtype, "cpu")]
    out = given.pop() if op.endswith(".out") else {}
    results = run(op, *given, **out)
    assert len(launches) == (0 if layout == "empty" else COUNTS.get(op, 1))
    if not out:
        fake = getattr(torch.ops.imm, op)(*(a.to("meta") if isinstance(a, Tensor) else a for a in given))
        pairs = [(results, fake)] if isinstance(fake, Tensor) else zip(results, fake, strict=True)
        assert all((a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, True) for a, b in pairs)


@launch_test
def test_float32_is_taken_by_every_op() -> None:
    for op in OPS:
        row = next(i for i in dispatch._TABLE[op] if i.name == "triton")
        assert row.refuses(dispatch.Request(torch.device("cuda"), torch.float32, (2, 4, 8))) is None, op


@launch_test
@pytest.mark.parametrize(
    ("B", "T", "d", "dtype"),
    [
        (2, 256, 72, torch.bfloat16),  # DiT-XL/2: few heads, a block of queries a program
        (40, 256, 72, torch.bfloat16),  # two blocks a program
        (130, 256, 72, torch.float16),  # a head a program
        (130, 250, 64, torch.bfloat16),
        (1, 300, 64, torch.bfloat16),  # keys in blocks
        (1, 1, 16, torch.float16),
        (1, 1, 8, torch.float32),
    ],
)
def test_attention(B: int, T: int, d: int, dtype: torch.dtype, launches: list[Launch]) -> None:
    from imm_kernels import attention as kernels
    from imm_kernels.attention_jvp import jvp_sizes

    H = 2
    qkv, up, lse = torch.randn(B, T, 3 * H * d).to(dtype), torch.randn(B, T, H * d).to(dtype), torch.randn(B, H, T)
    run("timestep_attention", qkv, H)
    run("timestep_attention_bwd", up, qkv, up, lse, H)
    run("timestep_attention_jvp", qkv, H, qkv)
    bits = 8 * qkv.element_size()
    forward = kernels.forward_sizes(d, T, bits, B * H, fake_driver.MULTIPROCESSORS)
    sizes = forward, kernels.key_sizes(d, bits), kernels.query_sizes(d, bits)
    blocks = (sizes[0].queries * max(sizes[0].blocks, 1), kernels.DELTA_TOKENS, sizes[1].keys, sizes[2].queries)
    names = ("fwd", "delta", "bwd_keys", "bwd_queries")
    warps = (sizes[0].warps, kernels.DELTA_WARPS, sizes[1].warps, sizes[2].warps)
    jvp = jvp_sizes(d, bits)
    assert summary(launches) == [
        *(
            (f"attention._attention_{name}_kernel", B * H * -(-T // block), w)
            for name, block, w in zip(names, blocks, warps, strict=True)
        ),
        ("attention_jvp._attention_jvp_kernel", B * H * -(-T // jvp.queries), jvp.warps),
    ]
    first = launches[0]
    assert (first.types["qkv_ptr"], first.types["T"]) == (TYPES[dtype], "i32")  # whatever T is, one compilation
    assert "qkv_ptr" in first.aligned


@launch_test
def test_attention_splits_few_heads_and_no_others() -> None:
    from imm_kernels.attention import forward_sizes

    def blocks(T: int, heads: int, d: int = 72, multiprocessors: int = 132) -> int:
        return forward_sizes(d, T, 16, heads, multiprocessors).blocks

    assert [blocks(256, rows * 16) for rows in (1, 2, 4, 6, 16, 128, 512)] == [1, 1, 1, 2, 4, 4, 4]
    assert blocks(256, 256, multiprocessors=264) == 2
    assert [blocks(T, 4096) for T in (1, 64, 65, 129, 192, 256, 257)] == [1, 1, 2, 3, 3, 4, 0]
    assert [blocks(256, 4096, d) for d in (8, 64, 80, 88, 128)] == [4, 4, 4, 0, 0]


@launch_test
@pytest.mark.parametrize(
    ("B", "T", "C", "dtype"), [(2, 64, 1152, torch.bfloat16), (1, 1, 1, torch.float32), (1, 3, 8192, torch.float32)]
)
def test_adaln(B: int, T: int, C: int, dtype: torch.dtype, launches: list[Launch]) -> None:
    """One modulation for all images has no stride between them."""
    from imm_kernels import adaln as kernels

    x, y, (gate, shift, scale) = torch.randn(B, T, C).to(dtype), torch.randn(B, T, C).to(dtype), torch.randn(3, 1, C)
    run("gated_residual_adaln", x, y, gate, shift, scale, 1e-6)
    run("gated_residual_adaln_bwd", x, x, x, y, gate, scale, 1e-6)
    run("adaln_modulate", x, shift, scale, 1e-6)
    run("adaln_modulate_jvp", x, shift, scale, 1e-6, x, shift, scale)
    run("gated_residual_adaln_jvp", x, y, gate, shift, scale, 1e-6, x, y, gate, shift, scale)
    forward = ("adaln._adaln_fwd_kernel", B * T, kernels.block_and_warps(C, 1)[1])
    back = ("adaln._adaln_bwd_kernel", B * -(-T // kernels.ROWS), kernels.block_and_warps(C, kernels.ROWS)[1])
    jvp = ("adaln._adaln_jvp_kernel", *forward[1:])
    assert summary(launches) == [forward, back, forward, jvp, jvp]
    assert [launch.given["scale_stride"] for launch in launches[:3]] == [0, 0, 0]
    types = [TYPES[dtype], TYPES[dtype], "constexpr", "constexpr", TYPES[dtype]]
    assert [launch.types["y_ptr"] for launch in launches] == types


@launch_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("G", "M", "D", "expected"),
    [
        (300, 4, 4096, ["resident"]),
        (300, 2, 4096, ["resident"]),
        (250, 4, 20000, ["resident"]),
        (300, 4, 20000, ["partial", "combine", "gradient"]),  # a second round of a few groups
        (1, 1, 1, ["resident"]),
        (2, 4, 40000, ["partial", "combine", "gradient"]),
        (3, 12, 70, ["products", "pairs", "gradient"]),
        (2, 70, 128, ["products", "pairs", "gradient"]),
    ],
)
def test_mmd(G: int, M: int, D: int, expected: list[str], dtype: torch.dtype, launches: list[Launch]) -> None:
    """The kernels of each size, with the warps and registers chosen for it and alignment where it is."""
    from imm_kernels import mmd as kernels

    y_t, y_r = (torch.randn(1, M, D).to(dtype).expand(G, M, D) for _ in range(2))
    scale, weight = torch.rand(G), torch.rand(G, dtype=torch.float64)
    loss, slopes = run("mmd_loss", y_t, y_r, scale, weight, "rbf", [0.5, 1.0], 1e-8, M > 1)
    if expected[-1] == "gradient":
        run("mmd_loss_bwd", torch.ones_like(loss), slopes, y_t, y_r, weight, M > 1)
    family = "mmd_direct" if M <= 8 else "mmd_dot"
    assert [launch.kernel for launch in launches] == [f"{family}._{name}_kernel" for name in expected]
    first = launches[0]
    assert ("t.y" in first.aligned, "D" in first.aligned) == (True, D % 16 == 0)
    assert {"loss_ptr", "slopes_ptr"}.isdisjoint(first.aligned)  # one compilation for any of these
    if M <= 8:
        sizes = kernels.direct_sizes(M, D, 8 * y_t.element_size(), mix=False)
        assert (first.warps, first.maxnreg) == (sizes.num_warps, sizes.maxnreg)
        # As many groups at once as fit and stay in the cache, or slices that fill the device a few times.
        near = kernels._CACHED_BYTES // (2 * M * D * y_t.element_size()) or sizes.programs
        places = fake_driver.MULTIPROCESSORS * min(near, sizes.programs)
        parts = min(-(-4 * places // G), -(-D // sizes.BLOCK))
        assert first.grid[0] == (min(G, places) if expected == ["resident"] else G * parts)
    else:
        assert first.warps == kernels.dot_sizes(M, exact_bf16=dtype == torch.bfloat16, mix=False).warps


@launch_test
@pytest.mark.parametrize("M", [4, 20])
def test_flow_map_mmd_without_optional_numbers(M: int, launches: list[Launch]) -> None:
    """States of one dtype and outputs of another; no weight and no upstream."""
    x, g = torch.randn(3, M, 48), torch.randn(3, M, 48).bfloat16()
    numbers = [torch.rand(3, dtype=torch.float64) for _ in range(4)]
    _, grad = run("flow_map_mmd", x, x, g, g, *numbers, torch.rand(3), None, None, "laplace", [1.0], 1e-8, False)
    run("flow_map_mmd_bwd", torch.ones(1).expand(3), grad, g, None)
    assert (launches[-1].kernel, launches[-1].grid) == ("mmd_direct._rescale_kernel", (3, 1, 1))
    assert launches[-1].given["grad.stride"] == 0  # the gradient of a mean is one number, which is not copied
    assert grad.dtype == g.dtype
    assert [launches[0].types[name] for name in ("t.y", "t.x", "t.c_skip")] == ["*bf16", "*fp32", "*fp64"]
    assert all(launch.types.get("weight", "constexpr") == "constexpr" for launch in launches)


@launch_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("G", "N", "M", "D", "kernel"),
    [
        (5000, 8, 1, 1, "line"),
        (40, 17, 1, 1, "small"),
        (40, 8, 2, 1, "small"),
        (40, 8, 7, 128, "small"),
        (3, 2, 1, 90, "small"),
    ],
)
def test_energy_score(G: int, N: int, M: int, D: int, kernel: str, dtype: torch.dtype, launches: list[Launch]) -> None:
    """One launch, of as many programs as the groups need; another seed compiles nothing new."""
    from imm_kernels import energy_score as kernels

    x, y = (torch.randn(n, G, D).to(dtype).transpose(0, 1) for n in (N, M))
    numbers = None, torch.rand(G), 0.5, 0.5, None, "energy", [1.0]
    run("energy_score", x, y, None, None, 0, *numbers)
    bits = 8 * x.element_size()
    _, groups, *_, warps = kernels.small_sizes(N, D, bits)
    if kernel == "line":
        groups, warps = kernels.line_sizes(N, bits)
    assert summary(launches) == [(f"energy_score._{kernel}_kernel", -(-G // groups), warps)]
    assert (launches[0].types["x.ptr"], launches[0].types["grad.ptr"]) == (TYPES[dtype], TYPES[dtype])
    assert {"x.ptr", "grad.ptr"} <= launches[0].aligned
    assert ("x.row" in launches[0].aligned) == (G * D % 16 == 0)
    if D % 4 == 0:
        for seed in (1, 16):
            run("energy_score", x, y[:, 0], y[:, 1], torch.tensor([seed]), 5, *numbers)
        assert launches[1].signature == launches[2].signature
        assert launches[1].types["seed_ptr"] == "*i64"


@launch_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gram(dtype: torch.dtype, launches: list[Launch]) -> None:
    x, y, scale = torch.randn(2, 17, 64).to(dtype), torch.randn(2, 33, 64).to(dtype), torch.rand(2)
    run("mmd_gram", x, y, scale, "imq", [1.0], 1e-8)
    run("mmd_gram_bwd", torch.randn(2, 17, 33), x, y, scale, "imq", [1.0], 1e-8)
    names = [f"mmd_gram._{name}_kernel" for name in ("gram", "gram", "gram_gradient", "gram_gradient")]
    assert summary(launches) == [
        (name, grid, warps) for name, grid, warps in zip(names, (12, 12, 6, 10), (1, 1, 4, 4), strict=True)
    ]
    assert [launch.given["row_step"] for launch in launches[2:]] == [33, 1]


@launch_test
def test_a_step_of_any_size(launches: list[Launch]) -> None:
    """It is not specialised but for its width."""
    for step in (0, 1, 16, 2**40):
        run("noise", torch.arange(2), 37, step)
    assert [launch.types["step"] for launch in launches] == ["i32", "i32", "i32", "i64"]
    assert all("step" not in launch.aligned for launch in launches)


@launch_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_timestep_embedding(dtype: torch.dtype, launches: list[Launch]) -> None:
    run("timestep_embedding", torch.rand(3, dtype=torch.float64), torch.rand(1).expand(3), 256, 1e4, dtype)
    assert (launches[0].grid[0], launches[0].given["s_stride"], launches[0].types["out_ptr"]) == (6, 0, TYPES[dtype])
    t, s = torch.rand(2, 3)
    run("timestep_embedding_jvp", t, s, 256, 1e4, dtype, t, s[:1].expand(3))
    assert (launches[1].grid[0], launches[1].given["ds_stride"], launches[1].types["tangent_ptr"]) == (6, 0, TYPES[dtype])


@launch_test
def test_every_kernel_was_launched() -> None:
    import imm_kernels

    kernels = set()
    for module in pkgutil.iter_modules(imm_kernels.__path__):
        names = vars(importlib.import_module(f"imm_kernels.{module.name}"))
        kernels |= {
            f"{module.name}.{name}" for name, value in names.items() if name.endswith("_kernel") and hasattr(value, "run")
        }
    assert kernels <= SEEN
    assert len(kernels) > 12
