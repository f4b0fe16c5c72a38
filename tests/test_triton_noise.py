"""The Triton noise against the bits of the reference, in Triton's interpreter and on CUDA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from interpreter import DEVICE, in_the_interpreter, kernel_test

from imm.ops import dispatch
from imm.ops.noise import noise as reference

pytest.importorskip("triton")


test_in_the_interpreter = in_the_interpreter(__file__)


@kernel_test
@pytest.mark.parametrize("step", [0, 1, 16, 2**32 - 1, 2**32 + 5, 2**62], ids=str)
@pytest.mark.parametrize("numel", [0, 1, 3, 4, 37, 1024, 2500])
def test_it_has_the_bits_of_the_reference(numel: int, step: int) -> None:
    from imm_kernels.noise import noise

    seeds = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**63 - 1, -1], device=DEVICE)
    for chosen in (seeds, seeds[::3], seeds[:1], seeds[:0]):
        for scale in (1.0, 0.3):
            assert torch.equal(noise(chosen, numel, step, scale).cpu(), reference(chosen.cpu(), numel, step, scale))


@kernel_test
def test_the_table_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the native library is built with CUDA, its kernels come first.
    monkeypatch.setenv(dispatch.VARIABLE, "noise:triton")
    chosen = dispatch.select("noise", dispatch.Request(torch.device("cuda"), torch.int64))
    assert chosen.name == "triton"
    seeds = torch.tensor([2**33 + 1, 7], device=DEVICE)
    assert torch.equal(chosen.run(seeds, 37, 3), reference(seeds, 37, 3))


def test_the_predicate_names_its_reason() -> None:
    def reason(device: str) -> str | None:
        return dict(dispatch.explain("noise", dispatch.Request(torch.device(device), torch.int64)))["triton"]

    assert reason("cpu") == "needs tensors on cuda, got cpu"
    assert reason("cuda") is None


def test_importing_imm_does_not_import_triton() -> None:
    code = "import sys, imm, imm.ops; assert not any(m.partition('.')[0] in ('triton', 'imm_kernels') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
