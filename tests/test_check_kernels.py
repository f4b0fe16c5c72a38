"""bench/check_kernels.py: what of it can be tried without a GPU. Its checks themselves: tests/test_gpu_suite.py."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def check_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("check_kernels")
    monkeypatch.setattr(module, "on", lambda device, values: values)
    return module


def program(path: Path, output: str, stream: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat >&{stream} <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


def test_results_of_other_bits_are_wrong(check_kernels: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def steady() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(2), torch.zeros(0)

    def moody() -> torch.Tensor:
        calls.append(len(calls))
        return torch.ones(2) + 1e-7 * (len(calls) == 3)

    assert check_kernels.check("steady", steady, (), steady(), 1e-3, 5)
    assert not check_kernels.check("moody", moody, (), torch.ones(2), 1e-3, 5)
    assert len(calls) == 5
    assert check_kernels.check("moody", moody, (), torch.ones(2), 1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "steady: ok, largest error 0.0e+00"
    assert lines[1] == "moody: WRONG, largest error 0.0e+00, other bits in 1 of 5 launches"


def test_the_same_bits(check_kernels: ModuleType) -> None:
    same, nan = check_kernels.same_bits, torch.tensor([float("nan"), 1.0])
    assert same(nan, nan.clone())
    assert same((nan.bfloat16(), torch.tensor(2)), (nan.bfloat16(), torch.tensor(2)))
    rows = torch.randn(2, 3)
    assert same(rows.t(), rows.t().contiguous())
    assert not same(torch.zeros(1), -torch.zeros(1))
    assert not same(torch.zeros(2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="shorter"):
        same((nan, nan), (nan,))


def test_sizes_of_a_seed(check_kernels: ModuleType) -> None:
    """The same for the same seed, and such as attention takes."""
    sizes = [check_kernels.random_attention(seed) for seed in range(50)]
    assert sizes[7] == check_kernels.random_attention(7) != sizes[8]
    assert all(d % 8 == 0 and 8 <= d <= 128 and T >= 1 for of in sizes for _, T, _, d in of)
    assert all(of[1][1] % 16 == of[3][1] % 16 == 0 for of in sizes)
    assert len({d for of in sizes for *_, d in of}) == 16


def test_options_reach_every_process(
    check_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(*sys.argv[1:], os.environ.get('TRITON_PTXAS_PATH'))\n")
    ptxas = program(tmp_path / "ptxas", "Cuda compilation tools, release 99.1, V99.1.7")
    monkeypatch.setattr(check_kernels, "__file__", str(script))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.setattr(sys, "argv", ["x", "--jobs", "2", "--repeat", "100", "--seed", "5", "--ptxas", str(ptxas)])
    assert check_kernels.main() == 0
    first, second, *rest = capfd.readouterr().out.splitlines()
    assert first == f"ptxas of --ptxas={ptxas}: release 99.1, V99.1.7"
    assert second == f"attention of --seed=5: {check_kernels.random_attention(5)}"
    assert rest == [f"--seed=5 --repeat=100 --part {i} --jobs 2 {ptxas}" for i in range(2)]


def test_one_process_checks_the_sizes_of_the_seed_as_often_as_asked(
    check_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = []
    monkeypatch.setattr(check_kernels, "run_part", lambda *given: parts.append(given) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options in (["--seed", "5", "--repeat", "3"], ["--small"], ["--part", "1", "--jobs", "4", "--seed", "5"], []):
        monkeypatch.setattr(sys, "argv", ["x", *options])
        assert check_kernels.main() == 0
    sizes = (*check_kernels.ATTENTION, *check_kernels.random_attention(5))
    assert [(index, of, given["ATTENTION"], repeat) for index, of, given, repeat in parts[:3]] == [
        (0, 1, sizes, 3),
        (0, 1, check_kernels.SMALL["ATTENTION"], 1),
        (1, 4, sizes, 1),
    ]
    seeds = re.findall(r"--seed=(\d+)", capsys.readouterr().out)
    assert parts[3][2]["ATTENTION"][len(check_kernels.ATTENTION) :] == check_kernels.random_attention(int(seeds[-1]))


def test_the_assembler_is_that_of_the_toolkit_and_tritons_cache_knows(
    check_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """nvcc may be a wrapper far from its toolkit."""
    pytest.importorskip("triton")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    ptxas = program(tmp_path / "cuda" / "bin" / "ptxas", "Cuda compilation tools, release 99.1, V99.1.7")
    program(tmp_path / "path" / "nvcc", f"#$ _HERE_=x\n#$ TOP={tmp_path}/cuda/bin/..", stream=2)
    monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    target = GPUTarget("cuda", 90, 32)
    before = compiler.CUDABackend(target).hash()
    assert check_kernels.use_ptxas("toolkit") == "release 99.1, V99.1.7"
    assert (knobs.nvidia.ptxas.path, knobs.nvidia.ptxas.version) == (str(ptxas), "99.1")
    compiler.get_ptxas_version.cache_clear()
    assert compiler.CUDABackend(target).hash() != before
    compiler.get_ptxas_version.cache_clear()
    program(ptxas, "no such thing")
    with pytest.raises(FileNotFoundError, match="expected an assembler that names its release, got"):
        check_kernels.use_ptxas(str(ptxas))
    ptxas.unlink()
    with pytest.raises(FileNotFoundError, match="expected ptxas in nvcc's toolkit, got"):
        check_kernels.toolkit_ptxas()
