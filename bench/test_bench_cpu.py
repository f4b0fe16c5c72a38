"""The op files' peers under pytest-benchmark, one after the other: make bench. ``imm bench`` is the interleaved measurement."""

from __future__ import annotations

import pytest
import torch

from harness.case import Case, Step, load, operations
from harness.measure import copy_peer, errors, refusal

CPU = torch.device("cpu")
CASES = [case for op in operations() for case in load(op).cases(CPU, quick=True)]
PEERS = [pytest.param(case, name, id=f"{case.op}-{name}") for case in CASES for name in case.peers]


@pytest.mark.parametrize(("case", "name"), PEERS)
def test_peer(benchmark, case: Case, name: str) -> None:
    torch.manual_seed(0)
    inputs = case.inputs()
    step = case.peers[name](*inputs)
    assert refusal(case, name, errors(step(), case.truth(*inputs))) is None
    _time(benchmark, case, step)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_copy_of_the_same_bytes(benchmark, case: Case) -> None:
    _time(benchmark, case, copy_peer(case, CPU)())


def _time(benchmark, case: Case, step: Step) -> None:
    benchmark.group = f"{case.op} {case.mode}, {case.size}"
    benchmark.extra_info.update(bytes=case.bytes, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
