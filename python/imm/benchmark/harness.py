"""Measures a Case: checks every peer against float64, then times the peers in turns (A B C A B C ...)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.benchmark import environment, gate
from imm.benchmark.case import COPY, MATMUL, Case, Peer, Step, load, operations, product_shape
from imm.benchmark.case import folder as bench_folder
from imm.benchmark.memory import peak_bytes
from imm.benchmark.rows import OK, TESTS, Row, append, claims, read, table, written
from imm.benchmark.timing import Clock, clock, do_bench, sets_of_buffers, single_calls


@dataclass(frozen=True)
class Effort:
    """How long a case is measured with one cache: ``least`` rounds of all peers, then for ``seconds`` rounds of those that take
    less than ``seconds`` / 50 a call, ``most`` in all."""

    seconds: float
    least: int
    most: int

    @property
    def slow(self) -> float:
        """Seconds of a call beyond which a peer has the least rounds."""
        return self.seconds / 50


QUICK = Effort(1.5, 6, 100)
FULL = Effort(3.0, 6, 300)
#: More numbers are copied in several calls: beyond all caches, a larger buffer shows nothing more.
_COPIED = 1 << 27


def copy_peer(case: Case, device: torch.device) -> Peer:
    """A copy that reads and writes as many bytes in all as the case must move: the ceiling of the same run."""

    def prepare(*inputs: Any) -> Step:
        count = max(1, case.bytes // 8)
        source = torch.randn(min(count, _COPIED), device=device)
        target = torch.empty_like(source)
        if count <= _COPIED:
            return lambda: (target.copy_(source),)

        def step() -> tuple[Tensor, ...]:
            for start in range(0, count, _COPIED):
                target[: count - start].copy_(source[: count - start])
            return (target,)

        return step

    return prepare


def matmul_peer(case: Case, device: torch.device) -> Peer:
    """One product of the case's dtype, of random numbers, with as many flops as the case."""

    def prepare(*inputs: Any) -> Step:
        rows, side = product_shape(case.flops)
        a, b = (torch.randn(n, side, dtype=torch.float32, device=device).to(case.dtype) for n in (rows, side))
        target = torch.empty_like(a)
        return lambda: (torch.mm(a, b, out=target),)

    return prepare


def errors(outputs: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> tuple[float, ...]:
    """Per output the largest error relative to the largest true number; infinite for a wrong count, shape or NaN."""
    if len(outputs) != len(truth):
        return (float("inf"),)
    found = []
    for output, exact in zip(outputs, truth, strict=True):
        if output.shape != exact.shape:
            return (float("inf"),)
        error = (output.detach().double() - exact).abs().max() / exact.abs().max()
        found.append(float(error) if bool(torch.isfinite(error)) else float("inf"))
    return tuple(found)


def refusal(case: Case, peer: str, found: tuple[float, ...]) -> str | None:
    """Why a peer with these errors is not timed, or None."""
    accepted = [case.rough.get(peer, tolerance) for tolerance in case.tolerances]
    pairs = enumerate(zip(found, accepted, strict=False))
    wrong = [f"output {i}: {error:.1e} > {bound:.0e}" for i, (error, bound) in pairs if not error <= bound]
    if len(found) != len(case.tolerances):
        wrong = ["outputs of another number or shape"]
    return f"refused: wrong, {'; '.join(wrong)}" if wrong else None


def _prepared(peer: Peer, sets: list[tuple[Any, ...]], device: torch.device, row: Row) -> list[Step]:
    """The steps of a peer or ceiling, one per set; none, with the reason in its row, where it does not run. Only of peers is
    the memory measured."""
    try:
        if row.status != OK:
            row.peak_bytes = peak_bytes(peer, sets[0], device)
        return [peer(*inputs) for inputs in sets]
    except Exception as error:  # a peer may fail in any way; the others are still measured
        row.status = _failure(error)
        return []


def _failure(error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), "")
    return f"refused: {type(error).__name__}: {reason[:120]}"


def _ready(case: Case, steps: list[Step], truth: tuple[Tensor, ...], device: torch.device, row: Row) -> Clock | None:
    """A peer's clock; None, with the reason in its row, where the peer is wrong. A ceiling is not checked."""
    try:
        ready = single_calls(device, steps[0]) if case.rounds else clock(device, steps, row.cache)
        if row.peer in case.peers:
            found = errors(ready.outputs, truth)
            row.error = max(found)
            row.status = refusal(case, row.peer, found) or OK
    except Exception as error:
        row.status = _failure(error)
    return ready if row.status == OK else None


def _in_turns(clocks: dict[str, Clock], effort: Effort) -> dict[str, list[float]]:
    """Samples of every peer, A B C A B C ...; those of one index are of one round."""
    samples: dict[str, list[float]] = {name: [] for name in clocks}

    def turn(peers: dict[str, Clock]) -> None:
        for name, ready in peers.items():
            samples[name].append(ready.sample())

    for _ in range(effort.least):
        turn(clocks)
    quick = {name: ready for name, ready in clocks.items() if min(samples[name]) < effort.slow}
    start, rounds = time.perf_counter(), effort.least
    while quick and rounds < effort.most and time.perf_counter() - start < effort.seconds:
        turn(quick)
        rounds += 1
    return samples


def measure(case: Case, device: torch.device, effort: Effort = FULL) -> list[Row]:
    """One row per cache and peer, the ceilings first. What fails or is wrong has a row that says so, without a time."""
    effort = Effort(0.0, case.rounds, case.rounds) if case.rounds else effort
    torch.manual_seed(0)
    torch.compiler.reset()  # a peer compiles for this shape, as in a program that uses one
    count = sets_of_buffers(device, case.bytes) if "cold" in case.caches else 1
    sets = [case.inputs() for _ in range(count)]
    truth = case.truth(*sets[0])
    ceilings = {COPY: copy_peer(case, device), **case.ceilings}
    if case.products:
        ceilings[MATMUL] = matmul_peer(case, device)
    named = [(Row.of(case, device, peer=name, status=OK), ceiling) for name, ceiling in ceilings.items()]
    named += [(Row.of(case, device, peer=name), peer) for name, peer in case.peers.items()]
    prepared = [(row, _prepared(one, sets, device, row)) for row, one in named]
    found: list[Row] = []
    for cache in case.caches:
        clocks: dict[str, Clock] = {}
        for known, steps in prepared:
            row = replace(known, cache=cache)
            found.append(row)
            if steps and (ready := _ready(case, steps, truth, device, row)):
                clocks[row.peer], row.method = ready, ready.method
        samples = _in_turns(clocks, effort)
        for row in found[-len(prepared) :]:
            if row.peer in samples:
                row.timed(samples[row.peer], samples.get(COPY, ()))
        if device.type == "cuda" and cache == case.caches[0] and not case.rounds:
            _beside(found[-len(prepared) :], {row.peer: steps for row, steps in prepared})
    return found


def _beside(rows: list[Row], steps: dict[str, list[Step]]) -> None:
    """What triton.testing.do_bench says of the peers that were timed."""
    for row in rows:
        if row.median_us is None or row.error is None:
            continue
        with contextlib.suppress(RuntimeError):  # a peer's own time stands without it
            seconds = do_bench(steps[row.peer][0])
            row.do_bench_us = None if seconds is None else round(1e6 * seconds, 3)


def measured_before(folder: Path | None, commit: str) -> set[tuple[str, ...]]:
    """(op, mode, shape, dtype, device) of the cases that a folder has rows of, from this commit."""
    path = None if folder is None else folder / "rows.csv"
    found = read(path) if path is not None and path.exists() else []
    return {(row.op, row.mode, row.shape, row.dtype, row.device) for row in found if row.commit == commit}


def _key(case: Case, device: torch.device) -> tuple[str, ...]:
    return case.op, case.mode, case.size, str(case.dtype).removeprefix("torch."), device.type


def run(
    op: str,
    device: torch.device,
    out: Path | None,
    *,
    quick: bool,
    resume: bool = False,
    tests: bool = True,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure an op ("all": every one), print a table per case, and append rows and the environment to the folder ``out``.

    Args:
        quick: the first case of each op, for a few seconds.
        resume: leave out the cases that ``out`` has from this commit: a run that was cut short goes on.
        tests: run each op's own tests first and refuse its figures while one fails; False where they have just run.

    Returns:
        The rows; of an op whose tests fail one of mode TESTS, which is in no file.

    Raises ValueError for an op without a file, FileNotFoundError outside a checkout.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events, graphs and the allocator's figures are the current device's
    chosen = operations() if op == "all" else [op]
    modules = {name: load(name) for name in chosen}
    torch.set_num_threads(torch.get_num_threads())  # from here on a fixed number
    recorded = environment.record(device)
    if out is not None:
        written(out)  # refuses a folder of other columns before the work
    asked = {name: gate.tests_of(module, device) for name, module in modules.items()} if tests else {}
    refused = gate.refusals(asked, bench_folder().parent) if tests else {}
    done = measured_before(out, recorded["commit"]) if resume else set()
    rows: list[Row] = []
    effort = QUICK if quick or device.type == "cuda" else FULL
    for name, module in modules.items():
        if name in refused:
            say(f"{name}: refused: {refused[name]}\n")
            rows.append(Row(name, TESTS, "", "", device.type, peer="imm", status=f"refused: {refused[name]}"))
            continue
        cases = (case for case in module.cases(device, quick) if _key(case, device) not in done)
        timed = (measure(case, device, effort) for case in cases)
        limits: Iterable[list[Row]] = [] if quick else getattr(module, "limits", lambda device: [])(device)
        for measured in chain(timed, limits):
            for row in measured:
                row.commit, row.machine = recorded["commit"], recorded["machine"]
            rows += measured
            for _, of_cache in groupby(measured, key=lambda row: row.cache):
                shown = list(of_cache)
                say(table(shown))
                say(claims(shown, getattr(module, "CLAIMS", ())))
            if out is not None:  # at once: a run that is cut short keeps what it has
                append(out, measured)
                environment.write(out, {**recorded, "after": environment.after(device)})
    return rows
