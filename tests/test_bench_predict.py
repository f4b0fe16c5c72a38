"""Floors on machines: what they follow from, figures worked out by hand, and the comparison with measured rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from command_line import refused, said

from harness import case as declared
from harness import measure, predict
from harness.case import load, operations
from harness.predict import MACHINES, Machine

CUDA = torch.device("cuda")


def at(op: str, *shape: Any, bf16: bool = False, **options: Any) -> declared.Case:
    return load(op).case(*shape, CUDA, **options, **({"dtype": torch.bfloat16} if bf16 else {}))


FORWARD, BF16 = {"bf16": True, "backward": False}, {"bf16": True}


@pytest.mark.parametrize(
    ("op", "shape", "options", "microseconds"),
    [
        ("mmd", (1024, 4, 4096), BF16, 23.4),  # loss and gradient of B = G M images: 3 B D numbers at 4.3 TB/s
        ("flow_map_mmd", (1024, 4, 4096), BF16, 54.7),  # 14 bytes a number: 235 MB
        ("attention", (128, 256, 16, 72), FORWARD, 70),  # q, k, v and the result: 4 T C numbers a row
        ("adaln", (128, 256, 1152), FORWARD, 70),  # as many of the fused residual and norm
        ("dit", ("XL", 128), BF16, 38_400),  # 237 GFLOP a row at 790 TFLOP/s
        ("sampler", ("XL", 8, 64), BF16, 8 * 38_400),  # two rows an image with guidance
        ("tokens", ("MAR-B", 2, 1), BF16, 21.9),  # 21.8 million weights once, 12.6 million at each of two steps
        ("tokens", ("MAR-H", 100, 1), BF16, 2680),  # 91.7 million once, 56.7 million at each step
    ],
)
def test_floors_worked_out_by_hand(op: str, shape: tuple[Any, ...], options: dict[str, Any], microseconds: float) -> None:
    found = predict.case_floor(MACHINES["h200"], at(op, *shape, **options))
    assert 1e6 * found.seconds == pytest.approx(microseconds, rel=0.01, abs=0.05)
    assert found.bound == ("products bfloat16" if op in ("dit", "sampler") else "memory")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("op", operations())
def test_to_declare_cases_makes_nothing_and_needs_no_gpu(op: str, device: str) -> None:
    found, _, bytes_made = measure._cpu(lambda: list(load(op).cases(torch.device(device), quick=False)))
    assert found
    assert bytes_made < 1000  # a few numbers
    assert len({(case.mode, case.size, case.dtype) for case in found}) == len(found)
    assert all(case.op == op and case.peers and case.bytes > 0 for case in found)


def test_the_command_prints_a_table_without_a_gpu() -> None:
    """Attention of 256 tokens reads keys and values once where heads are many, four times where they are few. In 16 bits the
    MMD issues 26,900 warp instructions a group, four a cycle on 132 multiprocessors."""
    outputs = {name: said("bench", f"--predict={name}") for name in ("h100", "h200")}
    lines = [" ".join(line.split()) for line in outputs["h200"].splitlines()]
    mmd, attention = "mmd loss + gradient G=1024 M=4 D=4096", "attention forward B=128 T=256 H=16 d=72 bfloat16"
    for expected in (
        f"{mmd} float32 memory; our kernel: memory 201.33 MB 0.70 GF 46.8 us 10.5 us 46.8 us 46.8 us",
        f"{mmd} bfloat16 memory; our kernel: issue slots 100.67 MB 0.70 GF 23.4 us 10.5 us 23.4 us 26.3 us",
        f"{attention} memory; our kernel: memory 301.99 MB 38.65 GF 70.2 us 48.9 us 70.2 us 70.2 us",
        f"{attention.replace('128', '2')} memory (in L2); our kernel: L2 4.72 MB 0.60 GF 1.1 us 0.8 us 1.1 us 1.9 us",
        "mmd loss + gradient G=64 M=64 D=4096 float32 memory 201.33 MB 10.74 GF 46.8 us 21.7 us 46.8 us -",
        f"{mmd.replace('1024', '16')} float32 memory (in L2); our kernel: memory 3.15 MB 0.01 GF 0.7 us 0.2 us 0.7 us 0.7 us",
    ):
        assert expected in lines
    assert {line.split()[0] for line in lines if line} >= set(operations())
    assert "; our kernel: " not in outputs["h100"]
    assert len(said("bench", "mmd", "--predict=h200", "--quick")) < len(said("bench", "mmd", "--predict=h200"))
    unknown = f"Error: predict: expected one of {list(MACHINES)}, got 'h1000'"
    assert refused("bench", "--predict=h1000") == unknown
    assert refused("bench", "nothing", "--predict=h100").startswith("Error: op: expected one of")
    assert refused("bench", "--predict=h100", "--device=cpu").startswith("Error: predict: expected OP and --quick")


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_the_table_is_consistent(machine: Machine) -> None:
    """Slips of the pen: a rate with sparsity, TB for GB, a measured rate above the stated one."""
    peak = machine.peak
    assert peak["products bfloat16"] == peak["products float16"] == pytest.approx(2 * peak["products float32"], rel=0.03)
    assert peak["vector float64"] <= peak["products float64"] <= peak["vector float32"] < 1e14
    assert 1e11 < peak["memory"] < 1e13
    assert all(0.7 < rate / peak[unit] < 1.0 for unit, rate in machine.reached.items())


def test_the_slower_of_memory_and_arithmetic_is_the_floor() -> None:
    """The rate that binds it moves it and no other; a measured rate takes the place of the stated one; normals are float64."""
    h200 = replace(MACHINES["h200"], reached={})
    adaln, dit = at("adaln", 128, 256, 1152, **FORWARD), at("dit", "XL", 128, bf16=True)
    for case, unit, other in ((adaln, "memory", "vector float32"), (dit, "products bfloat16", "memory")):
        before = predict.case_floor(h200, case)
        assert (before.bound, before.seconds) == (unit, max(before.memory, before.arithmetic))
        for halved, factor in ((unit, 2), (other, 1)):
            after = predict.case_floor(replace(h200, reached={halved: h200.peak[halved] / 2}), case)
            assert after.seconds == pytest.approx(factor * before.seconds)
    noise = at("noise", 256, 3072)
    assert predict.case_floor(h200, noise).arithmetic == pytest.approx(6 * 256 * 3072 / 33.5e12)
