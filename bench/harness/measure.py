"""Measures a Case: checks every peer against float64, then times the peers interleaved (A B C A B C ...).

A shared machine is a faster or a slower one for minutes. So on the CPU the whole list of cases is gone through several times:
the rounds of a row are of visits that lie as far apart as the run allows, and its spread is that of all of them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import environment, gate
from harness.case import COPY, MATMUL, ROOT, Case, Peer, Step, chosen, product_shape
from harness.rows import OK, TESTS, Row, claims, grouped, joined, table, write, written
from harness.timing import Clock, clock, sets_of_buffers, single_calls


@dataclass(frozen=True)
class Effort:
    """How long a case is measured with one cache, at each of its visits: ``least`` rounds of all peers, then for ``seconds``
    rounds of the quick ones, ``most`` in all. Quick is a call of at most a fiftieth of what all visits have."""

    seconds: float
    least: int
    most: int
    visits: int = 1


QUICK = Effort(0.5, 2, 35, visits=3)
FULL = Effort(1.0, 3, 150, visits=2)
CUDA = Effort(0.6, 6, 100)
#: More numbers are copied in several calls: beyond all caches, a larger buffer shows nothing more.
_COPIED = 1 << 27


def copy_peer(case: Case, device: torch.device) -> Peer:
    """A copy that reads and writes as many bytes in all as the case must move: the ceiling of the same run."""

    def prepare(*inputs: Any) -> Step:
        count = max(1, case.bytes // 8)
        source = torch.randn(min(count, _COPIED), device=device)
        target = torch.empty_like(source)

        def step() -> tuple[Tensor, ...]:
            for start in range(0, count, _COPIED):
                target[: count - start].copy_(source[: count - start])
            return (target,)

        return step if count > _COPIED else lambda: (target.copy_(source),)

    return prepare


def matmul_peer(case: Case, device: torch.device) -> Peer:
    """One product of the case's dtype, of random numbers, with as many flops as the case."""

    def prepare(*inputs: Any) -> Step:
        rows, side = product_shape(case.flops)
        a, b = (torch.randn(n, side, dtype=torch.float32, device=device).to(case.dtype) for n in (rows, side))
        target = torch.empty_like(a)
        return lambda: (torch.mm(a, b, out=target),)

    return prepare


def peak_bytes(peer: Peer, inputs: tuple[Any, ...], device: torch.device) -> int:
    """Peak bytes of a peer's second step, from torch's allocator; what existed before (a network's weights) is not counted."""
    given = sum(value.nbytes for value in inputs if isinstance(value, Tensor))
    measured = _cuda if device.type == "cuda" else _cpu

    def first() -> Step:
        step = peer(*inputs)
        step()  # compiles, and leaves what it keeps
        return step

    step, kept, _ = measured(first)
    _, _, most = measured(step)
    return given + kept + most


def _cuda(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """What the call returns, the bytes more than before after it, and at most within it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before


def _cpu(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The same from the profiler, which notes every allocation of torch's CPU allocator."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    recorded = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = [0, *accumulate(event.nbytes() for event in sorted(recorded, key=lambda event: event.start_ns()))]
    return result, held[-1], max(held)


def errors(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> tuple[float, ...]:
    """Per output the largest error relative to the largest true number; infinite for a wrong count, shape or NaN."""
    if [output.shape for output in outputs] != [exact.shape for exact in truth]:
        return (math.inf,)
    pairs = zip(outputs, truth, strict=True)
    found = (float((output.detach().double() - exact).abs().max() / exact.abs().max()) for output, exact in pairs)
    return tuple(error if math.isfinite(error) else math.inf for error in found)


def refusal(case: Case, peer: str, found: tuple[float, ...]) -> str | None:
    """Why a peer with these errors is not timed, or None."""
    if len(found) != len(case.tolerances):
        return "refused: wrong, outputs of another number or shape"
    pairs = enumerate(zip(found, (case.rough.get(peer, tolerance) for tolerance in case.tolerances), strict=True))
    wrong = [f"output {i}: {error:.1e} > {bound:.0e}" for i, (error, bound) in pairs if not error <= bound]
    return f"refused: wrong, {'; '.join(wrong)}" if wrong else None


def _tried(make: Callable[[], Any], row: Row) -> Any:
    """What ``make`` gives; None, with the reason in the row, where it fails: the others are still measured."""
    try:
        return make()
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        row.status = f"refused: {type(error).__name__}: {reason[:120]}"
        return None


def _prepared(peer: Peer, sets: list[tuple[Any, ...]], device: torch.device, row: Row) -> list[Step]:
    """The steps of a peer or ceiling, one per set. The memory is measured of a peer that was not found right yet."""
    if row.status != OK:
        row.peak_bytes = peak_bytes(peer, sets[0], device)
    return [peer(*inputs) for inputs in sets]


def _ready(case: Case, steps: list[Step], truth: tuple[Tensor, ...], device: torch.device, row: Row) -> Clock | None:
    """A peer's clock; None, with the reason in its row, where the peer is wrong. A ceiling is not checked."""
    ready = single_calls(device, steps[0]) if case.rounds else clock(device, steps, row.cache)
    if row.status != OK:
        found = errors(ready.outputs, truth)
        row.error = max(found)
        row.status = refusal(case, row.peer, found) or OK
    return ready if row.status == OK else None


def _in_turns(clocks: dict[str, Clock], effort: Effort) -> dict[str, list[float]]:
    """Samples of every peer, A B C A B C ...; those of one index are of one round."""
    samples: dict[str, list[float]] = {name: [] for name in clocks}

    def turn(peers: dict[str, Clock]) -> None:
        for name, ready in peers.items():
            samples[name].append(ready.sample())

    for _ in range(effort.least):
        turn(clocks)
    slow = effort.visits * effort.seconds / 50
    quick = {name: ready for name, ready in clocks.items() if min(samples[name]) < slow}
    start, rounds = time.perf_counter(), effort.least
    while quick and rounds < effort.most and time.perf_counter() - start < effort.seconds:
        turn(quick)
        rounds += 1
    return samples


def measure(case: Case, device: torch.device, effort: Effort = FULL, before: Sequence[Row] = ()) -> list[Row]:
    """One visit: a row per cache and peer, the ceilings first. What fails or is wrong has a row that says so, without a time.

    ``before`` has the rows of earlier visits: what was refused then is left out, the others' memory and results, which are
    known, are not looked at again.
    """
    if case.rounds:
        a_visit = math.ceil(case.rounds / effort.visits)
        effort = Effort(0.0, a_visit, a_visit)
    refused = {(row.cache, row.peer) for row in before if row.median_us is None}
    torch.manual_seed(0)
    torch.compiler.reset()  # a peer compiles for this shape, as in a program that uses one
    count = sets_of_buffers(device, case.bytes) if "cold" in case.caches else 1
    sets = [case.inputs() for _ in range(count)]
    truth = () if before else case.truth(*sets[0])
    ceilings = {COPY: copy_peer(case, device), **case.ceilings}
    if case.products:
        ceilings[MATMUL] = matmul_peer(case, device)
    named = [(Row.of(case, device, peer=name, status=OK), ceiling) for name, ceiling in ceilings.items()]
    named += [(Row.of(case, device, peer=name, status=OK if before else ""), peer) for name, peer in case.peers.items()]
    named = [(row, one) for row, one in named if any((cache, row.peer) not in refused for cache in case.caches)]
    prepared = [(row, _tried(partial(_prepared, one, sets, device, row), row)) for row, one in named]
    found: list[Row] = []
    for cache in case.caches:
        of_cache = [(replace(row, cache=cache), steps) for row, steps in prepared if (cache, row.peer) not in refused]
        clocks: dict[str, Clock] = {}
        for row, steps in of_cache:
            ready = _tried(partial(_ready, case, steps, truth, device, row), row) if steps else None
            if ready is not None:
                clocks[row.peer], row.method = ready, ready.method
        samples = _in_turns(clocks, effort)
        for row, _ in of_cache:
            if row.peer in samples:
                row.timed([samples[row.peer]], [samples[COPY]] if COPY in samples else [])
        found += [row for row, _ in of_cache]
    return found


def run(
    op: str,
    device: torch.device,
    out: Path | None,
    *,
    quick: bool,
    resume: bool = False,
    tests: bool = True,
    late: bool | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure an op ("all": every one), visit by visit, and print a table per case at its last one. What a folder ``out`` has
    of the rows and the environment is up to date after each case: a run that is cut short keeps what it has.

    Args:
        quick: the first case of each op, for a few seconds.
        resume: continue what ``out`` has from this commit: the visits that its cases lack.
        tests: run each op's own tests first and refuse its figures while one fails; False where they run elsewhere.
        late: on CUDA, which is visited once, the pass without the peers that compile for long (:class:`Case`), which comes
            first (False), the one with them (True) or both (None).

    Returns:
        The rows; of an op whose tests fail one of mode TESTS, which is in no file.

    Raises ValueError for an op without a file.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events, graphs and the allocator's figures are the current device's
    modules, finished = chosen(op), []
    torch.set_num_threads(torch.get_num_threads())  # from here on a fixed number
    recorded = environment.record(device)
    earlier = written(out) if out is not None else []  # refuses a folder of other columns before the work
    asked = {name: gate.tests_of(module, device) for name, module in modules.items()} if tests else {}
    for name, reason in gate.refusals(asked, ROOT).items():
        say(f"{name}: refused: {reason}\n")
        finished.append(Row(name, TESTS, "", "", device.type, peer="imm", status=f"refused: {reason}"))
        del modules[name]
    effort = CUDA if device.type == "cuda" else QUICK if quick else FULL
    same = recorded["commit"], recorded["machine"], torch.get_num_threads()
    resumed = [row for row in earlier if resume and (row.commit, row.machine, row.threads) == same]
    found = {of_case[0].key[:5]: of_case for of_case in grouped(resumed, "op", "mode", "shape", "dtype", "device")}

    def look_at(case: Case, visit: int, asked: tuple[Any, ...]) -> None:
        key = Row.of(case, device).key[:5]
        before = found.get(key, [])
        if not {row.peer for row in before}.issuperset(case.peers):
            before = []  # of a pass with fewer peers
        if before and all(row.median_us is None or len(row.visits) >= visit for row in before):  # what was refused stays so
            return
        if visit < effort.visits:  # at the last one come the tables
            say(f"visit {visit} of {effort.visits}: {case.op} {case.mode}, {case.size}, {key[3]}")
        measured = measure(case, device, effort, before)
        found[key] = joined(before, measured) if before else measured
        for row in found[key]:
            row.commit, row.machine = recorded["commit"], recorded["machine"]
        if out is not None:
            write(out, found[key])
            environment.write(out, {**recorded, "after": environment.now(device)})
        if visit == effort.visits:
            finished.extend(found[key])
            for of_cache in grouped(found[key], "cache"):
                say(table(of_cache))
                say(claims(of_cache, asked))

    once = effort.visits == 1
    passes = [late] if late is not None else [False, True] if once else [True]
    for visit, with_late in ((visit, one) for visit in range(1, effort.visits + 1) for one in passes):
        for module in modules.values():
            for declared in module.cases(device, quick):
                left_out = declared.late if once and not with_late else ()
                if declared.late or not once or not with_late:
                    few = {name: peer for name, peer in declared.peers.items() if name not in left_out}
                    look_at(replace(declared, peers=few), visit, getattr(module, "CLAIMS", ()))
    return list({row.key: row for row in finished}.values())
