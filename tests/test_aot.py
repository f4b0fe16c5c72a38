"""Every Triton configuration that a launcher can choose compiles for sm_90 without a GPU, spills nothing, moves 16 bytes an
access where it should, and does not write to what a running product reads. make test compiles a few of them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

REPORT = Path(__file__).parents[1] / "bench" / "aot_report.py"


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.full)], ids=["quick", "all"])
def test_configurations_compile_wide_and_without_spills(quick: bool) -> None:
    command = [sys.executable, REPORT, "--arch", "90", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) > (30 if quick else 400)
    for kernel in (
        "flow_step",
        "noise",
        "mmd resident",
        "mmd products",
        "mmd pairs",
        "mmd gram",
        "attention",
        "adaln",
        "timestep",
    ):
        assert any(kernel in row for row in rows), kernel


@pytest.fixture
def aot_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPORT.parent))
    return importlib.import_module("aot_report")


def test_what_is_wrong_is_said(aot_report: ModuleType) -> None:
    first = aot_report.CONFIGURATIONS[0]
    good = aot_report.Usage(registers=32, stack=0, spills=0, shared=0, loads={64: 2, 128: 4}, stores={128: 1})
    assert aot_report.problems(first, good) == []
    assert good.occupancy(4, 90) == 16
    bad = aot_report.Usage(registers=255, stack=8, spills=12, shared=100_000, loads={32: 8}, stores={32: 2})
    assert [p.partition(" ")[0] for p in aot_report.problems(first, bad)] == ["spills", "expected", "expected", "expected"]
    assert bad.occupancy(4, 90) == 2
    products = dataclasses.replace(first, tensor_cores=True)
    assert aot_report.problems(products, good) == ["expected products by tensor cores, got none"]
    assert aot_report.problems(products, dataclasses.replace(good, tensor_cores=4)) == []
    (overwrites,) = aot_report.problems(first, dataclasses.replace(good, overwrites=2))
    assert overwrites == "expected no write to a register that a running wgmma reads, got 2"


def test_the_quick_selection_has_every_kernel_and_size_of_number(aot_report: ModuleType) -> None:
    everything, few = aot_report.CONFIGURATIONS, [aot_report.CONFIGURATIONS[i] for i in aot_report.quick()]
    assert {c.kernel for c in few} == {c.kernel for c in everything}
    of_16_bits = [
        {(c.kernel, "*bf16" in types or "*fp16" in types) for c in chosen for types in [c.signature.values()]}
        for chosen in (everything, few)
    ]
    assert of_16_bits[0] == of_16_bits[1]
    assert any(c.constexprs.get("EXACT_BF16") for c in few)
    assert len(few) < len(everything) / 6


#: As nvdisasm writes it: a product whose A is in R24 to R27, and the wait for it.
RUNNING = """
.L_x_1:
        /*0100*/                   WARPGROUP.ARRIVE ;
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56, gsb0 ;
{between}
        /*0200*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
{after}
        /*0300*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "instruction",
    [
        "MOV R27, R4",
        "@!P0 FADD R24, R28, R29",
        "LDG.E.128 R22, desc[UR4][R2.64]",
        "IMAD.WIDE R26, R4, 0x4, R2",
        "CS2R R26, SRZ",
        "LDSM.16.MT88.4 R24, [R3]",
        "HMMA.16816.F32.BF16 R24, R4, R8, R24",
        "F2F.F64.F32 R24, R5",
        "SHFL.BFLY PT, R25, R4, 0x2, 0x1f",
        "LOP3.LUT P0, R25, R4, 0x3, RZ, 0xc0, !PT",
    ],
)
def test_a_write_to_what_a_running_product_reads_is_found(aot_report: ModuleType, instruction: str) -> None:
    line = f"        /*0120*/                   {instruction} ;"
    assert aot_report.overwritten(RUNNING.format(between=line, after="")) == [instruction.removeprefix("@!P0 ")]
    assert aot_report.overwritten(RUNNING.format(between="", after=line)) == []


@pytest.mark.parametrize(
    "instruction",
    [
        "FADD R28, R24, R25",
        "LDS.128 R20, [R3+UR4]",
        "STS.128 [R24+UR4], R24",
        "STG.E.128 desc[UR4][R24.64], R24",
        "ISETP.GE.AND P0, PT, R24, R25, PT",
        "FCHK P0, R24, R25",
        "R2UR UR24, R25",
        "BAR.SYNC R24, R25",
        "LDS RZ, [RZ]",
        "LOP3.LUT P0, RZ, R24, 0x3, RZ, 0xc0, !PT",
        "HGMMA.64x64x16.F32.BF16 R88, R24, gdesc[UR8], R88, gsb0",
    ],
)
def test_what_only_reads_them_is_not(aot_report: ModuleType, instruction: str) -> None:
    line = f"        /*0120*/                   {instruction} ;"
    assert aot_report.overwritten(RUNNING.format(between=line, after="")) == []


def test_a_loop_may_come_back_to_the_write(aot_report: ModuleType) -> None:
    """The write is above the product, and no wait is between them on the way back."""
    back = "        /*0120*/               @P0 BRA `(.L_x_0) ;"
    text = RUNNING.format(between=back, after="")
    write = ".L_x_0:\n        /*0090*/                   MOV R25, R4 ;"
    assert aot_report.overwritten(write + text) == ["MOV R25, R4"]
    assert aot_report.overwritten(write + RUNNING.format(between="", after=back)) == []
