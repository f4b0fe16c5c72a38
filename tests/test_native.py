"""The native library: every CPU kernel against the float64 reference, equal bits over threads, bad input, loading, switches.

Sizes: M on both sides of the 4-row tiles, D around the vectors (4 to 32 numbers) and the 512-feature blocks. Left out: sizes
whose M x M part does not fit memory; the fuzz test has them, as errors.
"""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import imm
from imm.ops import flow_step as flow_step_ops
from imm.ops import mmd as mmd_ops
from imm.ops import native
from imm.ops import noise as noise_ops

pytestmark = pytest.mark.skipif(native.status() is not None, reason=f"native library: {native.status()}")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = torch.ops.imm
EPS = 1e-8


def particles(M: int, D: int, dtype: torch.dtype, G: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """y_t, y_r (some pairs close, as in training), scale, weight."""
    gen = torch.Generator().manual_seed(seed)
    y_t = torch.randn(G, M, D, generator=gen)
    y_r = y_t + 0.3 * torch.randn(G, M, D, generator=gen)
    return y_t.to(dtype), y_r.to(dtype), 0.5 + torch.rand(G, generator=gen), 0.5 + torch.rand(G, generator=gen)


def assert_close(got: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """|got - exact| within the rounding of ``terms`` additions in the arithmetic dtype, plus that of a 16-bit result.

    Rounding errors of a sum grow like sqrt(terms) eps; 8 covers the few sums, the exponential and the difference of values.
    """
    assert got.shape == exact.shape
    eps = torch.finfo(torch.promote_types(got.dtype, torch.float32)).eps
    size = exact.abs().max().item() if exact.numel() else 0.0
    bound = 8 * terms**0.5 * eps * size
    if got.dtype in (torch.bfloat16, torch.float16):
        bound += 2 * torch.finfo(got.dtype).eps * size + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= bound, (error, bound, size)


def check_mmd(y_t: torch.Tensor, y_r: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor | None, kernel: str) -> None:
    """All MMD ops on one input, against the references in float64 on the same rounded numbers."""
    M, D = y_t.shape[1:]
    wide = y_t.double(), y_r.double(), scale.double(), None if weight is None else weight.double()
    loss = mmd_ops.mmd_loss(*wide, kernel, EPS)
    upstream = torch.linspace(0.5, 1.5, len(scale))
    grad = mmd_ops.mmd_loss_bwd(torch.ones_like(loss), *wide, kernel, EPS)
    got = OPS.mmd_loss_grad(y_t, y_r, scale, weight, kernel, EPS)
    # The loss is a difference of kernel means of size up to 1 - exp(...), so it is measured against those, not against itself.
    means = mmd_ops._kernel_minus_one(mmd_ops._distance(wide[0], wide[1]), mmd_ops._kappa(wide[2], D), kernel, EPS)
    size = means.abs().amax() * (1.0 if weight is None else weight.double().max()) if len(scale) else torch.tensor(0.0)
    for value in (got[0], OPS.mmd_loss(y_t, y_r, scale, weight, kernel, EPS)):
        eps = torch.finfo(value.dtype).eps
        assert value.shape == loss.shape
        assert ((value.double() - loss).abs() <= 8 * D**0.5 * eps * size).all()
    assert_close(got[1], grad, D * M)
    assert_close(
        OPS.mmd_loss_bwd(upstream, y_t, y_r, scale, weight, kernel, EPS),
        mmd_ops.mmd_loss_bwd(upstream.double(), *wide, kernel, EPS),
        D * M,
    )
    out_loss, out_grad = torch.empty_like(got[0]), torch.empty(y_t.shape, dtype=y_t.dtype)
    OPS.mmd_loss_grad(y_t, y_r, scale, weight, kernel, EPS, loss=out_loss, grad=out_grad)
    assert torch.equal(out_loss, got[0])
    assert torch.equal(out_grad, got[1])
    y_r = y_r[:, : max(1, M - 1)]
    wide = y_t.double(), y_r.double(), scale.double()
    gram = mmd_ops.mmd_gram(*wide, kernel, EPS)
    assert_close(OPS.mmd_gram(y_t, y_r, scale, kernel, EPS), gram, D)
    up = torch.sin(torch.arange(gram.numel())).reshape(gram.shape)
    for a, b in zip(
        OPS.mmd_gram_bwd(up, y_t, y_r, scale, kernel, EPS),
        mmd_ops.mmd_gram_bwd(up.double(), *wide, kernel, EPS),
        strict=True,
    ):
        assert_close(a, b, D * M)


@pytest.mark.parametrize("kernel", mmd_ops.KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 7, 8, 16, 33])
def test_mmd_against_float64(M: int, dtype: torch.dtype, kernel: str) -> None:
    for D in (1, 3, 16, 37, 300, 3072):
        y_t, y_r, scale, weight = particles(M, D, dtype)
        check_mmd(y_t, y_r, scale, weight if D != 37 else None, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mmd_strides_and_empty(dtype: torch.dtype) -> None:
    y_t, y_r, scale, weight = particles(6, 40, dtype, G=4)
    permuted = y_t.transpose(0, 2).contiguous().transpose(0, 2)
    swapped = y_r.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([y_t, y_t], 2)[:, ::2, 3:40], torch.cat([y_r, y_r], 2)[:, 1::2, 3:40]
    check_mmd(permuted, swapped, scale, weight, "laplace")
    check_mmd(*sliced, scale, weight, "rbf")
    check_mmd(y_t[..., ::2], y_r[..., 1::2], scale, weight, "laplace")
    check_mmd(y_t[:1].expand(4, 6, 40), y_r[:, :1].expand(4, 6, 40), scale[:1].expand(4), weight[:1].expand(4), "laplace")
    check_mmd(y_t[..., :1].expand(4, 6, 40), y_r, scale, None, "laplace")
    check_mmd(y_t[:0], y_r[:0], scale[:0], weight[:0], "laplace")


@pytest.mark.parametrize("kernel", mmd_ops.KERNELS)
def test_mmd_special_values(kernel: str) -> None:
    y_t, y_r, scale, _ = particles(5, 37, torch.float64)
    assert torch.equal(OPS.mmd_loss(y_t, y_t.clone(), scale, None, kernel, EPS), torch.zeros(3, dtype=torch.float64))
    y_t[1, 2, 3] = float("nan")
    loss, grad = OPS.mmd_loss_grad(y_t, y_r, scale, None, kernel, EPS)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(2).any(1).tolist() == [False, True, False]
    y_t[1, 2, 3] = float("inf")
    got, want = (f(y_t, y_r, scale, None, kernel, EPS) for f in (OPS.mmd_loss_grad, mmd_ops.mmd_loss_grad))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    # Below the floor on the norm there is no gradient.
    _, grad = OPS.mmd_loss_grad(y_r, y_r + 1e-6, scale, None, kernel, 1e3)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
def test_flow_step_has_the_bits_of_the_reference(dtype: torch.dtype, g_dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    for shape in ((3, 5), (2, 3, 16, 16), (1, 2077), (4, 0), (0, 7)):
        B = shape[0]
        x, g, u = (torch.randn(shape, generator=gen).to(d) for d in (dtype, g_dtype, g_dtype))
        c = [torch.rand(n, generator=gen, dtype=torch.float64) for n in (1, B, B, 1)]
        seeds = torch.arange(B) + 2**40
        for uncond, noisy in itertools.product((False, True), repeat=2):
            args = (x, g, c[0], c[1], u if uncond else None, c[2] if uncond else None)
            rest = (c[3] if noisy else None, seeds if noisy else None, 3)
            want = flow_step_ops.flow_step(*args, *rest)
            assert torch.equal(OPS.flow_step(*args, *rest), want)
            in_place = x.clone()
            OPS.flow_step(in_place, *args[1:], *rest, out=in_place)
            assert torch.equal(in_place, want)
            for a, b in zip(OPS.flow_step_bwd(*args), flow_step_ops.flow_step_bwd(*args), strict=True):
                assert torch.equal(a, b)


def test_noise_has_the_bits_of_the_reference() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, 123456789012345])
    for numel, step in ((0, 0), (1, 0), (5, 1), (1023, 2), (3072, 2**40), (100_003, 7)):
        want = noise_ops.noise(seeds, numel, step)
        assert torch.equal(OPS.noise(seeds, numel, step), want)
        for out in (torch.empty(5, numel), torch.zeros(5, 2 * numel)[:, ::2]):
            OPS.noise(seeds, numel, step, out=out)
            assert torch.equal(out, want)


def test_bits_do_not_depend_on_the_threads() -> None:
    def everything() -> list[torch.Tensor]:
        results = []
        for dtype, M in itertools.product(DTYPES, (4, 7)):
            y_t, y_r, scale, weight = particles(M, 700, dtype, G=37)
            results += [*OPS.mmd_loss_grad(y_t, y_r, scale, weight, "laplace", EPS)]
            gram = OPS.mmd_gram(y_t, y_r, scale, "laplace", EPS)
            results += [gram, *OPS.mmd_gram_bwd(gram, y_t, y_r, scale, "laplace", EPS)]
        one, x, seeds = (
            torch.ones(1, dtype=torch.float64),
            torch.randn(9, 9000, generator=torch.manual_seed(0)),
            torch.arange(9),
        )
        return [*results, OPS.noise(seeds, 9000, 1), OPS.flow_step(x, x, one, one, None, None, one, seeds, 1)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything()
        torch.set_num_threads(2)
        two = everything()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_out_may_share_memory_with_inputs() -> None:
    y_t, y_r, scale, _ = particles(4, 64, torch.float32)
    loss, grad = OPS.mmd_loss_grad(y_t, y_r, scale, None, "laplace", EPS)
    shared, value = y_t.clone(), torch.empty(3)
    OPS.mmd_loss_grad(shared, y_r, scale, None, "laplace", EPS, loss=value, grad=shared)
    assert torch.equal(shared, grad)
    assert torch.equal(value, loss)
    memory, one = torch.arange(101, dtype=torch.float32), torch.ones(1, dtype=torch.float64)
    want = memory[None, :100] * 2
    out = memory[None, 1:]
    OPS.flow_step(memory[None, :100], memory[None, :100].clone(), one, one, None, None, None, None, 0, out=out)
    assert torch.equal(out, want)
    with pytest.raises(RuntimeError, match="out= form has no derivative"):
        OPS.mmd_loss_grad(y_t.requires_grad_(), y_r, scale, None, "laplace", EPS, loss=value, grad=shared)


def test_autograd_autocast_and_compile_pass_through_the_kernels() -> None:
    y_t, y_r, scale, weight = particles(3, 20, torch.float64, G=2)
    y_t.requires_grad_()
    assert torch.autograd.gradcheck(lambda y: imm.functional.mmd_loss(y, y_r, scale, weight=weight), y_t)
    y_r = y_r.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: imm.functional.mmd_gram(x, y, scale), (y_t, y_r))
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS.mmd_loss(y_t.bfloat16(), y_r.detach().bfloat16(), scale, None, "laplace", EPS).dtype == torch.float32
    out = torch.empty(2), torch.empty(2, 3, 20)
    inputs = y_t.detach().float(), y_r.detach().float(), scale, weight, "laplace", EPS
    for op, args, kwargs in (
        (OPS.mmd_loss_grad.default, inputs, {}),
        (OPS.mmd_loss_grad.out, inputs, {"loss": out[0], "grad": out[1]}),
        (OPS.mmd_loss.default, inputs, {}),
        (OPS.noise.out, (torch.arange(2), 9, 1), {"out": torch.empty(2, 9)}),
    ):
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


def _pick(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a variation: other strides, sizes, dtype, or huge by expansion."""
    kind = rng.randrange(12)
    if kind == 0 and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1 and tensor.dim() > 0:
        return tensor.narrow(rng.randrange(tensor.dim()), 0, 0) if tensor.numel() else tensor
    if kind == 2:
        return tensor.to(rng.choice([*DTYPES, torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn]))
    if kind == 3 and tensor.dim() > 0 and tensor.numel():
        return tensor[..., :1].expand(*tensor.shape[:-1], rng.choice([1, 5, 2**50]))
    if kind == 4 and tensor.dim() > 1 and tensor.numel():
        return tensor[:, :1].expand(tensor.shape[0], rng.choice([1, 4, 2**50]), *tensor.shape[2:])
    if kind == 5:
        return tensor[None]
    if kind == 6 and tensor.dim() > 0 and tensor.numel():
        return tensor[0]
    return tensor


def _outcome(run, args):
    try:
        return run(*[a.clone() if isinstance(a, torch.Tensor) and a.numel() < 10**6 else a for a in args])
    except (ValueError, TypeError, RuntimeError) as error:
        return error


@pytest.mark.parametrize("seed", range(6))
def test_fuzz_raises_or_agrees(seed: int) -> None:
    rng, agreed, refused = random.Random(seed), 0, 0
    torch.manual_seed(seed)
    for _ in range(100):
        G, M, D = rng.choice([0, 1, 2, 3]), rng.choice([0, 1, 2, 5]), rng.choice([0, 1, 3, 17])
        dtype = rng.choice(DTYPES)
        y_t, y_r, g1, g2 = torch.randn(G, M, D).to(dtype), torch.randn(G, M, D).to(dtype), torch.rand(G), torch.rand(G)
        scale, weight = _pick(rng, g1 - 0.02), rng.choice([None, _pick(rng, g2)])
        kernel, eps = (
            rng.choice(["laplace", "rbf", "gauss"][: rng.choice([2, 2, 3])]),
            rng.choice([1e-8, 1e-8, 0.5, 0.0, float("nan")]),
        )
        x, y = _pick(rng, y_t), _pick(rng, y_r)
        c = [_pick(rng, torch.rand(rng.choice([1, G]), dtype=torch.float64)) for _ in range(4)]
        seeds, numel, step = _pick(rng, torch.arange(G)), rng.choice([-1, 0, 1, 9, 2**60]), rng.choice([-1, 0, 5, 2**62])
        g, u = y_r.to(rng.choice(DTYPES)), y_t.to(rng.choice(DTYPES))
        base, extra = rng.choice([(None, None), (u.to(g.dtype), c[2]), (u, None)]), rng.choice([(None, None), (c[3], seeds)])
        gram_up = _pick(rng, torch.randn(G, M, M))
        for name, module, args in (
            ("mmd_loss", mmd_ops, (x, y, scale, weight, kernel, eps)),
            ("mmd_loss_grad", mmd_ops, (x, y, scale, weight, kernel, eps)),
            ("mmd_loss_bwd", mmd_ops, (_pick(rng, g2), x, y, scale, weight, kernel, eps)),
            ("mmd_gram", mmd_ops, (x, y, scale, kernel, eps)),
            ("mmd_gram_bwd", mmd_ops, (gram_up, x, y, scale, kernel, eps)),
            ("flow_step", flow_step_ops, (x, g, c[0], c[1], *base, *extra, step)),
            ("flow_step_bwd", flow_step_ops, (x, g, c[0], c[1], *base)),
            ("noise", noise_ops, (seeds, numel, step)),
        ):
            want, got = _outcome(getattr(module, name), args), _outcome(getattr(OPS, name), args)
            described = name, [(a.shape, a.dtype, a.stride()) if isinstance(a, torch.Tensor) else a for a in args], want, got
            if isinstance(want, Exception):
                out_of_memory = "alloc" in str(want)  # the kernel may need none where the result is empty
                assert isinstance(got, Exception) or (out_of_memory and got.numel() == 0), described
                if isinstance(want, (ValueError, TypeError)):
                    assert isinstance(got, type(want)), described
                refused += 1
                continue
            assert not isinstance(got, Exception), described
            agreed += 1
            for a, b in zip(
                (got,) if isinstance(got, torch.Tensor) else got,
                (want,) if isinstance(want, torch.Tensor) else want,
                strict=True,
            ):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), described
                eps_of = 4 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0
                torch.testing.assert_close(
                    a, b, rtol=max(eps_of, 1e-5), atol=max(eps_of, 1e-5), equal_nan=True, msg=str(described)
                )
    assert agreed > 30
    assert refused > 30


def _python(code: str, **environment: str) -> str:
    env = {**os.environ, **environment, "PYTHONWARNINGS": "error"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


REPORT = """
import torch
from imm.ops import dispatch, mmd, native
request = dispatch.Request(torch.device("cpu"), torch.float32)
y = torch.randn(2, 4, 37, generator=torch.manual_seed(0))
grad = torch.ops.imm.mmd_loss_grad(y, y.flip(0), torch.ones(2), None, "laplace", 1e-8)[1]
print(dispatch.select("mmd_loss_grad", request).name, dispatch.select("noise", request).name, native.status(), sep="|")
print(*(g.item().hex() for g in grad.flatten()[:8]))
distance, asked = mmd._distance, []
mmd._distance = lambda x, y: (asked.append(1), distance(x, y))[1]
torch.ops.imm.mmd_loss_grad(y, y.flip(0), torch.ones(2), None, "laplace", 1e-8)
print(len(asked) > 0)
"""


def test_imm_impl_switches_the_kernel() -> None:
    ours = _python(REPORT, IMM_IMPL="").splitlines()
    forced = _python(REPORT, IMM_IMPL="mmd_loss_grad:reference").splitlines()
    assert ours[0] == "cpu|cpu|None"
    assert forced[0] == "reference|cpu|None"
    assert (ours[2], forced[2]) == ("False", "True")
    assert _python(REPORT, IMM_IMPL="mmd_loss_grad:cpu").splitlines() == ours
    none = _python(REPORT, IMM_NATIVE="0").splitlines()
    assert none[0] == "reference|reference|IMM_NATIVE=0 asks for none"
    assert none[1:] == forced[1:]


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instruction_sets(capability: str) -> None:
    """The choice at run time follows torch's, and every instruction set passes the same checks."""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    selection = "special or empty or flow_step or noise or threads or against_float64 and 4-"
    command = [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", f"({selection}) and not other"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_a_library_for_another_torch_is_refused(tmp_path: Path) -> None:
    assert native.refusal(native._folder()) is None
    built = json.loads((native._folder() / "build.json").read_text())
    (tmp_path / "build.json").write_text(json.dumps({**built, "torch": "0.1"}))
    reason = f"built for torch 0.1, this is torch {torch.__version__}; rebuild"
    assert native.refusal(tmp_path) == reason
    assert _python("from imm.ops import native; print(native.status())", IMM_NATIVE_DIR=str(tmp_path)) == reason
    (tmp_path / "build.json").write_text(json.dumps({**built, "schemas": "0"}))
    assert native.refusal(tmp_path) == "built from another list of op schemas; rebuild"
    (tmp_path / "build.json").write_text("{")
    assert "unreadable" in str(native.refusal(tmp_path))
    assert native.refusal(tmp_path / "nowhere") == "not built: this is the pure install"
