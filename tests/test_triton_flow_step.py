"""The Triton flow_step and noise against float64 and the reference noise's bits, in Triton's interpreter and on CUDA."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from interpreter import DEVICE, in_the_interpreter, kernel_test
from torch import Tensor

from imm.ops import dispatch, triton_kernels
from imm.ops.flow_step import flow_step as reference
from imm.ops.noise import noise as reference_noise

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Below, at and above a Philox block of four and a program's 1024 elements; images; vectorizable and not.
SHAPES = [(1, 1), (3, 3), (2, 37), (3, 1, 8, 8), (2, 1024), (2, 1025), (1, 2500)]
SEEDS = [2**33 + 1, 7, -3]


test_in_the_interpreter = in_the_interpreter(__file__)


def layout(shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> Tensor:
    if variant == "permuted":
        value = torch.randn(*reversed(shape), dtype=torch.float64).permute(*reversed(range(len(shape))))
    elif variant == "sliced":
        value = torch.randn(*(2 * n for n in shape), dtype=torch.float64)[tuple(slice(n // 2, n // 2 + n) for n in shape)]
    else:
        value = torch.randn(shape, dtype=torch.float64)
    return value.to(dtype).to(DEVICE)


def arguments(
    shape: tuple[int, ...],
    state: torch.dtype,
    output: torch.dtype,
    *,
    guided: bool,
    noisy: bool,
    variant: str = "contiguous",
    shared: bool = False,
    step: int = 3,
) -> tuple[Any, ...]:
    """flow_step's arguments; ``shared``: one coefficient for all images."""
    torch.manual_seed(0)
    x, g, g_uncond = layout(shape, state, variant), layout(shape, output, variant), layout(shape, output, variant)
    coefficients = [torch.rand(1 if shared else shape[0], dtype=torch.float64, device=DEVICE) + 0.5 for _ in range(4)]
    seeds = torch.tensor((SEEDS * shape[0])[: shape[0]], dtype=torch.int64, device=DEVICE)
    guidance = (g_uncond, coefficients[2]) if guided else (None, None)
    renoise = (coefficients[3], seeds) if noisy else (None, None)
    return x, g, coefficients[0], coefficients[1], *guidance, *renoise, step


def check(args: tuple[Any, ...]) -> None:
    """The kernel within the rounding of its arithmetic and of its result of the same step in float64."""
    from imm_kernels.flow_step import flow_step

    state = args[0].dtype
    truth = reference(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    value = flow_step(*args)
    assert value.dtype == state
    assert value.shape == truth.shape
    assert value.is_contiguous()
    # Four terms, each of at most two roundings of numbers of order 10, and one rounding to the state's dtype.
    accumulate = torch.promote_types(state, torch.float32)
    bound = 16 * torch.finfo(accumulate).eps * 10 + torch.finfo(state).eps * truth.abs()
    assert bool(((value.double() - truth).abs() <= bound).all())
    assert torch.equal(flow_step(*args), value)


@kernel_test
@pytest.mark.every(5)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("noisy", [False, True], ids=["quiet", "noisy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_matches_float64(dtype: torch.dtype, shape: tuple[int, ...], noisy: bool, guided: bool) -> None:
    check(arguments(shape, dtype, dtype, guided=guided, noisy=noisy))


@kernel_test
@pytest.mark.parametrize("output", DTYPES, ids=str)
@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_state_and_output_may_differ_in_dtype(state: torch.dtype, output: torch.dtype) -> None:
    check(arguments((2, 37), state, output, guided=True, noisy=True))


@kernel_test
@pytest.mark.parametrize("shared", [False, True], ids=["per-image", "shared"])
@pytest.mark.parametrize("variant", ["permuted", "sliced"])
def test_any_strides(variant: str, shared: bool) -> None:
    check(arguments((3, 2, 5, 7), torch.float32, torch.bfloat16, guided=True, noisy=True, variant=variant, shared=shared))


@kernel_test
def test_strided_coefficients_and_seeds() -> None:
    x, g, *_, step = arguments((3, 37), torch.float32, torch.float32, guided=False, noisy=False)
    table = torch.rand(3, 5, dtype=torch.float64, device=DEVICE)
    seeds = torch.arange(2**40, 2**40 + 6, device=DEVICE)[::2]
    check((x, g, table[:, 0], table[:, 1], g * 2, table[:, 2], table[:, 3], seeds, step))


@kernel_test
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)], ids=str)
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    check(arguments(shape, torch.float32, torch.float32, guided=True, noisy=True))


@kernel_test
def test_pure_noise_of_a_step_is_imm_noise() -> None:
    from imm_kernels.flow_step import flow_step

    x, g, zero, *_ = arguments((3, 1025), torch.float32, torch.float32, guided=False, noisy=False)
    seeds, zero = torch.tensor(SEEDS, device=DEVICE), torch.zeros_like(zero)
    out = flow_step(x, g, zero, zero, None, None, torch.ones_like(zero), seeds, 5)
    assert torch.equal(out, reference_noise(seeds, 1025, 5))


@kernel_test
@pytest.mark.parametrize("step", [0, 1, 16, 2**32 - 1, 2**32 + 5, 2**62], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 3, 4, 37, 1024, 2500])
def test_noise_has_the_bits_of_the_reference(numel: int, step: int) -> None:
    from imm_kernels.noise import noise

    seeds = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, -1], device=DEVICE)
    for chosen in (seeds, seeds[::3], seeds[:1], seeds[:0]):
        assert torch.equal(noise(chosen, numel, step).cpu(), reference_noise(chosen.cpu(), numel, step))


def run(op: str, *args: Any) -> Tensor:
    """The op through the dispatch table, as a CUDA tensor would go."""
    request = dispatch.Request(torch.device("cuda"), args[0].dtype)
    chosen = dispatch.select(op, request)
    assert chosen.name == "triton"
    return chosen.run(*args)


@kernel_test
def test_the_table_runs_it_and_its_errors_are_the_reference_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the native library is built with CUDA, its kernels come first.
    monkeypatch.setenv(dispatch.VARIABLE, "flow_step:triton,noise:triton")
    x, g, c_skip, c_out, *tail = arguments((2, 37), torch.float32, torch.bfloat16, guided=False, noisy=True)
    *_, c_noise, seeds, step = tail
    truth = reference(x, g, c_skip, c_out, *tail)
    torch.testing.assert_close(run("flow_step", x, g, c_skip, c_out, *tail), truth)
    assert torch.equal(run("noise", seeds, 37, step), reference_noise(seeds, 37, step))
    wrong = [
        (x, g[:1], c_skip, c_out, *tail),
        (x, g, c_skip.float(), c_out, *tail),
        (x, g, c_skip, c_out, None, None, c_noise, seeds.int(), step),
        (x, g, c_skip, c_out, None, None, c_noise, seeds, -1),
    ]
    for args in wrong:
        with pytest.raises((ValueError, TypeError)) as expected:
            reference(*args)
        with pytest.raises(expected.type) as got:
            run("flow_step", *args)
        assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("op", ["flow_step", "noise"])
def test_the_predicate_names_its_reason(op: str) -> None:
    def reason(device: str, dtype: torch.dtype = torch.float32) -> str | None:
        return dict(dispatch.explain(op, dispatch.Request(torch.device(device), dtype)))["triton"]

    assert reason("cpu") == "needs tensors on cuda, got cpu"
    assert reason("cuda") is None
    if op == "flow_step":
        assert str(reason("cuda", torch.float8_e4m3fn)).endswith("got torch.float8_e4m3fn")


def test_foreign_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="expected all tensors on cpu, got one on meta"):
        triton_kernels.check_device(torch.empty(1), None, torch.empty(1, device="meta"), 3)


def test_importing_imm_does_not_import_triton() -> None:
    code = "import sys, imm, imm.ops; assert not any(m.partition('.')[0] in ('triton', 'imm_kernels') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
