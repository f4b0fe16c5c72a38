"""bench/check_kernels.py on the CPU, which is compared with itself."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from imm.ops import dispatch

pytest.importorskip("triton")
import check_kernels


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on = check_kernels.on
    monkeypatch.setattr(check_kernels, "on", lambda device, values: on("cpu", values))
    reference = lambda row, rows: dispatch.Implementation("triton", rows[-1].run) if row.name == "triton" else row
    for op, rows in list(dispatch._TABLE.items()):
        monkeypatch.setitem(dispatch._TABLE, op, [reference(row, rows) for row in rows])


def program(path: Path, output: str, stream: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat >&{stream} <<'END'\n{output}\nEND\n")
    path.chmod(0o755)
    return path


def test_options_reach_every_process_and_one_that_dies_is_said(monkeypatch, tmp_path: Path, capfd) -> None:
    script = tmp_path / "script.py"
    text = "import os, sys\nprint(*sys.argv[1:], os.environ.get('TRITON_PTXAS_PATH', ''), flush=True)\n"
    script.write_text(f"{text}os.abort() if '--part 1' in ' '.join(sys.argv) else 0\n")
    monkeypatch.setattr(check_kernels, "__file__", str(script))
    sizes = [check_kernels.random_attention(seed) for seed in range(50)]
    assert sizes[5] == check_kernels.random_attention(5) != sizes[6]
    assert all(d % 8 == 0 and 8 <= d <= 128 and T >= 1 for of in sizes for _, T, _, d in of)  # such as it takes
    ptxas = program(tmp_path / "ptxas", "Cuda compilation tools, release 99.1, V99.1.7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.setattr(sys, "argv", ["x", "--jobs", "2", "--repeat", "100", "--seed", "5", "--ptxas", str(ptxas)])
    assert check_kernels.main() == 1
    parts = [f"--seed=5 --repeat=100 --part {i} --jobs 2 {ptxas}" for i in range(2)]
    assert capfd.readouterr().out.splitlines() == [
        f"ptxas of --ptxas={ptxas}: release 99.1, V99.1.7",
        f"attention of --seed=5: {sizes[5]}",
        *parts,
        f"after {parts[1]}: FAILED: the process ended with -6",
    ]


def test_the_assembler_is_that_of_the_toolkit_and_tritons_cache_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nvcc may be a wrapper far from its toolkit."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    def key() -> str:
        compiler.get_ptxas_version.cache_clear()
        return compiler.CUDABackend(GPUTarget("cuda", 90, 32)).hash()

    ptxas = program(tmp_path / "cuda" / "bin" / "ptxas", "Cuda compilation tools, release 99.1, V99.1.7")
    program(tmp_path / "path" / "nvcc", f"#$ _HERE_=x\n#$ TOP={tmp_path}/cuda/bin/..", stream=2)
    monkeypatch.setenv("PATH", f"{tmp_path}/path:{os.environ['PATH']}")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    before = key()
    assert check_kernels.use_ptxas("toolkit") == "release 99.1, V99.1.7"
    assert os.environ["TRITON_PTXAS_PATH"] == str(ptxas)
    assert key() != before
    compiler.get_ptxas_version.cache_clear()
    program(ptxas, "no such thing")
    with pytest.raises(FileNotFoundError, match="expected an assembler that names its release, got"):
        check_kernels.use_ptxas(str(ptxas))
    ptxas.unlink()
    with pytest.raises(FileNotFoundError, match="bin/ptxas"):
        check_kernels.use_ptxas("toolkit")


@pytest.mark.parametrize("small", [True, False])
def test_every_check_of_the_kernels(small: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every op that has a kernel is checked, and all of the checks are made whatever the number of processes."""
    monkeypatch.setattr(check_kernels, "MMD_SIZES", ((4, 37),))
    groups = check_kernels.checked(None if small else 5)
    assert check_kernels.run_part(groups) == 0
    alone = capsys.readouterr().out.splitlines()
    assert all(": ok, largest error" in line for line in alone)
    checked = {re.match(r"(?:imm::|triton )(\w+)", line)[1] for line in alone}
    with_kernels = {op for op in dispatch.names() if {"cuda", "triton"} & {i.name for i in dispatch._TABLE[op]}}
    assert {op for op in with_kernels if not op.endswith(".out")} <= checked
    assert any(line.startswith("triton noise ") for line in alone)


def test_wrong_results_other_bits_and_a_device_that_does_not_answer(monkeypatch, capsys) -> None:
    changes = iter((0.0, 0.0, 1e-7, 0.0, 0.0))

    def broken(*given: Any) -> None:
        raise RuntimeError("an illegal access")

    one, nan = torch.ones(2), torch.tensor([float("nan")])
    assert check_kernels.same_bits(nan, nan.clone())
    assert not check_kernels.same_bits(torch.zeros(1), -torch.zeros(1))
    assert not check_kernels.check("moody", lambda x: x + next(changes), (one,), [one], 1e-3, 5)
    assert not check_kernels.check("wrong", lambda x: 0 * x, (one,), [one], 1e-3, 1)
    assert not check_kernels.check("broken", broken, (one,), [one], 1e-3, 1)
    assert capsys.readouterr().out.splitlines() == [
        "moody: WRONG, largest error 0.0e+00, other bits in 1 of 5 launches",
        "wrong: WRONG, largest error 1.0e+00",
        "broken: FAILED: RuntimeError: an illegal access",
    ]
    monkeypatch.setattr(check_kernels, "check", lambda *given: print(given[0]) is not None)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert check_kernels.run_part(check_kernels.checked(None)) == 1
    _, second = capsys.readouterr().out.splitlines()
    assert second.startswith("the device does not answer")
