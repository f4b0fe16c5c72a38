"""Floors on machines: what they follow from, figures worked out by hand, and the comparison with measured rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from imm.benchmark import case as declared
from imm.benchmark import load, machines, operations, predict, rows
from imm.benchmark.machines import MACHINES, Machine
from imm.cli import main

CUDA = torch.device("cuda")
#: 1 GB/s, 4 GFLOP/s of products, 2 GFLOP/s else.
TOY = Machine(
    name="toy",
    devices=("Toy",),
    peak={"memory": 1e9, "products float32": 4e9, "products bfloat16": 8e9, "vector float32": 2e9},
    source="made up",
    l2=1000,
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["bench", *arguments])


def test_the_slower_of_memory_and_arithmetic_is_the_floor() -> None:
    moving, adding = (predict.floor(TOY, size, 1e6, "vector float32") for size in (2e6, 1e5))
    assert moving is not None
    assert adding is not None
    assert (moving.memory, moving.arithmetic, moving.seconds, moving.bound) == (2e-3, 5e-4, 2e-3, "memory")
    assert (adding.seconds, adding.bound) == (5e-4, "vector float32")
    assert predict.floor(TOY, 1e6, 0, "products float64") == predict.Floor(1e-3, 0.0, "products float64")
    assert predict.floor(TOY, 1e6, 1, "products float64") is None


def test_floors_follow_the_rate_that_binds_them_and_no_other() -> None:
    cases = [case for op in ("attention", "dit", "mmd") for case in load(op).cases(CUDA, quick=False)]
    h200 = MACHINES["h200"]
    slow_memory = replace(h200, reached={**h200.reached, "memory": h200.reached["memory"] / 2})
    slow_products = replace(h200, reached={**h200.reached, "products bfloat16": h200.reached["products bfloat16"] / 2})
    bounds = set()
    for case in cases:
        before, memory, products = (predict.case_floor(machine, case) for machine in (h200, slow_memory, slow_products))
        assert before is not None
        assert memory is not None
        assert products is not None
        bounds.add(before.bound)
        assert memory.memory == pytest.approx(2 * before.memory)
        assert memory.arithmetic == before.arithmetic
        if before.bound == "memory":
            assert memory.seconds == pytest.approx(2 * before.seconds)
        elif before.arithmetic > 2 * before.memory:
            assert memory.seconds == before.seconds
        if before.unit == "products bfloat16":
            assert products.arithmetic == pytest.approx(2 * before.arithmetic)
        else:
            assert products == before
    assert bounds == {"memory", "products bfloat16"}


def test_a_measured_rate_takes_the_place_of_the_stated_one() -> None:
    assert TOY.rate("memory") == 1e9
    assert replace(TOY, reached={"memory": 9e8}).rate("memory") == 9e8
    assert TOY.rate("products float64") is None


@pytest.mark.parametrize("machine", MACHINES.values(), ids=lambda machine: machine.name)
def test_the_table_is_consistent(machine: Machine) -> None:
    """Slips of the pen: a rate with sparsity, TB for GB, a measured rate above the stated one."""
    peak = machine.peak
    assert set(peak) == {"memory", *(f"products {t}" for t in ("bfloat16", "float16", "float32", "float64"))} | {
        "vector float32",
        "vector float64",
    }
    assert peak["products bfloat16"] == peak["products float16"] == pytest.approx(2 * peak["products float32"], rel=0.03)
    assert 1.0 <= peak["products float32"] / peak["vector float32"] < 15
    assert peak["vector float64"] <= peak["products float64"] <= peak["vector float32"] < 1e14
    assert all(0.7 < rate / peak[unit] < 1.0 for unit, rate in machine.reached.items())
    assert bool(machine.measured) == bool(machine.reached)
    assert len(machine.source) > 20
    assert machine.l2 is not None
    assert machine.memory is not None
    assert machine.multiprocessors is not None
    # Per multiprocessor and clock, 128 or (A100) 64 lanes of two flops: the clock that the float32 rate implies.
    lanes = 64 if machine.name.startswith("A100") else 128
    assert 1.3e9 < peak["vector float32"] / (2 * lanes * machine.multiprocessors) < 2.6e9
    assert 1e10 < machine.memory < 2e11
    assert machine.l2 < 2e8


def at(op: str, *shape: Any, bf16: bool = False, **options: Any) -> declared.Case:
    return load(op).case(*shape, CUDA, **options, **({"dtype": torch.bfloat16} if bf16 else {}))


FORWARD, BF16 = {"bf16": True, "backward": False}, {"bf16": True}


@pytest.mark.parametrize(
    ("op", "shape", "options", "microseconds"),
    [
        # Loss and gradient of B = G M images: 3 B D numbers at 4.3 TB/s.
        ("mmd", (1024, 4, 4096), {}, 46.8),
        ("mmd", (1024, 4, 4096), BF16, 23.4),
        ("mmd", (1024, 4, 3072), {}, 35.1),
        ("mmd", (1024, 4, 3072), BF16, 17.6),
        ("mmd", (32, 16, 16384), {}, 23.4),
        ("mmd", (32, 16, 16384), BF16, 11.7),
        ("mmd", (256, 16, 4096), {}, 46.8),
        ("mmd", (64, 64, 4096), {}, 46.8),
        ("mmd", (128, 4, 65536), {}, 93.6),
        ("mmd", (16, 4, 4096), {}, 0.7),
        # 14 bytes a number: 235 MB.
        ("flow_map_mmd", (1024, 4, 4096), BF16, 54.7),
        # q, k, v and the result: 4 T C numbers a row; as many of the fused residual and norm.
        ("attention", (2, 256, 16, 72), FORWARD, 1.1),
        ("attention", (16, 256, 16, 72), FORWARD, 8.8),
        ("attention", (128, 256, 16, 72), FORWARD, 70),
        ("attention", (512, 256, 16, 72), FORWARD, 281),
        ("adaln", (128, 256, 1152), FORWARD, 70),
        # 237 GFLOP a row at 790 TFLOP/s; two rows an image with guidance.
        ("dit", ("XL", 2), BF16, 600),
        ("dit", ("XL", 16), BF16, 4_800),
        ("dit", ("XL", 128), BF16, 38_400),
        ("dit", ("XL", 512), BF16, 153_500),
        ("sampler", ("XL", 1, 1), BF16, 600),
        ("sampler", ("XL", 8, 64), BF16, 8 * 38_400),
    ],
)
def test_floors_worked_out_by_hand(op: str, shape: tuple[Any, ...], options: dict[str, Any], microseconds: float) -> None:
    found = predict.case_floor(MACHINES["h200"], at(op, *shape, **options))
    assert found is not None
    assert 1e6 * found.seconds == pytest.approx(microseconds, rel=0.01, abs=0.05)
    assert found.bound == ("products bfloat16" if op in ("dit", "sampler") else "memory")


def test_a_loop_needs_what_its_network_needs() -> None:
    """Of one step not less; of more the weights of blocks and ends each time, those of adaLN and embedders once."""
    network, *loops = at("dit", "XL", 2, bf16=True), *(at("sampler", "XL", steps, 1, bf16=True) for steps in (1, 8))
    assert network.bytes < loops[0].bytes < 1.001 * network.bytes
    features, depth, patch = 1152, 28, 16
    block = 12 * features**2 + 9 * features
    ends = 2 * patch * features + features + patch
    each = 2 * (depth * block + ends + 2 * 2 * 4096)
    assert loops[1].bytes == loops[0].bytes + 7 * each
    assert (loops[0].flops, loops[1].flops) == (network.flops, 8 * network.flops)


def test_numbers_in_float64_are_counted_so() -> None:
    """Normals by Box-Muller: six flops each at 33.5 TFLOP/s, beside four bytes at 4.3 TB/s."""
    found = predict.case_floor(MACHINES["h200"], at("noise", 256, 3072))
    assert found is not None
    assert found.unit == "vector float64"
    assert found.arithmetic == pytest.approx(6 * 256 * 3072 / 33.5e12)
    unknown = predict.case_floor(replace(TOY, peak={"memory": 1e9, "vector float32": 1e9}), at("noise", 256, 3072))
    assert unknown is None


def test_arithmetic_worked_out_by_hand() -> None:
    """Four particles directly, on the plain units: three flops of 28 pairs twice, 705 MFLOP at 66.9 TFLOP/s. Of 64 particles
    five products in TF32, 10.7 GFLOP at 494.7 TFLOP/s."""
    direct, products = (predict.case_floor(MACHINES["h200"], at("mmd", *shape)) for shape in ((1024, 4, 4096), (64, 64, 4096)))
    assert direct is not None
    assert products is not None
    assert (direct.unit, 1e6 * direct.arithmetic) == ("vector float32", pytest.approx(10.53, rel=1e-3))
    assert (products.unit, 1e6 * products.arithmetic) == ("products float32", pytest.approx(21.7, rel=1e-2))


def test_a_kernel_is_bound_by_more_than_bytes_and_flops() -> None:
    """Attention of 256 tokens reads keys and values four times from L2: 680 MB at 5.5 TB/s. In 16 bits the MMD issues 26,900
    warp instructions a group, four a cycle on 132 multiprocessors."""
    attention = at("attention", 128, 256, 16, 72, **FORWARD)
    small, large = (at("mmd", 1024, 4, D, bf16=True) for D in (64, 4096))
    assert predict.kernel_bound(MACHINES["h200"], attention) == (pytest.approx(680e6 / 5.5e12, rel=0.01), "L2")
    assert predict.kernel_bound(MACHINES["h200"], large) == (
        pytest.approx(1024 * 26.9e3 / (528 * 1.98e9), rel=0.01),
        "issue slots",
    )
    assert small.kernel["issue slots"] < large.kernel["issue slots"]
    assert predict.kernel_bound(MACHINES["a100"], large) is None
    assert at("mmd", 64, 64, 4096).kernel == {}


class _NothingMade(TorchDispatchMode):
    """Refuses tensors of more than a number, but for those without memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            made = isinstance(value, torch.Tensor) and value.device.type != "meta" and value.numel() > 1
            assert not made, f"{func} made a tensor of {value.shape} on {value.device}"
        return result


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("op", operations())
def test_to_declare_cases_makes_nothing_and_needs_no_gpu(op: str, device: str) -> None:
    with _NothingMade():
        found = list(load(op).cases(torch.device(device), quick=False))
    assert found
    assert len({(case.mode, case.size, case.dtype) for case in found}) == len(found)
    assert all(case.op == op and case.peers and case.bytes > 0 for case in found)


@pytest.mark.parametrize("declare", ["case", "training_case"])
def test_networks_are_made_once_and_do_not_change_the_inputs(declare: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("dit")
    made, build = [], module.random_dit
    monkeypatch.setattr(module, "random_dit", lambda *given: made.append(given) or build(*given))
    case = getattr(module, declare)("S", 1, torch.device("cpu"))
    assert made == []
    inputs = []
    for _ in range(2):
        torch.manual_seed(0)
        inputs.append(case.inputs())
    count = len(made)
    assert count == (1 if declare == "case" else 2)
    assert all(torch.equal(first, second) for first, second in zip(*inputs, strict=True))
    torch.manual_seed(0)
    assert torch.equal(inputs[0][0], torch.randn(1, 4, 32, 32))
    outputs = [case.peers[name](*inputs[0])()[0] for name in ("imm fused", "plain")]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
    assert len(made) == count


def row(op: str, peer: str, microseconds: float, **values: Any) -> rows.Row:
    values = {"cache": "cold", "bytes": 100_000_000, "flops": 2 * 10**9, "device": "cuda", "dtype": "bfloat16", **values}
    return rows.Row(op, values.pop("mode", "forward"), "N=1", peer=peer, status=rows.OK, median_us=microseconds, **values)


def results(folder: Path, measured: Sequence[rows.Row], **environment: Any) -> Path:
    rows.write(folder, measured)
    recorded = {"machine": "NVIDIA H200", "device": "cuda", "threads": 8, **environment}
    (folder / "environment.json").write_text(json.dumps(recorded))
    return folder


def test_the_check_prints_errors_worked_out_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 100 MB at 4.3 TB/s are 23.26 us; 2 GFLOP of products in bfloat16 2.53 us, in float32 on plain units 29.9."""
    measured = [
        row("attention", declared.COPY, 25.0),
        row("attention", declared.MATMUL, 4.0),
        row("attention", "imm", 46.51),
        row("attention", "imm out=", 93.0),
        row("attention", "SDPA", 30.0),
        row("mmd", declared.COPY, 23.26, dtype="float32"),
        row("mmd", declared.MATMUL, 20.0, dtype="float32"),
        replace(row("mmd", "imm", 1.0, dtype="float32"), status="refused: wrong", median_us=None),
        row("mmd", declared.COPY, 10.0, dtype="float32", cache="warm", bytes=40_000_000),
        row("mmd", declared.COPY, 20.0, dtype="float32", cache="warm", bytes=86_000_000, mode="large"),
        row("flow_step", "triton", 20.0, cache="warm"),
    ]
    folder = results(tmp_path / "h200", measured)
    other = results(tmp_path / "h100", measured, machine="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(predict, "committed", lambda: [folder, other])
    result = invoke("--predict=h200")
    assert result.exit_code == 0, result.output
    report = result.output[result.output.index("check against h200: NVIDIA H200") :]
    lines = [line.split() for line in report.splitlines()]
    found = {(line[0], line[4], line[5]): line[-5:] for line in lines if len(line) > 8 and "N=1" in line}
    assert found == {
        ("attention", "cold", "copy"): ["25.0", "us", "23.3", "us", "-7%"],
        ("attention", "cold", "product"): ["4.0", "us", "2.5", "us", "-37%"],
        ("attention", "cold", "imm"): ["46.5", "us", "23.3", "us", "-50%"],
        ("mmd", "cold", "copy"): ["23.3", "us", "23.3", "us", "-0%"],
        ("mmd", "cold", "product"): ["20.0", "us", "29.9", "us", "+49%"],
        ("mmd", "warm", "copy"): ["20.0", "us", "20.0", "us", "+0%"],
        ("flow_step", "warm", "triton"): ["20.0", "us", "29.9", "us", "+49%"],
    }
    assert "left out: 1 warm rows" in report
    assert "copy: 3 rows, median error 0%, worst -7% (attention forward, N=1, bfloat16, cold)" in report
    assert "product: 2 rows, median error 43%, worst +49% (mmd forward" in report
    assert "not measured" not in result.output
    assert "check against h100" not in result.output
    only = invoke("mmd", "--predict=h200").output
    assert "worst -0% (mmd forward" in only
    assert "attention" not in only


def test_a_machine_made_of_rows_holds_out_the_op_that_is_judged(tmp_path: Path) -> None:
    """mmd copies at 10 GB/s, noise at 20: each is predicted with the other's rate. The products of mmd have no other rate."""
    cpu = {"device": "cpu", "dtype": "float32"}
    measured = [
        row("mmd", declared.COPY, 10_000.0, **cpu),
        row("mmd", declared.MATMUL, 1000.0, **cpu),
        row("mmd", declared.COPY, 1.0, cache="warm", **cpu),  # from a cache
        row("noise", declared.COPY, 1.0, mode="small", **{**cpu, "bytes": 1000}),  # too small to be a rate
        row("noise", declared.COPY, 5_000.0, **cpu),
        row("noise", "imm", 20_000.0, **{**cpu, "flops": 0}),
    ]
    folder = results(tmp_path / "cpu", measured, machine="Some CPU", device="cpu")
    machine = machines.find(str(folder))
    assert machine.reached == {
        "memory": pytest.approx(15e9),
        "products float32": pytest.approx(2e12),
        "vector float32": pytest.approx(2e12),
    }
    assert (machine.device, machine.threads, machine.l2) == ("cpu", 8, None)
    report = predict.check(machine, folder, ["mmd", "noise"], source=True)
    errors = {(line.split()[0], line.split()[5]): line.split()[-1] for line in report.splitlines() if "  N=1  " in line}
    assert errors[("mmd", "copy")] == "-50%"
    assert errors[("noise", "imm")] == "-50%"
    assert "1 of an unknown rate" in report
    assert "held out" in report
    plain = predict.check(machine, folder, ["mmd"], source=False)
    assert "held out" not in plain
    assert "-33%" in plain


def test_a_folder_is_matched_by_machine_and_threads(tmp_path: Path) -> None:
    folder = results(tmp_path / "cpu", [row("mmd", declared.COPY, 9.0, device="cpu")], machine="Some CPU", device="cpu")
    machine = machines.find(str(folder))
    assert machine.matches({"machine": "Some CPU", "threads": 8})
    assert not machine.matches({"machine": "Some CPU", "threads": 2})
    assert not machine.matches({"machine": "Another", "threads": 8})
    assert MACHINES["h200"].matches({"machine": "NVIDIA H200", "threads": 3})


def test_the_command_prints_a_table_without_a_gpu() -> None:
    result = invoke("mmd", "--predict=h200")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if "G=1024 M=4 D=4096  float32" in line)
    assert " ".join(line.split()).endswith(" memory; our kernel: memory 201.33 MB 0.70 GF 46.8 us 10.5 us 46.8 us 46.8 us")
    small = next(line for line in result.output.splitlines() if "G=16 M=4 D=4096" in line)
    assert "memory (in L2)" in small
    assert len(invoke("mmd", "--predict=h200", "--quick").output) < len(result.output)


def test_every_op_is_predicted_and_the_committed_rows_are_checked() -> None:
    result = invoke("--predict=h100")
    assert result.exit_code == 0, result.output
    assert {line.split()[0] for line in result.output.splitlines() if line.startswith("  ")} >= set(operations())
    folders = [folder for folder in predict.committed() if predict.read_environment(folder)["device"] == "cpu"]
    result = invoke("noise", f"--predict={folders[0]}")
    assert result.exit_code == 0, result.output
    assert "held out" in result.output
    assert "copy: 2 rows, median error" in result.output


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    unknown = invoke("--predict=h1000")
    assert unknown.exit_code == 1
    assert unknown.output == f"Error: predict: expected one of {list(MACHINES)} or a results folder, got 'h1000'\n"
    assert invoke("nothing", "--predict=h100").output.startswith("Error: op: expected one of")
    assert invoke("--predict=h100", "--device=cpu").output.startswith("Error: predict: expected OP and --quick")
    folder = results(tmp_path / "small", [row("mmd", declared.COPY, 1.0, bytes=1000)])
    assert invoke(f"--predict={folder}").output.startswith("Error: predict: expected a cold copy of 32 MB or more")
