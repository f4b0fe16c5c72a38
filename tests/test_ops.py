"""The checks that every op must pass: opcheck in four layouts, gradcheck, compile without a graph break."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import op_samples
import pytest
import torch
import torch._dynamo.testing
from op_samples import SAMPLES, VARIANTS

import imm
from harness.timing import capture
from imm.ops import dispatch
from imm.ops.schemas import SCHEMAS

OPS = [schema.partition("(")[0] for schema in SCHEMAS]
DIFFERENTIABLE = [
    "mmd_loss",
    "flow_map_mmd",
    "energy_score",
    "mmd_gram",
    "flow_step",
    "adaln_modulate",
    "gated_residual_adaln",
    "timestep_attention",
    "timestep_embedding",
]


def op(name: str):
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.imm, name), overload or "default")


def first(results):
    """The differentiable result."""
    return results[0] if isinstance(results, tuple) else results


def learns(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]


def sample(name: str, variant: str, dtype: torch.dtype, device: str) -> tuple[tuple, dict]:
    """Positional and keyword arguments."""
    arguments = SAMPLES[name](variant, dtype, device)
    return (arguments[:-1], arguments[-1]) if name.endswith(".out") else (arguments, {})


def test_every_op_has_samples_and_an_implementation() -> None:
    assert set(OPS) == set(SAMPLES) == set(dispatch.names())


def test_the_documented_table_is_the_dispatch_table() -> None:
    text = (Path(__file__).parents[1] / "docs" / "internals" / "architecture.md").read_text()
    rows = re.findall(r"^\| `imm::(\w+)` \|.*\| ([\w, ]+) \|$", text, re.MULTILINE)
    documented = {name: implementations.split(", ") for name, implementations in rows}
    request = dispatch.Request(torch.device("cpu"), torch.float32)
    ops = [op for op in dispatch.names() if not op.endswith(("_bwd", "_jvp", ".out"))]
    assert documented == {op: [name for name, _ in dispatch.explain(op, request)] for op in ops}


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, variant: str, dtype: torch.dtype, device: str) -> None:
    torch.library.opcheck(op(name), *sample(name, variant, dtype, device))


@pytest.mark.parametrize("variant", VARIANTS[:3])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name: str, variant: str, device: str) -> None:
    arguments = SAMPLES[name](variant, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *a: first(op(name)(*a)), arguments)


@pytest.mark.parametrize("kernel", ["rbf", "imq", "energy"])
@pytest.mark.parametrize("name", ["mmd_loss", "mmd_gram"])
def test_gradcheck_of_the_other_kernels(name: str, kernel: str, device: str) -> None:
    arguments = SAMPLES[name]("contiguous", torch.float64, device, kernel=(kernel, [2.0], 1e-8))
    assert torch.autograd.gradcheck(lambda *a: first(op(name)(*a)), arguments)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivative_is_refused(name: str, device: str) -> None:
    arguments = SAMPLES[name]("contiguous", torch.float64, device)
    out = first(op(name)(*arguments)).sum()
    (grad,) = torch.autograd.grad(out, learns(arguments)[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiles_whole_and_once(name: str, device: str) -> None:
    """fullgraph, equal to eager in value and gradient, and no recompilation for a second shape."""
    torch._dynamo.reset()
    run = lambda *a: first(op(name)(*a))
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    counted = torch.compile(lambda *a: first(op(name)(*a)), fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for repeat in (1, 2):
        arguments = SAMPLES[name]("contiguous", torch.float32, device)
        batch = len(arguments[0])
        arguments = [
            torch.cat([a] * repeat if len(a) == batch else [a]).detach().requires_grad_(a.requires_grad)
            if isinstance(a, torch.Tensor)
            else a
            for a in arguments
        ]
        inputs = learns(arguments)
        eager = run(*arguments)
        expected = torch.autograd.grad(eager.sum(), inputs)
        out = compiled(*arguments)
        assert torch.equal(out, eager)
        for mine, other in zip(torch.autograd.grad(out.sum(), inputs), expected, strict=True):
            assert torch.equal(mine, other)
        assert torch.equal(counted(*arguments), eager)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[1]


@pytest.mark.parametrize("name", OPS)
def test_two_runs_give_the_same_bits(name: str, device: str) -> None:
    arguments, keywords = sample(name, "contiguous", torch.float32, device)

    def results() -> list[torch.Tensor]:
        out = op(name)(*arguments, **keywords)
        return [r.clone() for r in (keywords.values() if out is None else out if isinstance(out, tuple) else (out,))]

    for a, b in zip(results(), results(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", OPS)
def test_replay_of_a_captured_graph_gives_the_bits_of_a_call(name: str) -> None:
    arguments, keywords = sample(name, "contiguous", torch.float32, "cuda")

    def results() -> list[torch.Tensor]:
        with torch.no_grad():
            out = op(name)(*arguments, **keywords)
        return list(keywords.values() if out is None else out if isinstance(out, tuple) else (out,))

    expected = [r.clone() for r in results()]
    graph = torch.cuda.CUDAGraph()
    with capture(graph):  # one that fails leaves the next test alone
        kept = results()
    for value in kept:
        value.zero_()
    graph.replay()
    for value, right in zip(kept, expected, strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("name", [name for name in OPS if name.endswith(".out")])
def test_out_forms_equal_the_functional_ones(name: str, device: str) -> None:
    arguments, keywords = sample(name, "contiguous", torch.float32, device)
    expected = op(name.removesuffix(".out"))(*arguments)
    versions = [out._version for out in keywords.values()]
    op(name)(*arguments, **keywords)
    assert all(out._version > before for out, before in zip(keywords.values(), versions, strict=True))
    for value, out in zip(expected if isinstance(expected, tuple) else (expected,), keywords.values(), strict=True):
        assert torch.equal(value, out)


def test_autocast_keeps_the_loss_in_float32(device: str) -> None:
    y_t, y_r, scale, *_ = op_samples.mmd_loss("contiguous", torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        assert imm.functional.mmd_loss(y_t, y_r, scale).dtype == torch.float32
        x = torch.randn(2, 3, device=device)
        one = torch.ones(1, dtype=torch.float64, device=device)
        assert torch.ops.imm.flow_step(x, x, one, one, None, None, None, None, 0).dtype == torch.float32


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_import_is_quiet_and_light() -> None:
    code = "import sys, imm; print([m for m in ('triton', 'matplotlib', 'PIL', 'click', 'diffusers') if m in sys.modules]);"
    result = run(code + "import torch; assert not torch.cuda.is_initialized()")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


def test_rooms_are_imported_when_they_are_asked_for() -> None:
    code = "import sys, imm; assert not sys.modules.keys() & {'imm.data', 'imm.evaluation', 'imm.training'};"
    result = run(code + "print(*(f.__name__ for f in (imm.evaluation.evaluate, imm.data.load, imm.training.Trainer)))")
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "evaluate load Trainer", "")


def test_forced_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table; tests/test_native.py has what an import makes of it."""
    request, ops = dispatch.Request(torch.device("cpu"), torch.float32), ("noise", "noise.out")
    monkeypatch.setenv("IMM_IMPL", "noise:reference")
    assert [dispatch.select(name, request).name for name in ops] == ["reference"] * 2
    wrong = run("import imm", IMM_IMPL="mmd_loss:fastest")
    assert wrong.returncode != 0
    assert "IMM_IMPL: expected OP:IMPLEMENTATION" in wrong.stderr
    assert "mmd_loss:fastest" in wrong.stderr


def test_no_implementation_states_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    request = dispatch.Request(torch.device("cpu"), torch.float32)
    refusing = dispatch.Implementation("reference", lambda: None, lambda request: f"not on {request.device}")
    monkeypatch.setitem(dispatch._TABLE, "noise", [refusing])
    with pytest.raises(RuntimeError, match="reference: not on cpu"):
        dispatch.select("noise", request)
