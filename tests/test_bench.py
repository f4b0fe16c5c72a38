"""The harness: who is refused, whose turn it is, what the rows say; the op files on small shapes; the page made of rows.

The CUDA clock is tested on its structure, with the calls into CUDA replaced: no figure of a GPU comes from here.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call, refused, said
from fake_clock import FakeClock
from fake_cuda import FakeCuda
from torch import Tensor

from harness import case, environment, gate, measure, rows, timing
from harness.case import Case, Claim, load, operations

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BRIEF = measure.Effort(0.0, 5, 5)
#: Results that are there are read by them.
COLUMNS = (
    "op,mode,shape,dtype,device,cache,peer,status,method,threads,rounds,median_us,p20_us,p80_us,bytes,gb_per_s,ratio_to_copy,"
    "do_bench_us,flops,gflop_per_s,error,peak_bytes,machine,commit,samples_us"
)
SMALL: dict[str, tuple[Any, ...]] = {"mmd": (2, 4, 24), "flow_map_mmd": (2, 4, 24), "flow_step": (2, 3, 4, 4)}
SMALL |= {"energy_score": (3, 2, -3, 8), "noise": (3, 10), "adaln": (2, 3, 17), "attention": (2, 16, 2, 8)}
SMALL |= {"dit": ("S", 1), "sampler": ("unet", 2, 2), "objective": ("UNet", 8, 4), "tokens": ("digits", 2, 2)}


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


by = case.call
RIGHT = by(lambda x: 2 * x)


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no such luck\nsecond line")


def late(x: Tensor) -> Tensor:
    timing.time.sleep(0.005)
    return 2 * x


def test_wrong_and_broken_peers_are_refused_and_a_slow_one_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (timing, measure):  # every look takes a microsecond, and work only what it says
        monkeypatch.setattr(module, "time", FakeClock(look=1e-6))
    peers = {"right": lambda x: 2 * x, "late": late, "wrong": lambda x: 2.001 * x, "nan": lambda x: x * float("nan")}
    peers |= {"short": lambda x: 2 * x[1:], "broken": broken, "two": lambda x: (2 * x, x)}
    found = {row.peer: row for row in measure.measure(doubling(**{name: by(f) for name, f in peers.items()}), CPU, BRIEF)}
    assert list(found) == [case.COPY, *peers]
    assert {name: row.status for name, row in found.items() if row.status != rows.OK} == {
        "wrong": "refused: wrong, output 0: 5.0e-04 > 1e-06",
        **dict.fromkeys(("nan", "short", "two"), "refused: wrong, output 0: inf > 1e-06"),
        "broken": "refused: RuntimeError: no such luck",
    }
    assert all((row.median_us is row.ratio_to_copy is None) == (row.status != rows.OK) for row in found.values())
    right, slow = found["right"], found["late"]
    assert (right.median_us, slow.median_us) == (pytest.approx(1.0), pytest.approx(5001.0))
    assert (found[case.COPY].ratio_to_copy, slow.ratio_to_copy) == (1.0, pytest.approx(5001.0, rel=1e-3))
    assert right.gb_per_s == pytest.approx(8000 / right.median_us * 1e-3, rel=0.01)
    assert "refused: wrong" in rows.table(list(found.values()))
    asked = [Claim("late", "right", at_least=2.0), Claim("late", "right", at_most=2.0), Claim("late", "wrong", at_least=1.0)]
    asked += [Claim("late", "nobody", at_least=1.0), Claim("late", "right", at_most=2.0, up_to={"N": 999})]
    assert rows.claims(list(found.values()), asked).splitlines() == [
        "  late / right, at least 2.0: 5001.00 (holds)",
        "  late / right, at most 2.0: 5001.00 (DOES NOT HOLD)",
        "  late / wrong, at least 1.0: not measured",
    ]


def test_peers_take_turns_and_slow_ones_have_the_least_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    noting = lambda name: by(lambda x: (calls.append(name), 2 * x)[1])
    found = measure.measure(doubling(a=noting("a"), b=noting("b"), c=noting("c")), CPU, BRIEF)
    turns = [name for name, _ in itertools.groupby(calls)]
    assert "".join(turns[-15:]) == "abc" * 5
    assert all(row.rounds == 5 and row.threads == torch.get_num_threads() for row in found)
    for module in (timing, measure):
        monkeypatch.setattr(module, "time", FakeClock(look=1e-6))
    copy, *_, slow = measure.measure(doubling(quick=RIGHT, late=by(late)), CPU, measure.Effort(0.2, 3, 30))  # slow: 4 ms
    assert (copy.rounds, slow.rounds) == (30, 3)
    assert slow.ratio_to_copy == pytest.approx(rows.paired(slow.visits, copy.visits), rel=0.02)


def test_every_op_file_declares_right_peers_and_tests_of_what_runs() -> None:
    assert set(operations()) == set(SMALL)
    for op, shape in SMALL.items():
        module = load(op)
        declared = module.case(*shape, CPU)
        inputs = declared.inputs()
        truth = declared.truth(*inputs)
        for name, peer in declared.peers.items():
            if "compile" not in name:
                assert measure.refusal(declared, name, measure.errors(peer(*inputs)(), truth)) is None, (op, name)
        assert next(iter(module.cases(CPU, quick=True))).op == op
        assert gate.tests_of(module, CPU) == module.TESTS
        asked = gate.tests_of(module, CUDA)
        assert asked.keys() == module.TESTS.keys() | module.CUDA_TESTS.keys()
        for name, words in asked.items():
            functions = re.findall(r"^def (test_\w+)", (Path(__file__).parent / name).read_text(), re.MULTILINE)
            assert all(any(word in function for function in functions) for word in words.split()), (op, name, words)


def test_what_is_imported_late_exists() -> None:
    """Also within functions: a peer of a GPU is made on no other machine."""
    pytest.importorskip("triton")
    for path in case.BENCH.glob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
        for line in filter(re.compile(r"(?:from|import) imm").match, map(ast.unparse, nodes)):
            exec(line, {})


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
    loop = load("sampler").case("S", 4, 8, CPU, torch.bfloat16)  # with guidance two rows an image
    assert loop.bytes == 2 * (adaln + embedders + 4 * (blocks + ends) + 4 * 2 * 16 * latent) + 4 * 8 * latent
    assert loop.flops == 4 * 16 * (products + vectors)
    step = load("objective").case("DiT-S/2", 4, 4, CPU)
    assert step.bytes == 4 * (10 * weights + 5 * 4 * latent)
    assert step.flops == 4 * 4 * (products + vectors)


def test_compulsory_bytes_of_tokens() -> None:
    """What z passes through on its way to the modulations once, what a token passes through at each step. Of a sequence the
    weights for each token and the keys and values of the slots so far."""
    module, bf16 = load("tokens"), torch.bfloat16
    for name, (depth, W, D, C) in {"MAR-B": (6, 1024, 16, 768), "CALM": (4, 1024, 128, 1024)}.items():
        once = (3 * depth + 2) * (W * W + W) + C * W + W
        each = 2 * depth * (W * W + W) + (D * W + W) + (W * D + D)
        assert module.case(name, 4, 8, CPU, bf16).bytes == 2 * (once + 4 * each + 8 * C) + 4 * 2 * 8 * D
        assert module.case(name, 4, 8, CPU, bf16).flops == 2 * 8 * (C * W + W + 4 * (once - C * W - W + each))
    T, C, depth, head = 64, 768, 24, module.weights_of("MAR-B")
    backbone = depth * (12 * C * C + 13 * C) + 2 * C + (16 * C + C)
    weights = T * (backbone + head.z + head.modulation + 2 * head.token)
    whole = module.sequence("MAR-B", 2, 8, T, CPU, bf16)
    assert whole.bytes == 2 * (weights + 8 * 2 * depth * C * T * (T + 1) // 2) + 4 * 8 * T * 16
    small = module.weights_of("digits")  # which stay in a cache
    weights, kept = small.backbone + small.z + small.modulation + small.token, 2 * 3 * 96 * 16 * 17 // 2
    assert module.sequence("digits", 4, 1, 16, CPU).bytes == 4 * (weights + kept) + 4 * 16 * 16


def test_sequences_of_tokens_are_right_in_every_loop_and_a_wrong_one_is_refused() -> None:
    module = load("tokens")
    for dtype in (torch.float32, torch.bfloat16):
        declared = module.sequence("digits", 2, 3, 6, CPU, dtype)
        inputs = declared.inputs()
        truth = declared.truth(*inputs)
        assert truth[0].shape == (3, 6, 16)
        for name, peer in declared.peers.items():
            assert measure.refusal(declared, name, measure.errors(peer(*inputs)(), truth)) is None, name
    seeds, labels = inputs
    for given in ((seeds, labels + 1), (seeds + 1, labels)):
        found = measure.errors(declared.peers[module.PLAIN](*given)(), truth)
        assert "refused: wrong" in str(measure.refusal(declared, module.PLAIN, found))


def test_cold_buffers_rotate_and_warm_ones_stay() -> None:
    seen: Counter[int] = Counter()
    noting = by(lambda x: (seen.update([x.data_ptr()]), 2 * x)[1])
    found = measure.measure(dataclasses.replace(doubling(a=noting), caches=("cold", "warm")), CPU, BRIEF)
    assert [(row.cache, row.peer) for row in found] == list(itertools.product(("cold", "warm"), (case.COPY, "a")))
    assert [row.method for row in found[1::2]] == ["wall clock over 64 sets", "wall clock over one set"]
    assert len(seen) == 64
    assert sorted(seen.values())[-2] <= 3  # all but the set that stays
    asked = Claim("a", "b"), Claim("a", "b", cache="cold"), Claim("a", "b", mode="other"), Claim("a", "b", up_to={"N": 0})
    assert [claim.concerns("forward", "N=1", "warm") for claim in asked] == [True, False, False, False]


def test_peak_memory_counts_inputs_outputs_and_what_a_step_needs() -> None:
    def kept(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        out = torch.empty_like(x)
        return lambda: (torch.add(x, x, out=out),)

    wasteful = by(lambda x: (x[:, None] * torch.ones(50)).sum(1) / 25)
    measured = measure.measure(doubling(fresh=RIGHT, kept=kept, wasteful=wasteful), CPU, BRIEF)
    kept_and_fresh, most = pytest.approx(8000, abs=200), pytest.approx(4000 * (1 + 50 + 1), rel=0.02)
    assert [row.peak_bytes for row in measured] == [None, kept_and_fresh, kept_and_fresh, most]


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(cases=lambda device, quick: [doubling(right=RIGHT)], CLAIMS=(), TESTS={})
    monkeypatch.setattr(gate, "refusals", lambda asked, root: {})
    monkeypatch.setattr(measure, "chosen", lambda op: {op: module})
    monkeypatch.setattr(measure, "QUICK", BRIEF)
    output = said("bench", "noise", "--quick", "--device=cpu", "--out", tmp_path)
    assert "double forward, N=1000" in output
    assert {p.name for p in tmp_path.iterdir()} == {"rows.csv", "environment.json", "report.html", "plots"}
    assert output.endswith(f"report: {tmp_path / 'report.html'}\n")
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert {"machine", "threads", "torch", "triton", "imm", "commit", "dirty", "capability", "implementations"} <= set(recorded)
    assert refused("bench", "nothing").startswith(f"Error: op: expected one of {operations()} or all")
    monkeypatch.setattr(importlib.import_module("imm.cli.bench"), "BENCH", tmp_path)
    error = "Error: bench: needs a checkout of the project, installed with pip install --editable"
    assert refused("bench", "all", "--device=cpu") == error
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("IMM_COMMIT", "abc")  # where git cannot say it
    assert environment.commit() == ("abc", None)


def visited(monkeypatch: pytest.MonkeyPatch, cases: list[Case], visits: int = 3) -> None:
    """Ops are these cases, measured in so many visits of two rounds."""
    monkeypatch.setattr(measure, "chosen", lambda op: {op: SimpleNamespace(cases=lambda device, quick: cases)})
    monkeypatch.setattr(measure, "QUICK", measure.Effort(0.0, 2, 2, visits))


def test_a_run_that_is_cut_short_keeps_its_visits_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first visit looks at results and memory, and what it refuses is left out of the others."""
    peak, done, said = measure.peak_bytes, [], []
    monkeypatch.setattr(measure, "peak_bytes", lambda *given: (done.append("memory"), peak(*given))[1])

    def noted(mode: str, last: int) -> Case:
        def inputs() -> tuple[Tensor, ...]:
            done.append(mode)
            if done.count(mode) == last:
                raise KeyboardInterrupt
            return (torch.randn(1000),)

        truth = lambda x: (done.append("truth"), 2.0 * x.double())[1:]
        peers = {"right": RIGHT, "wrong": by(lambda x: 3 * x)}
        return dataclasses.replace(doubling(**peers), mode=mode, inputs=inputs, truth=truth, caches=("warm",))

    def visits(last: int = 0) -> list[tuple[str, int]]:
        done.clear()
        visited(monkeypatch, [noted("a", 0), noted("b", last)])
        with pytest.raises(KeyboardInterrupt) if last else contextlib.nullcontext():
            measure.run("double", CPU, tmp_path, quick=True, tests=False, resume=True, say=said.append)
        return [(row.mode, len(row.visits)) for row in rows.read(tmp_path / "rows.csv")]

    first = ["truth", "memory", "memory"]
    of = lambda a, b: [("a", a), ("a", a), ("a", 0), ("b", b), ("b", b), ("b", 0)]  # the copy, the right one, the wrong one
    assert visits(last=2) == of(2, 1)
    assert done == ["a", *first, "b", *first, "a", "b"]
    assert said == [f"visit {i} of 3: double {mode}, N=1000, float32" for i in (1, 2) for mode in "ab"]
    assert environment.read(tmp_path)["after"]["load"] >= 0
    assert (visits(), done) == (of(3, 3), ["b", "a", "b"])
    right = rows.read(tmp_path / "rows.csv")[1]
    assert (right.rounds, right.peak_bytes, right.error is None) == (6, pytest.approx(8000, abs=200), False)
    assert (visits(), done) == (of(3, 3), [])
    monkeypatch.setattr(environment, "commit", lambda: ("another", False))
    assert visits() == 2 * of(3, 3)


def test_an_op_whose_tests_fail_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one without tests; and the gate is no part of the test run around it."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_a.py").write_text("def test_right(): pass\ndef test_wrong(): assert 2 == 3\n")
    (tmp_path / "tests" / "test_b.py").write_text("import no_such_package\n")
    (tmp_path / "tests" / "test_c.py").write_text("import os\ndef test_c(): assert 'PYTEST_XDIST_WORKER' not in os.environ\n")
    asked = {"half": {"test_a.py": "right"}, "c": {"test_c.py": ""}}
    assert gate.refusals(asked, tmp_path) == {}
    found = gate.refusals({"a": {"test_a.py": ""}, **asked, "none": {"test_c.py": "absent"}}, tmp_path)
    assert list(found) == ["a", "none"]
    assert found["a"].startswith("its tests fail: 1 failed, 1 passed")
    assert found["none"].startswith("none of its tests ran")
    assert gate.refusals({"b": {"test_b.py": ""}}, tmp_path)["b"].startswith("its tests did not run")
    monkeypatch.setattr(gate, "refusals", lambda asked, root: dict.fromkeys(asked, "its tests fail"))
    result = call("bench", "flow_step", "--device=cpu", "--quick", "--out", tmp_path / "out", ok=False)
    assert "flow_step: refused: its tests fail\n" in result.output
    assert result.output.endswith("Error: flow_step: not timed, since tests fail\n")
    assert not (tmp_path / "out" / "rows.csv").exists()


def test_files_come_back_and_others_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure.measure(doubling(right=RIGHT, broken=by(broken)), CPU, BRIEF)
    path = tmp_path / "rows.csv"
    rows.write(tmp_path, measured[:1])
    rows.write(tmp_path, measured[1:])
    assert path.read_text().partition("\n")[0] == COLUMNS
    assert rows.read(path) == measured
    again = [dataclasses.replace(row, threads=9) for row in measured[:2]]
    rows.write(tmp_path, [*again, dataclasses.replace(measured[0], commit="another")])
    before, found = measured[0].threads, [(row.peer, row.threads, row.commit) for row in rows.read(path)]
    assert found == [(case.COPY, 9, ""), ("right", 9, ""), ("broken", before, ""), (case.COPY, before, "another")]
    whole = path.read_text()
    for cut in (whole[: whole.index("float32") + 3], whole[: whole.rindex(",")] + "\n"):
        path.write_text(cut)
        with pytest.raises(ValueError, match=r"expected rows as imm bench writes them, got .*: a line ends early"):
            rows.read(path)
    path.write_text("op,other\n")
    monkeypatch.setattr(gate, "refusals", lambda asked, root: pytest.fail("work before the refusal"))
    with pytest.raises(ValueError, match="this version's columns"):
        measure.run("noise", CPU, tmp_path, quick=True)
    assert path.read_text() == "op,other\n"
    (tmp_path / "environment.json").write_text("{")
    with pytest.raises(ValueError, match="expected what imm bench writes"):
        environment.read(tmp_path)


def test_committed_rows_are_readable() -> None:
    for path in (case.BENCH / "results").glob("*/rows.csv"):
        recorded, found = environment.read(path.parent), rows.read(path)
        assert {row.commit for row in found} == {recorded["commit"]}
        assert all(rows.table(of_case) for of_case in rows.cases(found))
        assert path.read_text().partition("\n")[0] == COLUMNS


def test_compulsory_bytes_and_flops() -> None:
    """3 G M D and 4 B D numbers of 4 bytes, besides what each group or image has one of."""
    mmd = load("mmd").case(256, 4, 3072, CPU)
    assert (mmd.bytes, mmd.flops) == (4 * (3 * 256 * 4 * 3072 + 2 * 256), 6 * 256 * 3072 * 28)
    assert load("flow_step").case(2, 3, 4, 5, CPU).bytes == 4 * 4 * 2 * 60 + 3 * 8 * 2
    assert load("noise").case(3, 10, CPU).bytes == 4 * 30 + 8 * 3
    forward, backward = (load("adaln").case(2, 3, 5, CPU, backward=learns) for learns in (False, True))
    assert (forward.bytes, backward.bytes) == (4 * 4 * 30, 4 * 10 * 30)
    (target,) = measure.copy_peer(mmd, CPU)()()
    assert 2 * target.nbytes == pytest.approx(mmd.bytes, abs=8)
    for flops in (476_905_728, 3 * 10**13):
        count, side = case.product_shape(flops)
        assert (side % 64, 2 * count * side**2) == (0, pytest.approx(flops, rel=0.01))
    (product,) = measure.matmul_peer(dataclasses.replace(doubling(), flops=1000), CPU)()()
    assert product.shape == case.product_shape(1000) == (1, 64)


def test_what_compiles_for_long_takes_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([KeyboardInterrupt()])

    def late(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        for error in errors:
            raise error
        return lambda: (2 * x,)

    declared = dataclasses.replace(doubling(right=RIGHT, late=late), late=("late",), caches=("warm",))
    visited(monkeypatch, [declared, dataclasses.replace(declared, mode="backward")], visits=1)

    def go_on(late: bool | None = None) -> list[str]:
        found = measure.run("double", CPU, tmp_path, quick=True, tests=False, resume=True, late=late, say=lambda text: None)
        return [row.peer for row in found]

    timed = lambda: sorted(row.peer for row in rows.read(tmp_path / "rows.csv") if row.median_us is not None)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    assert timed() == sorted([case.COPY, "right"] * 2)
    assert go_on(late=False) == []
    assert go_on(late=True) == [case.COPY, "right", "late"] * 2
    assert timed() == sorted([case.COPY, "right", "late"] * 2)
    assert go_on() == []


def sampled(clock: timing.Clock, fake: FakeCuda) -> tuple[float, list[str]]:
    """The seconds of a sample, and what it did."""
    fake.log.clear()
    return pytest.approx(clock.sample()), fake.log


def test_cuda_clock_replays_a_graph_of_rotating_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.zeros(3)
    fake = FakeCuda(monkeypatch, effect=lambda: kept.fill_(7.0))
    clock = timing.clock(CUDA, [lambda: (kept,), *([lambda: (torch.zeros(3),)] * 7)])
    assert clock.method == "graph of 8 sets"
    assert clock.outputs[0].tolist() == [7.0] * 3  # written by a replay, after the captured outputs were cleared
    assert sampled(clock, fake) == (1e-3, ["event", "replay", "event", "wait"])  # 8 ms over 8 sets
    fake = FakeCuda(monkeypatch, launch=0.5e-3)
    clock = timing.clock(CUDA, [lambda: (kept,)] * 8)
    assert sampled(clock, fake) == (0.5e-3 / 8, ["event", *["replay"] * 4, "event", "wait"])  # to fill 2 ms
    fake = FakeCuda(monkeypatch, capturable=False)
    clock = timing.clock(CUDA, [lambda: (setattr(fake, "now", fake.now + 1e-3), kept)[1:]] * 8)
    assert clock.method == "events over 8 sets, no graph: operation not permitted when stream is capturing"
    assert sampled(clock, fake) == (1e-3, ["event", "event", "wait"])


@pytest.mark.parametrize(("cache", "most"), [("cold", 8), ("warm", 2)])
def test_cuda_clock_keeps_the_outputs_of_cold_calls_alone(cache: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop of calls a result is let go when the next is there: of warm calls no third one is alive."""
    FakeCuda(monkeypatch)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def step() -> tuple[Tensor, ...]:
        out = torch.full((3,), 5.0)
        made.append(weakref.ref(out))
        alive.append(sum(one() is not None for one in made))
        return (out,)

    clock = timing.clock(CUDA, [step] * 8, cache)
    assert clock.method == ("graph of 8 sets" if cache == "cold" else "graph of 8 calls of one set")
    assert max(alive[-8:]) == most
    assert clock.outputs[0].tolist() == [0.0] * 3  # cleared: this fake's replay does not write it


def test_ceilings_parts_and_rough_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have times, and no figures of the whole; the roofline is the slower of copy and matmul."""
    parts = {"part: a little": by(lambda x: x[:1] + 0), "part: broken": by(broken)}
    rough = doubling(wrong=by(lambda x: 2.001 * x))
    declared = dataclasses.replace(rough, ceilings=parts, rough={"wrong": 1e-2}, products=True)
    measured = measure.measure(declared, CPU, BRIEF)
    found = {row.peer: dict(zip(rows.HEADINGS, rows.line(row, measured), strict=True)) for row in measured}
    assert list(found) == [case.COPY, *parts, case.MATMUL, "wrong"]
    shown = [[what for what in ("GB/s", "x copy", "error") if line[what]] for line in found.values()]
    assert shown == [["GB/s", "x copy"], [], [], ["x copy"], ["GB/s", "x copy", "error"]]
    assert found["part: broken"]["median"] == "refused: RuntimeError: no such luck"
    copy, *_, product, wrong = measured
    slower = max(copy, product, key=lambda row: row.median_us)
    assert rows.share_of_floor(wrong, measured) == rows.paired(slower.visits, wrong.visits)
    assert rows.share_of_floor(dataclasses.replace(wrong, peer="imm, bfloat16"), measured) is None
    # A broken ceiling ends nothing, not even the copy: a large case may leave no memory for it.
    monkeypatch.setattr(measure, "copy_peer", lambda case, device: by(broken))
    copy, right = measure.measure(doubling(right=RIGHT), CPU, BRIEF)
    assert copy.status == "refused: RuntimeError: no such luck"
    assert (right.status, right.ratio_to_copy, right.median_us is None) == (rows.OK, None, False)
    assert "right" in rows.table([copy, right])


def test_ratios_spread_and_joined_visits() -> None:
    """Ratios are of the same round and visit: a slow peer has fewer rounds. The spread is that of all visits."""
    slow, quick = [[1.0, 10.0], [100.0, 100.0]], [[0.5, 5.0, 7.0, 7.0], [50.0, 50.0, 7.0]]
    assert (rows.beside(slow, quick), rows.paired(slow, quick)) == ([[2.0, 2.0], [2.0, 2.0]], 2.0)
    assert rows.interval([[1.0] * 8 + [9.0], [2.0, 3.0]]) == (1.0, pytest.approx(2.8))
    assert rows.interval([[1.0] * 4 + [2.0] * 4]) == (1.0, 2.0)  # of one visit its halves

    def row(peer: str, *visits: list[float], status: str = rows.OK, **values: Any) -> rows.Row:
        made = rows.Row("op", "mode", "N=1", "float32", "cpu", "warm", peer, status, bytes=8, **values)
        if visits:
            made.timed(visits, ())
        return made

    first = [row(case.COPY, [1.0, 2.0, 3.0, 4.0], [1.0, 1.0]), row("imm", [10.0, 20.0], [20.0], error=1e-7, peak_bytes=9)]
    first += [row("wrong", status="refused: wrong"), row("fails", [3.0], error=0.0), row("absent", [3.0], error=0.0)]
    second = [row("imm", [100.0, 200.0]), row(case.COPY, [5.0, 20.0, 1.0]), row("fails", status="refused: no memory")]
    _, imm, wrong, fails = rows.joined(first, second)
    assert imm.visits == [[10e6, 20e6], [20e6], [100e6, 200e6]]
    found = (imm.rounds, imm.median_us, imm.error, imm.peak_bytes, imm.ratio_to_copy)
    assert found == (5, 20e6, 1e-7, 9, 10.0)  # the last of 10, 10, 20, 20, 10
    assert [(one.status, one.visits) for one in (wrong, fails)] == [("refused: wrong", []), ("refused: no memory", [])]


def test_a_long_step_is_timed_call_by_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rounds are shared out to the visits; on CUDA a part is the replay of a graph."""
    declared = dataclasses.replace(doubling(right=RIGHT), rounds=5, caches=("warm",))
    for visits, expected in ((1, 5), (2, 3), (3, 2)):
        found = measure.measure(declared, CPU, measure.Effort(0.0, 9, 9, visits))
        assert {(row.rounds, row.method) for row in found} == {(expected, "wall clock over one call")}
    fake, calls = FakeCuda(monkeypatch), []
    part = timing.captured(lambda: (calls.append(1), (torch.ones(3),))[1])
    clock = timing.single_calls(CUDA, part)
    assert (fake.log, len(calls)) == (["clearCublasWorkspaces", "capture", "clearCublasWorkspaces", *["replay"] * 3], 4)
    assert sampled(clock, fake) == (8e-3, ["event", "replay", "event", "wait"])
    assert [timing.sets_of_buffers(CPU, size) for size in (1_000, 40_000_000, 10**9)] == [64, 10, 2]
    assert [timing.sets_of_buffers(CUDA, size) for size in (4_000_000, 10**9)] == [100, 8]
