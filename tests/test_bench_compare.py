"""Two runs of one machine: what moved beyond the spread of both, what is missing, what cannot be compared; --base REV."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fake_clock import FakeClock

from imm.benchmark import Case, compare, harness, measure, operations, revisions, rows, timing
from imm.benchmark import case as benchmark_case
from imm.benchmark.case import COPY
from imm.benchmark.rows import Row
from imm.cli import main

CPU = torch.device("cpu")
ENVIRONMENT = {"torch": "2.13", "commit": "0123456789abcdef", "dirty": False, "native": {}}


def row(peer: str, times: Sequence[float], case: str = "N=1", **values: Any) -> Row:
    """A row with these samples in microseconds; its ratio to the copy is filled in by ``results``."""
    made = Row("double", "forward", case, "float32", "cpu", "warm", peer, rows.OK, threads=2, machine="mill")
    made = replace(made, error=None if peer == COPY or peer.startswith("part: ") else 1e-7, **values)
    if times:
        made.timed([[1e-6 * t for t in times]], [[1.0] * len(times)])
    return made


def results(*found: Row, name: str = "run", **environment: Any) -> compare.Results:
    return compare.Results.of(name, found, {**ENVIRONMENT, **environment})


def around(middle: float) -> list[float]:
    """Ten samples within 4 % of ``middle``."""
    return [middle * (1 + 0.01 * i) for i in (-4, 3, 0, 2, -1, 1, -2, 4, 0, -3)]


def squares(peers: dict[str, int], pause: float = 0.0) -> Case:
    """Peers that do the same work so many times; each time takes a pause."""

    def repeated(count: int) -> Callable[..., harness.Step]:
        def prepare(x: torch.Tensor) -> harness.Step:
            def step() -> tuple[torch.Tensor, ...]:
                for _ in range(count):
                    timing.time.sleep(pause)
                    y = x @ x
                return (y,)

            return step

        return prepare

    return Case(
        op="square",
        mode="forward",
        shape={"N": 128},
        dtype=torch.float32,
        bytes=4_000_000,
        flops=2 * 128**3,
        inputs=lambda: (torch.randn(128, 128),),
        truth=lambda x: (x.double() @ x.double(),),
        tolerances=(1e-5,),
        peers={name: repeated(times) for name, times in peers.items()},
        caches=("warm",),
    )


def measured(folder: Path, times: int, pause: float = 0.0) -> Path:
    """A results folder of a peer that does its work so many times, beside one that does it once."""
    return folder_of(folder, *measure(squares({"imm": times, "other": 1}, pause), CPU, harness.Effort(0.0, 21, 21)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other make a busy machine's figures arbitrary."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_extra_work_is_flagged_and_the_same_work_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(look=5e-5)
    for module in (timing, harness):
        monkeypatch.setattr(module, "time", clock)
    once, again, more = (
        compare.Results.read(measured(tmp_path / name, times, 0.003)) for name, times in (("a", 1), ("b", 1), ("c", 8))
    )
    assert compare.compare(once, again).moved == []
    found = compare.compare(once, more)
    assert [row.peer for row in found.slower] == ["imm"]
    assert found.moved[0].ratio == pytest.approx(8, rel=0.02)
    assert "other" not in [pair.after.peer for pair in found.moved]
    back = compare.compare(more, once)
    assert [(pair.after.peer, pair.moved) for pair in back.moved if pair.after.peer != COPY] == [("imm", -1)]
    assert back.slower == []


def test_visits_outlast_a_machine_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every other minute it takes 40 % longer for what we do, and the copy does not show it. Runs begin in a fast and in a
    slow one."""
    clock = FakeClock(look=5e-5, pace=lambda now: 1.4 if int(now / 60) % 2 else 1.0)
    for module in (timing, harness):
        monkeypatch.setattr(module, "time", clock)

    def run(name: str, times: int, visits: int, began: float) -> compare.Results:
        def cases(device: torch.device, quick: bool) -> list[Case]:
            if clock.now > began:
                clock.now += 60  # what else is measured
            return [squares({"imm": times}, pause=0.003)]

        clock.now = began
        monkeypatch.setattr(harness, "QUICK", harness.Effort(0.0, 4, 4, visits))
        monkeypatch.setattr(harness, "load", lambda op: SimpleNamespace(cases=cases))
        harness.run("mmd", CPU, tmp_path / name, quick=True, tests=False, say=lambda text: None)
        return compare.Results.read(tmp_path / name)

    fast, slow = (run(f"one-{began}", 1, 1, began) for began in (0, 60))
    assert [(pair.after.peer, round(pair.ratio, 1)) for pair in compare.compare(fast, slow).moved] == [("imm", 1.4)]
    for visits in (2, 3):
        fast, slow, more = (run(f"{visits}-{i}", times, visits, 60 * i) for i, times in enumerate((1, 1, 3)))
        assert compare.compare(fast, slow).moved == compare.compare(slow, fast).moved == []
        for before in (fast, slow):
            assert [row.peer for row in compare.compare(before, more).slower] == ["imm"]
            assert [pair.moved for pair in compare.compare(more, before).moved] == [-1]


@pytest.mark.usefixtures("one_thread")
def test_more_products_are_flagged(tmp_path: Path) -> None:
    """Without pauses: what the processor itself takes longer for."""
    few, many = (compare.Results.read(measured(tmp_path / str(times), times)) for times in (1, 40))
    assert [row.peer for row in compare.compare(few, many).slower] == ["imm"]


def test_a_slower_machine_moves_only_the_copy() -> None:
    before = results(row(COPY, around(100)), row("imm", around(130)))
    after = results(row(COPY, around(150)), row("imm", around(195)))
    found = compare.compare(before, after)
    assert [pair.after.peer for pair in found.moved] == [COPY]
    assert "the copy itself took 1.50 to 1.50 times as long" in str(found)
    assert str(found).endswith("1 of 2 rows agree within their spread (50 %)")


def test_a_copy_that_moved_alone_moves_nothing_else() -> None:
    """The ratio to the copy is lower then, but the time is not."""
    found = compare.compare(
        results(row(COPY, around(100)), row("imm", around(130))), results(row(COPY, around(150)), row("imm", around(130)))
    )
    assert [pair.after.peer for pair in found.moved] == [COPY]


def test_intervals_that_meet_and_near_medians_agree() -> None:
    steady = [100.0] * 10
    for times, moved in (
        ([100 * (1 + 0.9 * compare.LEAST)] * 10, []),
        ([100 * (1 + 1.1 * compare.LEAST)] * 10, ["imm"]),
        ([100.0] * 3 + [180.0] * 7, []),
        ([100.0] + [180.0] * 9, ["imm"]),
    ):
        found = compare.compare(results(row(COPY, steady), row("imm", steady)), results(row(COPY, steady), row("imm", times)))
        assert [row.peer for row in found.slower] == moved


def test_ratios_to_the_copy_are_of_the_same_visit() -> None:
    """The copy has more rounds than a slow peer, which would seem apart beside those of the first visit alone."""

    def run(slow: float) -> compare.Results:
        copy, peer = row(COPY, []), row("imm", [])
        copies = [[1e-4] * 6, [3e-4] * 6]
        copy.timed(copies, copies)
        peer.timed([[1e-3 * slow] * 2, [1e-3 * slow] * 2], copies)
        return results(copy, peer)

    assert compare.compare(run(1.0), run(1.3)).moved == []
    found = compare.compare(run(1.0), run(3.5)).moved
    assert [(pair.after.peer, pair.before.ratio_to_copy, pair.after.ratio_to_copy) for pair in found] == [
        ("imm", pytest.approx(10 * 2 / 3, rel=1e-3), pytest.approx(35 * 2 / 3, rel=1e-3))
    ]


def test_what_the_others_did_as_well_is_the_machine() -> None:
    """The copy knows nothing of a machine that computes slower."""
    before = results(row(COPY, around(100)), *(row(name, around(500)) for name in ("imm", "imm out=", "a", "b", "c")))
    times = {"imm": 660, "imm out=": 900, "a": 650, "b": 640, "c": 620}
    after = results(row(COPY, around(100)), *(row(name, around(time)) for name, time in times.items()))
    assert [row.peer for row in compare.compare(before, after).slower] == ["imm out="]


def test_our_own_parts_are_not_the_machine() -> None:
    parts = [f"part: {i}" for i in range(4)]
    before = results(row(COPY, around(100)), *(row(name, around(500)) for name in ("imm", "plain", *parts)))
    after = results(row(COPY, around(100)), row("plain", around(500)), *(row(name, around(750)) for name in ("imm", *parts)))
    assert [row.peer for row in compare.compare(before, after).slower] == ["imm"]


def test_a_peer_of_ours_that_is_lost_is_slower() -> None:
    before = results(row(COPY, around(100)), row("imm", around(130)), row("plain", around(130)))
    for lost in ([row("imm", [], status="refused: wrong")], []):
        after = results(row(COPY, around(100)), row("plain", around(130)), *lost)
        assert [row.peer for row in compare.compare(before, after).slower] == ["imm"]
    assert compare.compare(before, results(row(COPY, around(100)), row("imm", around(130)))).slower == []


def test_what_is_missing_is_said() -> None:
    copy = row(COPY, around(100))
    peers = [copy, row("imm", around(130)), row("gone", around(130)), row("fails", around(130))]
    other = [row(COPY, around(100), "N=2"), row("imm", around(100), "N=2")]
    before = results(*peers, *other)
    after = results(copy, peers[1], row("fails", [], status="refused: RuntimeError: no"), row("young", around(9)), native=None)
    text = str(compare.compare(before, after))
    assert "2 rows in both, 0 moved, 3 vanished, 1 newly refused, 1 new" in text
    assert "vanished: double forward, N=1, float32, warm, gone" in text
    assert "vanished: double forward, N=2, float32, warm: 2 rows" in text
    assert "refused: RuntimeError: no (double forward, N=1, float32, warm, fails)" in text
    assert "note: native differs: True and False" in text


def test_other_versions_are_named_and_other_machines_refused() -> None:
    plain = [row(COPY, around(100)), row("imm", around(130))]
    text = str(compare.compare(results(*plain), results(*plain, torch="2.14", dirty=True)))
    assert "note: torch differs: 2.13 and 2.14\nnote: dirty differs: False and True\n" in text
    assert "triton" not in text
    for change in ({"machine": "other"}, {"threads": 1}, {"device": "cuda"}):
        with pytest.raises(ValueError, match="compare: expected results of one machine, device and number of threads"):
            compare.compare(results(*plain), results(*(replace(one, **change) for one in plain)))
    with pytest.raises(ValueError, match="rows with samples in common, got none"):
        compare.compare(results(*plain), results(*(replace(one, shape="N=7") for one in plain)))


def test_merged_runs_count_the_spread_of_both() -> None:
    """A side whose two processes differ by 30 % does not agree less with itself than with another side."""
    fast, slow = ([row(COPY, around(100)), row("imm", around(t))] for t in (100, 130))
    both = compare.merged("both", results(*fast), results(*(replace(one) for one in slow)))
    assert both.rows[next(reversed(both.rows))].rounds == 20
    assert compare.compare(results(*fast), results(*slow)).slower
    assert compare.compare(both, results(*slow)).moved == []
    assert compare.compare(results(*fast), both).moved == []
    broken = row("imm", [], status="refused: wrong")
    for pair in ((fast, [slow[0], broken]), ([fast[0], broken], slow)):
        made = compare.merged("both", *(results(*found) for found in pair))
        assert [one.status for one in made.rows.values()] == [rows.OK, "refused: wrong"]
    shorter = compare.merged("both", results(*fast), results(row(COPY, around(90)[:4]), row("imm", around(90)[:4])))
    assert [[len(visit) for visit in one.visits] for one in shorter.rows.values()] == [[10, 4], [10, 4]]


def folder_of(path: Path, *found: Row, **environment: Any) -> Path:
    rows.write(path, found)
    (path / "environment.json").write_text(json.dumps({**ENVIRONMENT, **environment}))
    return path


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = folder_of(tmp_path / "a", row(COPY, around(100)), row("imm", around(130)))
    b = folder_of(tmp_path / "b", row(COPY, around(100)), row("imm", around(190)))
    call = lambda *arguments: CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert call("compare", a, b).exit_code == 0
    assert "slower: double forward, N=1, float32, warm, imm: 130.0 us -> 190.0 us (1.46x" in call("compare", a, b).output
    assert call("compare", a, b, "--fail-if-slower").exit_code == 1
    assert call("compare", b, a, "--fail-if-slower").exit_code == 0
    missing = call("compare", a, tmp_path)
    assert (missing.exit_code, missing.output) == (
        1,
        f"Error: compare: expected a folder with rows.csv and environment.json, got {tmp_path}\n",
    )
    text = call("--help").output
    assert all(word in text for word in (*operations(), "or all", "compare A B", "--base REV"))
    assert call("compare", "--help").output.startswith("Usage: main bench compare [OPTIONS] A B")
    assert call("noise", "--fail-if-slower").exit_code == 2
    monkeypatch.setattr(benchmark_case, "__file__", str(tmp_path / "site-packages" / "imm" / "benchmark" / "case.py"))
    assert "compare A B" in call("--help").output
    assert "OP:" not in call("--help").output


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a harness, an op and two commits; ``first`` lacks the op ``late``."""
    root = tmp_path / "checkout"
    (root / "python" / "imm" / "benchmark").mkdir(parents=True)
    (root / "bench").mkdir()
    git = lambda *arguments: subprocess.run(
        ["git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True
    )
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "empty")
    git("tag", "empty")
    (root / "python" / "imm" / "benchmark" / "rows.py").write_text("")
    (root / "bench" / "bench_noise.py").write_text("first")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    git("tag", "first")
    (root / "bench" / "bench_noise.py").write_text("second")
    git("commit", "--quiet", "--all", "-m", "second")
    monkeypatch.setattr(revisions, "bench_folder", lambda: root / "bench")
    return root


def worktrees(root: Path) -> int:
    text = subprocess.run(["git", "-C", root, "worktree", "list"], check=True, capture_output=True, text=True).stdout
    return len(text.splitlines())


def test_base_measures_both_in_turns_and_leaves_nothing(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str], str]] = []
    sides: list[Path] = []

    def measure(side: Path, op: str, options: list[str], out: Path, changes: dict[str, str]) -> compare.Results:
        text = (side / "bench" / f"bench_{op}.py").read_text()
        commit = subprocess.run(["git", "-C", side, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        calls.append((text, options, out.name))
        sides.append(side)
        time = {"first": 100, "second": 150}[text]
        found = row(COPY, around(100)), row("imm", around(time))
        return compare.Results.read(folder_of(out, *found, commit=commit.stdout.strip()))

    monkeypatch.setattr(revisions, "measure", measure)
    arguments = ["bench", "noise", "--quick", "--device=cpu", "--base", "first", "--out", str(tmp_path / "kept")]
    result = CliRunner().invoke(main, [*arguments, "--fail-if-slower"])
    assert result.exit_code == 1, result.output
    assert "1 moved" in result.output
    assert "slower: double forward, N=1, float32, warm, imm: 100.0 us -> 150.0 us" in result.output
    assert "each side is measured by its own" in result.output
    options = ["--device=cpu", "--quick"]
    order = (("first", "base-1"), ("second", "tree-1"), ("first", "base-2"), ("second", "tree-2"))
    assert calls == [(text, options, name) for text, name in order]
    assert sides[1] == repository
    assert not sides[0].exists()
    assert worktrees(repository) == 1
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert again.output.startswith("Error: out: expected a folder without an earlier comparison, got ")


def test_base_refuses_in_one_line(repository: Path) -> None:
    for revision, op, reason in (
        ("nowhere", "noise", "base: expected a commit of this checkout, got 'nowhere'"),
        ("--all", "noise", "base: expected a commit of this checkout, got '--all'"),
        ("empty", "noise", "base: expected a commit with python/imm/benchmark/rows.py, got 'empty', which has none"),
        ("first", "mmd", "base: expected a commit with bench/bench_mmd.py, got 'first', which has none"),
    ):
        result = CliRunner().invoke(main, ["bench", op, "--device=cpu", "--base", revision])
        assert result.exit_code == 1
        assert result.output.startswith(f"Error: {reason}")
        assert len(result.output.splitlines()) == 1
    assert worktrees(repository) == 1


def test_base_cleans_up_after_an_interrupt(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def measure(side: Path, *rest: Any) -> compare.Results:
        seen.append(side)
        assert worktrees(repository) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(revisions, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        revisions.against("first", "noise", [], None, lambda text: None)
    assert not seen[0].exists()
    assert worktrees(repository) == 1


def test_without_a_compiler_both_sides_go_without_the_library(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, str]] = []

    def measure(side: Path, op: str, options: list[str], out: Path, changes: dict[str, str]) -> compare.Results:
        given.append(changes)
        commit = subprocess.run(["git", "-C", side, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        return results(row(COPY, around(100)), row("imm", around(130)), commit=commit.stdout.strip())

    monkeypatch.setattr(revisions, "measure", measure)
    monkeypatch.setattr(revisions.native, "build_info", lambda: {"cuda": None})
    (repository / "CMakeLists.txt").write_text("")
    (repository / "bench" / "build_in_place.py").write_text("raise SystemExit('no compiler here')")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "third"], check=True)
    said: list[str] = []
    assert revisions.against("HEAD", "noise", [], None, said.append).moved == []
    assert [changes.get("IMM_NATIVE") for changes in given] == ["0"] * 4
    assert "note: both sides run without the native library, which cannot be built for HEAD: no compiler here" in said


def test_a_library_older_than_its_sources_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revisions.native, "build_info", lambda: {"cuda": None})
    files = [tmp_path / name for name in ("python/imm/_native/lib.so", "csrc/a.cpp", "csrc/cuda/b.cu")]
    for age, path in zip((10, 20, 0), files, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert revisions.newer_source(tmp_path) is None  # the one of csrc/cuda is not in this library
    files[1].touch()
    assert revisions.newer_source(tmp_path) == Path("csrc/a.cpp")


@pytest.fixture
def alarm(tmp_path: Path) -> Iterator[None]:
    """KeyboardInterrupt when a file "pid" is there."""

    def ring(*_: Any) -> None:
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def test_what_runs_ends_with_an_interrupt(tmp_path: Path, alarm: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        revisions.run(["sh", "-c", "sleep 60 & echo $! > pid; wait"], tmp_path, {})
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    for _ in range(200):
        try:
            ended = " Z " in stat.read_text()
        except (FileNotFoundError, ProcessLookupError):
            ended = True
        if ended:
            return
        time.sleep(0.05)
    pytest.fail("what was started still runs")


def test_what_fails_is_named_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match=r"^last$"):
        revisions.run(["sh", "-c", "echo first; echo last; exit 3"], tmp_path, {})
    assert revisions.run(["sh", "-c", 'echo "$A$GIT_DIR"'], tmp_path, {"A": "b"}) == "b\n"
