"""The harness: who is refused, whose turn it is, what the rows say; the op files on small shapes; the page made of rows.

The CUDA clock is tested on its structure, with the calls into CUDA replaced: no figure of a GPU comes from here.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import itertools
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_clock import FakeClock
from torch import Tensor

from imm.benchmark import Case, Claim, case, docs, environment, gate, harness, load, measure, operations, rows, timing
from imm.benchmark.memory import peak_bytes
from imm.benchmark.networks import random_dit
from imm.cli import main

CPU = torch.device("cpu")
BRIEF = harness.Effort(0.0, 5, 5)
SMALL = {
    "mmd": (2, 4, 24),
    "flow_map_mmd": (2, 4, 24),
    "flow_step": (2, 3, 4, 4),
    "noise": (3, 10),
    "adaln": (2, 3, 17),
    "attention": (2, 16, 2, 8),
    "dit": ("S", 1),
    "sampler": ("unet", 2, 2),
    "objective": ("UNet", 8, 4),
}


def doubling(**peers: Callable[..., Any]) -> Case:
    """An op that doubles 1000 numbers, timed with cold buffers."""
    return Case(
        op="double",
        mode="forward",
        shape={"N": 1000},
        dtype=torch.float32,
        bytes=8000,
        flops=1000,
        inputs=lambda: (torch.randn(1000),),
        truth=lambda x: (2.0 * x.double(),),
        tolerances=(1e-6,),
        peers=peers,
        caches=("cold",),
    )


def by(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda x: lambda: (function(x),)


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no such luck\nsecond line")


def late(x: Tensor) -> Tensor:
    timing.time.sleep(0.005)
    return 2 * x


@pytest.fixture
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look takes a microsecond, and work only what it says."""
    clock = FakeClock(look=1e-6)
    for module in (timing, harness):
        monkeypatch.setattr(module, "time", clock)


@pytest.mark.usefixtures("own_time")
def test_wrong_and_broken_peers_are_refused_and_a_slow_one_is_slower() -> None:
    peers = {"right": lambda x: 2 * x, "late": late, "wrong": lambda x: 2.001 * x, "nan": lambda x: x * float("nan")}
    peers |= {"short": lambda x: 2 * x[1:], "broken": broken}
    found = {row.peer: row for row in measure(doubling(**{name: by(f) for name, f in peers.items()}), CPU, BRIEF)}
    assert list(found) == [case.COPY, *peers]
    assert found["wrong"].status == "refused: wrong, output 0: 5.0e-04 > 1e-06"
    assert found["nan"].status == "refused: wrong, output 0: inf > 1e-06"
    assert found["short"].status.startswith("refused: wrong")
    assert found["broken"].status == "refused: RuntimeError: no such luck"
    for name in ("wrong", "nan", "short", "broken"):
        assert found[name].median_us is None
        assert found[name].ratio_to_copy is None
    right, slow = found["right"], found["late"]
    assert right.status == slow.status == rows.OK
    assert (right.median_us, slow.median_us) == (pytest.approx(1.0), pytest.approx(5001.0))
    assert slow.ratio_to_copy == pytest.approx(5001.0, rel=1e-3)
    assert right.gb_per_s == pytest.approx(8000 / right.median_us * 1e-3, rel=0.01)
    assert found[case.COPY].ratio_to_copy == 1.0
    assert "refused: wrong" in rows.table(list(found.values()))


def test_outputs_of_another_number_are_refused() -> None:
    (row,) = [r for r in measure(doubling(two=lambda x: lambda: (2 * x, x)), CPU, BRIEF) if r.peer == "two"]
    assert row.status.startswith("refused: wrong")


def test_peers_take_turns() -> None:
    calls: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        return by(lambda x: (calls.append(name), 2 * x)[1])

    found = measure(doubling(a=noting("a"), b=noting("b"), c=noting("c")), CPU, BRIEF)
    turns = [name for name, _ in itertools.groupby(calls)]
    assert "".join(turns[-15:]) == "abc" * 5
    assert all(row.rounds == 5 and row.threads == torch.get_num_threads() for row in found)


def test_an_op_whose_tests_fail_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    wrong = "@pytest.mark.parametrize('x', [3], ids=['a/b'])\ndef test_wrong(x): assert 2 == x\n"
    (tmp_path / "tests" / "test_a.py").write_text(f"import pytest\ndef test_right(): pass\n{wrong}")
    (tmp_path / "tests" / "test_b.py").write_text("import no_such_package\n")
    (tmp_path / "tests" / "test_c.py").write_text("def test_c(): pass\n")
    asked = {"a": {"test_a.py": ""}, "half": {"test_a.py": "right"}, "c": {"test_c.py": ""}, "none": {"test_c.py": "absent"}}
    found = gate.refusals(asked, tmp_path)
    assert found == {"a": "1 of its tests fail, test_a.py::test_wrong[a/b] first", "none": "none of its tests ran"}
    assert "test_b.py" in gate.refusals({"b": {"test_b.py": ""}}, tmp_path)["b"]
    with pytest.raises(FileNotFoundError, match=r"test_d\.py"):
        gate.refusals({"d": {"test_d.py": ""}}, tmp_path)
    monkeypatch.setattr(gate, "refusals", lambda asked, root: dict.fromkeys(asked, "1 of its tests fail"))
    said: list[str] = []
    (row,) = harness.run("flow_step", CPU, None, quick=True, say=said.append)
    assert (row.op, row.mode, row.status) == ("flow_step", rows.TESTS, "refused: 1 of its tests fail")
    result = CliRunner().invoke(main, ["bench", "flow_step", "--device=cpu", "--quick", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.output.endswith("Error: flow_step: not timed, since tests fail\n")
    assert said == ["flow_step: refused: 1 of its tests fail\n"]


def test_on_cuda_the_kernels_that_run_there_are_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, tests = torch.device("cuda"), Path(__file__).parent
    for op in operations():
        module = load(op)
        assert gate.tests_of(module, CPU) == module.TESTS
        asked = gate.tests_of(module, cuda)
        assert module.TESTS.keys() <= asked.keys()
        assert any(name.startswith("test_triton_") for name in asked)
        for name, words in asked.items():
            functions = re.findall(r"^def (test_\w+)", (tests / name).read_text(), re.MULTILINE)
            assert all(any(word in function for function in functions) for word in words.split()), (op, name, words)
    monkeypatch.setattr(environment, "record", lambda device: {"commit": "c0ffee", "machine": "here"})
    given: list[dict[str, gate.Tests]] = []
    monkeypatch.setattr(gate, "refusals", lambda asked, root: given.append(asked) or dict.fromkeys(asked, "no GPU here"))
    harness.run("noise", cuda, None, quick=True, say=lambda text: None)
    assert given == [{"noise": {"test_noise.py": "", "test_triton_flow_step.py": "noise"}}]


def test_the_gate_is_no_part_of_the_test_run_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("import os\ndef test_a(): assert 'PYTEST_XDIST_WORKER' not in os.environ\n")
    assert gate.refusals({"a": {"test_a.py": ""}}, tmp_path) == {}


@pytest.mark.usefixtures("own_time")
def test_slow_peers_have_the_least_rounds() -> None:
    effort = harness.Effort(0.2, 3, 30)  # slow: 4 ms
    found = {row.peer: row for row in measure(doubling(quick=by(lambda x: 2 * x), late=by(late)), CPU, effort)}
    assert found["late"].rounds == 3
    assert found["quick"].rounds == found[case.COPY].rounds == 30
    assert found["late"].ratio_to_copy == pytest.approx(rows.paired(found["late"].visits, found[case.COPY].visits), rel=0.02)


def test_the_share_of_the_floor_is_that_of_the_slower_ceiling() -> None:
    made = []
    for peer, seconds in ((case.COPY, 1.0), (case.MATMUL, 2.0), ("imm", 4.0)):
        made.append(rows.Row("op", "mode", "N=1", "float32", "cpu", peer=peer, bytes=8, flops=9))
        made[-1].error = 0.0 if peer == "imm" else None
        made[-1].timed([[seconds] * 3], [[1.0] * 3])
    assert rows.share_of_floor(made[2], made) == 0.5
    assert [rows.share_of_floor(row, made) for row in made[:2]] == [None, 1.0]
    assert rows.share_of_floor(made[2], [made[0], made[2]]) == 0.25
    assert rows.share_of_floor(dataclasses.replace(made[2], peer="imm, bfloat16"), made) is None


def test_parts_have_times_and_no_figures_of_the_whole() -> None:
    parts = {"part: a little": by(lambda x: x[:1] + 0), "part: broken": by(broken), case.MATMUL: by(lambda x: x)}
    declared = dataclasses.replace(doubling(right=by(lambda x: 2 * x)), ceilings=parts)
    measured = measure(declared, CPU, BRIEF)
    found = {row.peer: dict(zip(rows.HEADINGS, rows.line(row, measured), strict=True)) for row in measured}
    shown = {
        name: [column for column in ("median", "x imm", "GB/s", "x copy", "error") if line[column]]
        for name, line in found.items()
    }
    assert shown == {
        case.COPY: ["median", "GB/s", "x copy"],
        "part: a little": ["median"],
        "part: broken": ["median"],
        case.MATMUL: ["median", "x copy"],
        "right": ["median", "GB/s", "x copy", "error"],
    }
    assert found["part: broken"]["median"] == "refused: RuntimeError: no such luck"
    assert found["part: a little"]["of floor"] == ""
    rates = {row.peer: (row.gb_per_s is not None, row.gflop_per_s is not None) for row in measured}
    assert rates["part: a little"] == (False, False)
    assert (rates[case.COPY], rates[case.MATMUL], rates["right"]) == ((True, False), (False, True), (True, True))


def test_a_broken_ceiling_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the copy: a large case may leave no memory for it."""
    monkeypatch.setattr(harness, "copy_peer", lambda case, device: by(broken))
    copy, right = measure(doubling(right=by(lambda x: 2 * x)), CPU, BRIEF)
    assert copy.status == "refused: RuntimeError: no such luck"
    assert (right.status, right.ratio_to_copy) == (rows.OK, None)
    assert right.median_us is not None
    assert "right" in rows.table([copy, right])


def test_csv_has_the_columns_and_comes_back(tmp_path: Path) -> None:
    measured = measure(doubling(right=by(lambda x: 2 * x), broken=by(broken)), CPU, BRIEF)
    rows.write(tmp_path, measured[:1])
    rows.write(tmp_path, measured[1:])
    with (tmp_path / "rows.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    wanted = {"op", "peer", "mode", "shape", "dtype", "machine", "commit", "median_us", "p20_us", "p80_us", "bytes", "threads"}
    assert tuple(reader.fieldnames or ()) == rows.COLUMNS
    assert wanted <= set(rows.COLUMNS)
    assert [line["peer"] for line in lines] == [case.COPY, "right", "broken"]
    assert rows.read(tmp_path / "rows.csv") == measured
    again = [dataclasses.replace(row, threads=9) for row in measured[:2]]
    rows.write(tmp_path, [*again, dataclasses.replace(measured[0], commit="another")])
    found = [(row.peer, row.threads, row.commit) for row in rows.read(tmp_path / "rows.csv")]
    assert found == [
        (case.COPY, 9, ""),
        ("right", 9, ""),
        ("broken", measured[2].threads, ""),
        (case.COPY, measured[0].threads, "another"),
    ]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5


def test_other_files_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = [r for r in measure(doubling(right=by(lambda x: 2 * x)), CPU, BRIEF) if r.peer == "right"]
    rows.write(tmp_path, [row])
    whole = (tmp_path / "rows.csv").read_text()
    assert not list(tmp_path.glob("*.part"))
    for end in ("float32", row.method):  # where a number is missing, and where only words are
        (tmp_path / "rows.csv").write_text(whole[: whole.index(end) + 3])
        with pytest.raises(ValueError, match="expected rows as imm bench writes them"):
            rows.read(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text(whole[: whole.rindex(",")] + "\n")
    with pytest.raises(ValueError, match="a line ends early"):
        rows.read(tmp_path / "rows.csv")
    (tmp_path / "rows.csv").write_text("op,other\n")
    monkeypatch.setattr(gate, "refusals", lambda asked, root: pytest.fail("work before the refusal"))
    with pytest.raises(ValueError, match="this version's columns"):
        harness.run("noise", CPU, tmp_path, quick=True)
    assert (tmp_path / "rows.csv").read_text() == "op,other\n"
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(ValueError, match="expected what imm bench writes"):
        environment.read(tmp_path)


def test_every_op_file_declares_right_peers() -> None:
    assert set(operations()) == set(SMALL)
    for op, shape in SMALL.items():
        declared = load(op).case(*shape, CPU)
        inputs = declared.inputs()
        truth = declared.truth(*inputs)
        assert len(declared.tolerances) == len(truth)
        for name, peer in declared.peers.items():
            if "compile" not in name:
                assert harness.refusal(declared, name, harness.errors(peer(*inputs)(), truth)) is None, (op, name)
        assert next(iter(load(op).cases(CPU, quick=True))).op == op


OP_FILES = sorted((Path(__file__).parents[1] / "bench").glob("*.py"))


@pytest.mark.parametrize("path", OP_FILES, ids=lambda path: path.stem)
def test_what_is_imported_late_exists(path: Path) -> None:
    """Also within functions: a peer of a GPU is made on no other machine."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        for module in modules:
            top = module.partition(".")[0]
            if top not in ("imm", "imm_kernels"):
                continue
            if top == "imm_kernels":
                pytest.importorskip("triton")
            found = importlib.import_module(module)
            for name in names if isinstance(node, ast.ImportFrom) else []:
                within = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
                assert hasattr(found, name) or within, f"{module} has no {name}"


def test_a_trained_dit_is_checked_against_float64() -> None:
    declared = load("dit").training_case("S", 1, CPU)
    inputs = declared.inputs()
    truth = declared.truth(*inputs)
    assert len(truth) == len(declared.tolerances) == 3
    for name in ("imm fused", "plain"):
        assert harness.refusal(declared, name, harness.errors(declared.peers[name](*inputs)(), truth)) is None


def test_compulsory_bytes_and_flops() -> None:
    """3 G M D and 4 B D numbers of 4 bytes, besides what each group or image has one of."""
    mmd = load("mmd").case(256, 4, 3072, CPU)
    assert mmd.bytes == 4 * (3 * 256 * 4 * 3072 + 2 * 256)
    assert mmd.flops == 6 * 256 * 3072 * 28
    assert load("flow_step").case(2, 3, 4, 5, CPU).bytes == 4 * 4 * 2 * 60 + 3 * 8 * 2
    assert load("noise").case(3, 10, CPU).bytes == 4 * 30 + 8 * 3
    forward, backward = (load("adaln").case(2, 3, 5, CPU, backward=learns) for learns in (False, True))
    assert (forward.bytes, backward.bytes) == (4 * 4 * 30, 4 * 10 * 30)
    assert _different(forward.inputs()) + 2 * 30 == _different(backward.inputs()) == 4 * 30 + 3 * 2 * 5
    source, target = (t.nbytes for t in _copied(mmd))
    assert source + target == pytest.approx(mmd.bytes, abs=8)


def test_compulsory_bytes_and_flops_of_networks() -> None:
    """DiT-S/2, layer by layer: weights and latents; of the products of 256 tokens 2 flops a weight, and 4 T C of attention."""
    C, depth, T, latent = 384, 12, 256, 4 * 32 * 32
    adaln = (6 * depth + 2) * (C * C + C)
    embedders = 1001 * C + 2 * (256 * C + C + C * C + C)
    blocks = depth * (12 * C * C + 9 * C)
    ends = (16 * C + C) + (16 * C + 16)
    weights = adaln + embedders + blocks + ends
    products = T * 2 * (depth * 12 * C * C + 2 * 16 * C) + depth * 4 * T * T * C
    vectors = 2 * ((6 * depth + 2) * C * C + 2 * (256 * C + C * C))
    for rows_, dtype in ((2, torch.float32), (16, torch.bfloat16)):
        declared = load("dit").case("S", rows_, CPU, dtype)
        assert declared.bytes == dtype.itemsize * (weights + 2 * rows_ * latent)
        assert declared.flops == rows_ * (products + vectors)
    trained = load("dit").training_case("S", 2, CPU)
    assert trained.bytes == 4 * (2 * weights + 4 * latent)  # and a gradient for each weight
    assert trained.flops == 3 * 2 * (products + vectors)
    loop = load("sampler").case("S", 4, 8, CPU, torch.bfloat16)  # with guidance two rows an image
    assert loop.bytes == 2 * (adaln + embedders + 4 * (blocks + ends) + 4 * 2 * 16 * latent) + 4 * 8 * latent
    assert loop.flops == 4 * 16 * (products + vectors)
    step = load("objective").case("DiT-S/2", 4, 4, CPU)
    assert step.bytes == 4 * (10 * weights + 5 * 4 * latent)
    assert step.flops == 4 * 4 * (products + vectors)


def _different(tensors: tuple[Any, ...]) -> int:
    """The numbers in tensors of which none is another."""
    assert len({one.data_ptr() for one in tensors}) == len(tensors)
    return sum(one.numel() for one in tensors)


def _copied(declared: Case) -> tuple[Tensor, Tensor]:
    step = harness.copy_peer(declared, CPU)()
    return step()[0], step()[0]


def test_cold_buffers_rotate_and_warm_ones_stay() -> None:
    seen: dict[int, int] = {}

    def noting(x: Tensor) -> Tensor:
        seen[x.data_ptr()] = seen.get(x.data_ptr(), 0) + 1
        return 2 * x

    declared = dataclasses.replace(doubling(a=by(noting)), caches=("cold", "warm"))
    found = measure(declared, CPU, BRIEF)
    assert [(row.cache, row.peer) for row in found] == [
        (cache, name) for cache in ("cold", "warm") for name in (case.COPY, "a")
    ]
    assert [row.method for row in found[1::2]] == ["wall clock over 64 sets", "wall clock over one set"]
    assert len(seen) == 64
    assert sorted(seen.values())[-2] <= 3  # all but the set that stays
    asked = Claim("a", "b"), Claim("a", "b", cache="cold"), Claim("a", "b", mode="other"), Claim("a", "b", up_to={"N": 0})
    assert [claim.concerns("forward", "N=1", "warm") for claim in asked] == [True, False, False, False]


def test_peak_memory_counts_inputs_outputs_and_what_a_step_needs() -> None:
    def kept(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        out = torch.empty_like(x)
        return lambda: (torch.add(x, x, out=out),)

    def wasteful(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: ((x[:, None] * torch.ones(50)).sum(1) / 25,)

    declared = doubling(fresh=by(lambda x: x + x), kept=kept, wasteful=wasteful)
    found = {row.peer: row.peak_bytes for row in measure(declared, CPU, BRIEF)}
    assert found[case.COPY] is None
    assert found["fresh"] == pytest.approx(8000, abs=200)
    assert found["kept"] == pytest.approx(8000, abs=200)
    assert found["wasteful"] == pytest.approx(4000 * (1 + 50 + 1), rel=0.02)


def test_peers_that_train_one_network_have_equal_peaks() -> None:
    module = load("dit")
    made = random_dit("S", torch.float32, CPU).requires_grad_()
    inputs = module.case("S", 1, CPU).inputs()
    peer = module.trained(lambda: made, lambda: made)
    first, second = (peak_bytes(peer, inputs, CPU) for _ in range(2))
    assert first == pytest.approx(second, rel=0.01)
    assert first > sum(p.nbytes for p in made.parameters())  # the gradients are within it
    assert all(p.grad is None for p in made.parameters())


def test_ceilings_are_timed_and_not_checked() -> None:
    declared = dataclasses.replace(doubling(right=by(lambda x: 2 * x)), ceilings={"less": by(lambda x: x[:1])})
    assert [(row.peer, row.status) for row in measure(declared, CPU, BRIEF)] == [
        (name, rows.OK) for name in (case.COPY, "less", "right")
    ]


def test_ratios_are_of_the_same_round() -> None:
    """A machine that is slow in some rounds is slow for both."""
    assert rows.paired([[1.0, 10.0, 1.2, 11.0]], [[0.5, 5.0, 0.6, 5.5]]) == pytest.approx(2.0)


def test_ratios_are_of_the_same_visit() -> None:
    """A slow peer has fewer rounds than a quick one."""
    slow, quick = [[1.0, 10.0], [100.0, 100.0]], [[0.5, 5.0, 7.0, 7.0], [50.0, 50.0, 7.0]]
    assert rows.beside(slow, quick) == rows.beside(slow, [visit[:2] for visit in quick]) == [[2.0, 2.0], [2.0, 2.0]]
    assert rows.paired(quick, slow) == 0.5


def test_the_spread_is_that_of_all_visits() -> None:
    steady = [1.0] * 8 + [9.0]
    assert rows.interval([steady, steady]) == (1.0, 1.0)
    assert rows.interval([steady, [2.0, 3.0]]) == (1.0, pytest.approx(2.8))
    assert rows.interval([[5.0], [2.0, 3.0], [4.0]]) == (pytest.approx(2.2), 5.0)
    assert rows.interval([[1.0] * 4 + [2.0] * 4]) == (1.0, 2.0)  # of one visit its halves
    assert rows.interval([[3.0]]) == (3.0, 3.0)


def test_rows_are_joined_visit_by_visit() -> None:
    def row(peer: str, *visits: list[float], status: str = rows.OK, **values: Any) -> rows.Row:
        made = rows.Row("op", "mode", "N=1", "float32", "cpu", "warm", peer, status, bytes=8, **values)
        if visits:
            made.timed(visits, ())
        return made

    first = [
        row(case.COPY, [1.0, 2.0, 3.0, 4.0], [1.0, 1.0]),
        row("imm", [10.0, 20.0], [20.0], error=1e-7, peak_bytes=9),
        row("wrong", status="refused: wrong"),
        row("fails", [3.0], error=0.0),
        row("absent", [3.0], error=0.0),
    ]
    before = [dataclasses.replace(one) for one in first]
    second = [row("imm", [100.0, 200.0]), row(case.COPY, [5.0, 20.0, 1.0]), row("fails", status="refused: no memory")]
    copy, imm, wrong, fails = rows.joined(first, second)
    assert [copy.visits, imm.visits] == [
        [[1e6, 2e6, 3e6, 4e6], [1e6, 1e6], [5e6, 20e6, 1e6]],
        [[10e6, 20e6], [20e6], [100e6, 200e6]],
    ]
    assert (imm.rounds, imm.median_us, imm.error, imm.peak_bytes) == (5, 20e6, 1e-7, 9)
    assert imm.ratio_to_copy == 10.0  # of 10, 10, 20, 20, 10
    assert (imm.gb_per_s, copy.ratio_to_copy) == (pytest.approx(8 / 20 * 1e-9, abs=1e-4), 1.0)
    assert [(one.status, one.median_us, one.visits) for one in (wrong, fails)] == [
        ("refused: wrong", None, []),
        ("refused: no memory", None, []),
    ]
    assert first == before


def test_rows_from_before_there_were_visits_are_of_one(tmp_path: Path) -> None:
    made = rows.Row("op", "mode", "N=1", "float32", "cpu", status=rows.OK, median_us=2.5, samples_us="1 1 2 2 3 3 4 4")
    rows.write(tmp_path, [made])
    (found,) = rows.read(tmp_path / "rows.csv")
    assert found.visits == [found.samples] == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0]]
    assert rows.interval(found.visits) == (1.0, 4.0)
    assert dict(zip(rows.HEADINGS, rows.line(found, [found]), strict=True))["spread"] == "1.0 us to 4.0 us"


@pytest.mark.usefixtures("own_time")
def test_claims() -> None:
    fast, slow = Claim("b", "a", at_least=2.0), Claim("b", "a", at_most=2.0)
    assert (fast.holds(2.5), fast.holds(1.5), slow.holds(1.5), slow.holds(2.5)) == (True, False, True, False)
    measured = measure(doubling(a=by(lambda x: 2 * x), b=by(late), wrong=by(lambda x: 3 * x)), CPU, BRIEF)
    others = (
        Claim("b", "wrong", at_least=1.0),
        Claim("b", "nobody", at_least=1.0),
        Claim("b", "a", at_most=2.0, up_to={"N": 999}),
    )
    text = rows.claims(measured, (fast, slow, *others))
    assert "b / a, at least 2.0: " in text
    assert "(holds)" in text
    assert "DOES NOT HOLD" in text
    assert "b / wrong, at least 1.0: not measured" in text
    assert "nobody" not in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize("flops", [1, 1000, 10**6, 476_905_728, 5 * 10**9, 10**12, 3 * 10**13])
def test_the_product_has_aligned_sides_and_as_many_flops(flops: int) -> None:
    count, side = case.product_shape(flops)
    assert side % 64 == 0
    assert count >= 1
    if flops >= 2 * 64**3:
        assert 2 * count * side**2 == pytest.approx(flops, rel=0.01)
        assert 0.3 < count / side < 3
    declared = dataclasses.replace(doubling(), flops=min(flops, 10**6))
    (product,) = harness.matmul_peer(declared, CPU)()()
    assert product.shape == case.product_shape(declared.flops)


def test_earlier_rows_have_todays_names(tmp_path: Path) -> None:
    rows.write(tmp_path, [rows.Row("op", "mode", "N=1", "float32", "cpu", peer="square product of as many flops")])
    assert [row.peer for row in rows.read(tmp_path / "rows.csv")] == [case.MATMUL]


def test_ceilings_and_rough_peers() -> None:
    rough = dataclasses.replace(doubling(wrong=by(lambda x: 2.001 * x)), rough={"wrong": 1e-2}, products=True)
    found = {row.peer: row for row in measure(rough, CPU, BRIEF)}
    assert list(found) == [case.COPY, case.MATMUL, "wrong"]
    assert all(row.status == rows.OK for row in found.values())
    assert found["wrong"].error == pytest.approx(5e-4, rel=1e-2)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(cases=lambda device, quick: [doubling(right=by(lambda x: 2 * x))], CLAIMS=(), TESTS={})
    monkeypatch.setattr(gate, "refusals", lambda asked, root: {})
    monkeypatch.setattr(harness, "load", lambda op: module)
    monkeypatch.setattr(harness, "QUICK", BRIEF)
    result = CliRunner().invoke(main, ["bench", "noise", "--quick", "--device=cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "double forward, N=1000" in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"rows.csv", "environment.json", "report.html", "plots"}
    assert result.output.endswith(f"report: {tmp_path / 'report.html'}\n")
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert {"machine", "threads", "torch", "triton", "imm", "commit", "dirty", "capability", "implementations"} <= set(recorded)
    assert {row.commit for row in rows.read(tmp_path / "rows.csv")} == {recorded["commit"]}
    wrong = CliRunner().invoke(main, ["bench", "nothing"])
    assert wrong.exit_code == 1
    assert wrong.output.startswith(f"Error: op: expected one of {operations()} or all")


def test_a_run_goes_on_with_the_cases_that_are_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [doubling(right=by(lambda x: 2 * x))]
    monkeypatch.setattr(harness, "load", lambda op: SimpleNamespace(cases=lambda device, quick: cases))
    monkeypatch.setattr(harness, "QUICK", BRIEF)
    measure_modes = lambda **options: [
        row.mode for row in harness.run("noise", CPU, tmp_path, quick=True, tests=False, say=lambda text: None, **options)[::2]
    ]
    assert measure_modes(resume=True) == ["forward"]
    cases.append(dataclasses.replace(cases[0], mode="backward"))
    assert measure_modes(resume=True) == ["backward"]
    assert measure_modes(resume=True) == []
    assert measure_modes() == ["forward", "backward"]
    monkeypatch.setattr(environment, "commit", lambda: ("another", False))
    assert measure_modes(resume=True) == ["forward", "backward"]


def visited(monkeypatch: pytest.MonkeyPatch, cases: list[Case], visits: int = 3, **more: Any) -> None:
    """Ops are these cases, measured in so many visits of two rounds."""
    module = SimpleNamespace(cases=lambda device, quick: cases, **more)
    monkeypatch.setattr(harness, "load", lambda op: module)
    for effort in ("QUICK", "FULL"):
        monkeypatch.setattr(harness, effort, harness.Effort(0.0, 2, 2, visits))


def test_a_run_visits_every_case_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(declared: Case) -> Case:
        inputs = lambda: (done.append(f"visit {declared.mode}"), torch.randn(1000))[1:]
        truth = lambda x: (done.append(f"truth {declared.mode}"), 2.0 * x.double())[1:]
        return dataclasses.replace(declared, inputs=inputs, truth=truth, caches=("warm",))

    def wrong(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        done.append("wrong")
        return lambda: (3 * x,)

    peak = harness.peak_bytes
    monkeypatch.setattr(harness, "peak_bytes", lambda *given: (done.append("memory"), peak(*given))[1])
    forward = noted(doubling(right=by(lambda x: 2 * x), wrong=wrong))
    backward = noted(dataclasses.replace(doubling(right=by(lambda x: 2 * x)), mode="backward"))
    limit = rows.Row("double", "memory", "N=1", "float32", "cpu", "warm", "right", f"{rows.OK}: little", peak_bytes=8)
    visited(monkeypatch, [forward, backward], limits=lambda device: [[limit]])
    said: list[str] = []
    found = harness.run("double", CPU, tmp_path, quick=False, tests=False, say=said.append)
    assert [one for one in done if one != "wrong"] == [
        *["visit forward", "truth forward", "memory", "memory", "visit backward", "truth backward", "memory"],
        *["visit forward", "visit backward"] * 2,
    ]
    assert done.count("wrong") == 2  # made where memory is measured, and where it is timed
    progress = [f"visit {i} of 3: double {mode}, N=1000, float32" for i in (1, 2) for mode in ("forward", "backward")]
    assert said[:4] == progress
    assert [text.splitlines()[0] for text in said[4::2]] == [rows.title(found[i]) for i in (0, 3, 5)]
    assert [(row.mode, row.peer, [len(visit) for visit in row.visits]) for row in found] == [
        ("forward", case.COPY, [2, 2, 2]),
        ("forward", "right", [2, 2, 2]),
        ("forward", "wrong", []),
        ("backward", case.COPY, [2, 2, 2]),
        ("backward", "right", [2, 2, 2]),
        ("memory", "right", []),
    ]
    for copy, right in (found[:2], found[3:5]):
        assert right.error is not None
        assert right.peak_bytes == pytest.approx(8000, abs=200)
        assert (right.rounds, right.ratio_to_copy) == (6, pytest.approx(rows.paired(right.visits, copy.visits), rel=1e-3))
        assert right.gb_per_s == pytest.approx(8000 / right.median_us * 1e-3, rel=0.01)
    assert rows.read(tmp_path / "rows.csv") == found
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(found)


def test_no_case_is_kept_while_memory_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        pass

    networks: list[weakref.ref[Network]] = []
    alive: list[bool] = []

    def cases(device: torch.device, quick: bool) -> Iterator[Case]:
        network = Network()
        networks.append(weakref.ref(network))
        yield dataclasses.replace(doubling(right=lambda x, network=network: lambda: (2 * x,)), caches=("warm",))

    def limits(device: torch.device) -> list[list[rows.Row]]:
        alive.extend(network() is not None for network in networks)
        return []

    visited(monkeypatch, [], visits=1)
    monkeypatch.setattr(harness, "load", lambda op: SimpleNamespace(cases=cases, limits=limits))
    assert harness.run("double", CPU, None, quick=False, tests=False, say=lambda text: None)
    assert set(alive) == {False}


def test_what_compiles_for_long_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiles: list[str] = []

    def late(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        compiles.append("late")
        if len(compiles) == 1:
            raise KeyboardInterrupt
        return lambda: (2 * x,)

    peers = {"right": by(lambda x: 2 * x), "late": late, "later": by(lambda x: x + x)}
    declared = dataclasses.replace(doubling(**peers), late=("late", "of another device", "later"), caches=("warm",))
    both = [declared, dataclasses.replace(declared, mode="backward", late=("late", "later"))]

    def go_on(late: bool | None = None) -> list[list[str]]:
        found = harness.run("double", CPU, tmp_path, quick=True, tests=False, resume=True, late=late, say=lambda text: None)
        return [[row.peer for row in of_mode] for of_mode in rows.grouped(found, "mode")]

    def timed() -> list[list[str]]:
        found = [row for row in rows.read(tmp_path / "rows.csv") if row.median_us is not None]
        return [[row.peer for row in of_mode] for of_mode in rows.grouped(found, "mode")]

    visited(monkeypatch, both, visits=1)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert timed() == [[case.COPY, "right"]] * 2
    assert go_on(late=False) == []
    assert go_on(late=True) == timed() == [[case.COPY, "right", "late", "later"]] * 2
    assert go_on() == []
    compiles.clear()
    visited(monkeypatch, both, visits=2)
    with pytest.raises(KeyboardInterrupt):  # of several visits the first is a look at all
        harness.run("double", CPU, tmp_path / "other", quick=True, tests=False, say=lambda text: None)
    assert not (tmp_path / "other").exists()


def test_a_run_that_is_cut_short_keeps_its_visits_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def counted(mode: str, last: int) -> Case:
        def inputs() -> tuple[Tensor, ...]:
            begun.append(mode)
            if len(begun) == last:
                raise KeyboardInterrupt
            return (torch.randn(1000),)

        peers = {"right": by(lambda x: 2 * x), "broken": by(broken)}
        return dataclasses.replace(doubling(**peers), mode=mode, inputs=inputs, caches=("warm",))

    def visits() -> dict[str, set[int]]:
        found = rows.read(tmp_path / "rows.csv")
        return {mode: {len(row.visits) for row in found if row.mode == mode and row.median_us} for mode in ("a", "b")}

    def go_on() -> list[str]:
        begun.clear()
        found = harness.run("double", CPU, tmp_path, quick=True, tests=False, resume=True, say=lambda text: None)
        assert all(row.median_us is None for row in found if row.peer == "broken")
        return [row.mode for row in found[::3]]

    visited(monkeypatch, [counted("a", 4), counted("b", 4)])
    with pytest.raises(KeyboardInterrupt):
        harness.run("double", CPU, tmp_path, quick=True, tests=False, say=lambda text: None)
    assert (begun, visits()) == (["a", "b"] * 2, {"a": {2}, "b": {1}})
    assert environment.read(tmp_path)["after"]["load"] >= 0
    visited(monkeypatch, [counted("a", 0), counted("b", 0)])
    assert go_on() == ["a", "b"]
    assert (begun, visits()) == (["b", "a", "b"], {"a": {3}, "b": {3}})
    assert (go_on(), begun) == ([], [])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 7


def test_do_bench_is_asked_about_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in whose place is the CPU here: about the peers, not the ceilings, and with the first cache alone."""
    cuda, copy, clock = torch.device("cuda"), harness.copy_peer, timing.clock
    monkeypatch.setattr(harness, "copy_peer", lambda declared, device: copy(declared, CPU))
    monkeypatch.setattr(harness, "clock", lambda device, *given: clock(CPU, *given))
    monkeypatch.setattr(harness, "peak_bytes", lambda *given: 8)
    asked: list[float] = []
    monkeypatch.setattr(harness, "do_bench", lambda step: (asked.append(float(step()[0][0])), 2e-3)[1])
    peers = {"right": by(lambda x: 2 * x), "wrong": by(lambda x: 3 * x), "broken": by(broken)}
    declared = dataclasses.replace(doubling(**peers), caches=("cold", "warm"), inputs=lambda: (torch.ones(1000),))
    found = measure(declared, cuda, BRIEF)
    assert {(row.cache, row.peer): row.do_bench_us for row in found if row.do_bench_us} == {("cold", "right"): 2000.0}
    assert asked == [2.0]
    assert all(row.status == rows.OK for row in found if row.peer in (case.COPY, "right"))


def test_long_steps_are_spread_over_the_visits() -> None:
    declared = dataclasses.replace(doubling(right=by(lambda x: 2 * x)), rounds=5, caches=("warm",))
    for visits, expected in ((1, 5), (2, 3), (3, 2)):
        assert {row.rounds for row in measure(declared, CPU, harness.Effort(0.0, 9, 9, visits))} == {expected}


def test_a_gpu_is_visited_once() -> None:
    assert (harness.CUDA.visits, harness.QUICK.visits, harness.FULL.visits) == (1, 3, 2)


def test_without_a_checkout_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(case, "__file__", str(tmp_path / "site-packages" / "imm" / "benchmark" / "case.py"))
    result = CliRunner().invoke(main, ["bench", "all", "--device=cpu"])
    assert result.exit_code == 1
    assert result.output == "Error: bench: needs a checkout of the project (its folder bench/ declares what is measured)\n"


def test_environment_names_the_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    monkeypatch.setenv("IMM_COMMIT", "abc")
    assert environment.commit() == ("abc", None)


def test_the_page_is_made_of_the_committed_rows() -> None:
    page = Path(docs.__file__).parents[3] / "docs" / "performance.md"
    assert page.read_text() == docs.render(docs.committed())
    assert "not measured" in docs.render([])


def test_the_page_about_benchmarks_names_every_other_file() -> None:
    text = (Path(docs.__file__).parents[3] / "docs" / "bench.md").read_text()
    others = {path.name for path in OP_FILES} - {f"bench_{op}.py" for op in operations()}
    assert {f"`{name}`" for name in others} <= set(re.findall(r"`\w+\.py`", text))
    assert max(map(len, text.splitlines())) <= 128


def test_a_product_was_timed_where_the_case_is_made_of_products() -> None:
    """Rows from before a case said so would have another floor. Older folders than the newest may have them."""
    newest = max(docs.committed(), key=lambda folder: environment.read(folder)["time"])
    device, checked = torch.device(environment.read(newest)["device"]), 0
    for of_op in rows.grouped(rows.read(newest / "rows.csv"), "op"):
        cases = load(of_op[0].op).cases(device, quick=False)
        declared = {(c.mode, c.size, str(c.dtype).removeprefix("torch.")): c.products for c in cases}
        for of_case in rows.cases(of_op):
            products = declared.get((of_case[0].mode, of_case[0].shape, of_case[0].dtype))
            if products is not None:
                assert any(row.peer == case.MATMUL for row in of_case) == products, rows.title(of_case[0])
                checked += 1
    assert checked


def test_published_ratios_have_a_line_a_case() -> None:
    made = []
    for mode, cache in (("forward", "cold"), ("forward", "warm"), ("backward", "cold")):
        for peer, seconds in (("imm", 1.0), ("eager", 3.0), ("torch.compile of the eager form", 0.5)):
            made.append(rows.Row("adaln", mode, "B=1 T=2 C=3", "float32", "cpu", cache, peer, rows.OK, error=0.0))
            made[-1].timed([[seconds] * 3], [[1.0] * 3])
    del made[-1]
    head, _, *lines = docs._claims(rows.cases(made)).splitlines()
    claims = ["torch.compile of the eager form / imm, at least 1.0", "eager / imm, at least 1.0"]
    assert [cell.strip() for cell in head.strip("|").split("|")] == ["mode", "shape", "dtype", "buffers", *claims]
    assert lines == [
        "| forward | B=1 T=2 C=3 | float32 | cold | 0.50 (missed) | 3.00 |",
        "| forward | B=1 T=2 C=3 | float32 | warm | 0.50 (missed) | 3.00 |",
        "| backward | B=1 T=2 C=3 | float32 | cold |  | 3.00 |",
    ]
    assert docs._claims(rows.cases([dataclasses.replace(made[0], op="noise")])) == ""


class _FakeCuda:
    """Records the calls of the CUDA clock; a replay runs the captured steps' effects by itself."""

    def __init__(self, capturable: bool, elapsed: float = 8.0) -> None:
        self.log: list[str] = []
        self.now = itertools.count()
        self.capturable, self.kept = capturable, torch.zeros(3)
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                outer.log.append("event")

            def synchronize(self) -> None:
                outer.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return elapsed

        self.Event = Event
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = lambda side: contextlib.nullcontext()
        self.synchronize = lambda: None
        self.CUDAGraph = lambda: SimpleNamespace(replay=self.replay, pool=lambda: (0, 1))
        self.graph_pool_handle = lambda: (0, 1)
        self.set_stream = lambda stream: None

    def replay(self) -> None:
        self.log.append("replay")
        self.kept.fill_(7.0)

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: tuple[int, int]) -> Any:
        self.log.append("capture")
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield


def test_cuda_clock_replays_a_graph_of_rotating_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda(capturable=True)
    monkeypatch.setattr(torch, "cuda", fake)
    steps = [lambda: (fake.kept,), *([lambda: (torch.zeros(3),)] * 7)]
    clock = timing.clock(torch.device("cuda"), steps)
    assert clock.method == "graph of 8 sets"
    assert clock.outputs[0].tolist() == [7.0] * 3  # written by a replay, after the captured outputs were cleared
    fake.log.clear()
    assert clock.sample() == pytest.approx(1e-3)  # 8 ms over 8 sets
    assert fake.log == ["event", "replay", "event", "wait"]


@pytest.mark.parametrize(("cache", "most"), [("cold", 8), ("warm", 2)])
def test_cuda_clock_keeps_the_outputs_of_cold_calls_alone(cache: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop of calls a result is let go when the next is there: of warm calls no third one is alive."""
    fake = _FakeCuda(capturable=True)
    monkeypatch.setattr(torch, "cuda", fake)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def step() -> tuple[Tensor, ...]:
        out = torch.full((3,), 5.0)
        made.append(weakref.ref(out))
        alive.append(sum(one() is not None for one in made))
        return (out,)

    clock = timing.clock(torch.device("cuda"), [step] * 8, cache)
    assert clock.method == ("graph of 8 sets" if cache == "cold" else "graph of 8 calls of one set")
    captured = alive[-8:]
    assert max(captured) == most
    assert sum(one() is not None for one in made) == 1  # what the check looks at
    assert clock.outputs[0].tolist() == [0.0] * 3  # cleared: this fake's replay does not write it


def test_cuda_clock_replays_a_short_graph_often(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda(capturable=True, elapsed=0.5)
    monkeypatch.setattr(torch, "cuda", fake)
    clock = timing.clock(torch.device("cuda"), [lambda: (fake.kept,)] * 8)
    fake.log.clear()
    assert clock.sample() == pytest.approx(0.5e-3 / 32)  # 4 replays to fill 2 ms
    assert fake.log == ["event", *["replay"] * 4, "event", "wait"]
    monkeypatch.setattr(torch, "cuda", nothing := _FakeCuda(capturable=True, elapsed=0.0))
    assert timing.clock(torch.device("cuda"), [lambda: (nothing.kept,)] * 8).sample() == 0.0


def test_a_part_is_replayed_and_a_latency_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda(capturable=True)
    monkeypatch.setattr(torch, "cuda", fake)
    calls: list[int] = []
    step = lambda: (calls.append(1), (fake.kept,))[1]
    part = timing.captured(step)
    assert (fake.log, len(calls)) == (["capture"], 4)
    fake.log.clear()
    clock = timing.single_calls(torch.device("cuda"), part)
    assert (fake.log, len(calls)) == (["replay"] * 3, 4)
    fake.log.clear()
    assert clock.sample() == pytest.approx(8e-3)
    assert fake.log == ["event", "replay", "event", "wait"]
    assert clock.outputs[0].tolist() == [7.0] * 3


def test_latencies_of_the_sampler_are_of_calls_as_they_are_launched() -> None:
    module = load("sampler")
    declared = list(module.cases(torch.device("cuda"), quick=False))
    assert {c.rounds for c in declared} == {9}
    assert {(c.mode, c.size) for c in declared if c.dtype == torch.float32} == {
        ("DiT-XL/2, seeds to images", "steps=1 images=1")
    }
    assert {c.rounds for c in module.cases(CPU, quick=False)} == {0}


def test_cuda_clock_without_a_graph_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeCuda(capturable=False)
    monkeypatch.setattr(torch, "cuda", fake)
    clock = timing.clock(torch.device("cuda"), [lambda: (fake.kept,)] * 8)
    assert clock.method == "events over 8 sets, no graph: operation not permitted when stream is capturing"
    fake.log.clear()
    assert clock.sample() == pytest.approx(1e-3)
    assert fake.log == ["event", "event", "wait"]


def test_buffers_exceed_the_cache() -> None:
    cuda = torch.device("cuda")
    for size in (1_000, 12_000_000, 10**9):
        count = timing.sets_of_buffers(cuda, size)
        assert count >= 8
        assert count * size >= 400e6
    assert [timing.sets_of_buffers(CPU, size) for size in (1_000, 40_000_000, 10**9)] == [64, 10, 2]
