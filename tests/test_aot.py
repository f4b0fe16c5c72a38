"""Every Triton configuration that a launcher can choose compiles for sm_90 without a GPU, spills nothing, moves 16 bytes an
access where it should, and does not write to what a running product reads. make test compiles a few of them."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

import aot_report

#: Of imm_kernels, those with kernels.
FILES = ("adaln", "attention", "attention_jvp", "energy_score", "mmd_direct", "mmd_dot", "mmd_gram", "noise")
FILES += ("timestep_embedding",)


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.full)], ids=["quick", "all"])
def test_configurations_compile_wide_and_without_spills(quick: bool) -> None:
    command = [sys.executable, aot_report.__file__, "--arch", "90", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:]
    assert len(rows) > (30 if quick else 400)
    files = {name: Path(importlib.import_module(f"imm_kernels.{name}").__file__).read_text() for name in FILES}
    kernels = {f"{name}.{found}" for name, text in files.items() for found in re.findall(r"^def (_\w+_kernel)\(", text, re.M)}
    assert {row.split()[0] for row in rows} == kernels


def test_what_is_wrong_is_said() -> None:
    numbers = {"warps": 4, "stack": 0, "spills": 0, "shared": 0}
    good = aot_report.Usage(registers=32, loads={64: 2, 128: 4}, stores={128: 1}, **numbers)
    assert aot_report.problems(good, (3, 1), only_wide=True) == []
    assert good.occupancy(90) == 16
    bad = dataclasses.replace(good, registers=255, spills=12, shared=100_000, loads={32: 8}, stores={32: 2})
    found = aot_report.problems(bad, (3, 1), only_wide=True)
    assert [p.partition(" ")[0] for p in found] == ["spills", "expected", "expected", "expected"]
    assert bad.occupancy(90) == 2
    assert aot_report.problems(good, (3, 1), products=True) == ["expected products by tensor cores, got none"]
    assert aot_report.problems(dataclasses.replace(good, products=4), (3, 1), products=True) == []
    (overwrites,) = aot_report.problems(dataclasses.replace(good, overwrites=2), (3, 1))
    assert overwrites == "expected no write to a register that a running wgmma reads, got 2"


def test_what_a_kernel_should_move() -> None:
    least = aot_report.least_wide
    assert least("mmd_direct._gradient_kernel", {"M": 4}, {"t.y": "*bf16"}) == (8, 4)
    assert least("mmd_direct._gradient_kernel", {"M": 6}, {"t.y": "*bf16"}) == (0, 0)  # 8 bytes a thread
    assert least("mmd_direct._partial_kernel", {"M": 4}, {"t.y": "*bf16", "t.x": "*fp32"}) == (16, 0)
    assert least("adaln._adaln_fwd_kernel", {"y_ptr": None}, {}) == (2, 1)
    assert least("adaln._adaln_fwd_kernel", {}, {}) == (4, 2)
    forward = "attention._attention_fwd_kernel"
    assert [least(forward, {"D": d}, {"qkv_ptr": kind}) for d, kind in ((40, "*bf16"), (40, "*fp32"), (8, "*fp32"))] == [
        (3, 1),
        (2, 1),
        (0, 0),
    ]
    assert least("energy_score._line_kernel", {"N": 8}, {"x.ptr": "*bf16"}) == (9, 8)
    assert least("energy_score._line_kernel", {"N": 9}, {"x.ptr": "*bf16"}) == (0, 0)
    assert least("energy_score._small_kernel", {"D": 128, "BLOCK_D": 128, "CHUNKS": 8}, {}) == (8, 8)
    assert least("energy_score._small_kernel", {"D": 90, "BLOCK_D": 128, "CHUNKS": 8}, {}) == (0, 0)


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
def test_a_write_to_what_a_running_product_reads_is_found(instruction: str) -> None:
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
def test_what_only_reads_them_is_not(instruction: str) -> None:
    line = f"        /*0120*/                   {instruction} ;"
    assert aot_report.overwritten(RUNNING.format(between=line, after="")) == []


def test_a_loop_may_come_back_to_the_write() -> None:
    """The write is above the product, and no wait is between them on the way back."""
    back = "        /*0120*/               @P0 BRA `(.L_x_0) ;"
    text = RUNNING.format(between=back, after="")
    write = ".L_x_0:\n        /*0090*/                   MOV R25, R4 ;"
    assert aot_report.overwritten(write + text) == ["MOV R25, R4"]
    assert aot_report.overwritten(write + RUNNING.format(between="", after=back)) == []
