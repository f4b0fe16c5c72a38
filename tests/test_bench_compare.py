"""Two runs of one machine: what moved beyond the spread of both, what is missing, what cannot be compared; --base REV."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import call as invoke
from command_line import refused, said
from fake_clock import FakeClock
from test_bench import doubling

from harness import compare, measure, rows, timing
from harness.case import COPY, Case, call
from harness.rows import Row

CPU = torch.device("cpu")
ENVIRONMENT = {"torch": "2.13", "commit": "0123456789abcdef", "dirty": False, "native": {}}


def row(peer: str, times: Sequence[float], case: str = "N=1", **values: Any) -> Row:
    """A row with these samples in microseconds; its ratio to the copy is filled in by ``results``."""
    made = Row("double", "forward", case, "float32", "cpu", "warm", peer, rows.OK, threads=2, machine="mill")
    made = replace(made, error=None if peer == COPY else 1e-7, **values)
    if times:
        made.timed([[1e-6 * t for t in times]], [[1.0] * len(times)])
    return made


def results(*found: Row, name: str = "run", **environment: Any) -> compare.Results:
    return compare.Results.of(name, found, {**ENVIRONMENT, **environment})


def around(middle: float) -> list[float]:
    """Ten samples within 4 % of ``middle``."""
    return [middle * (1 + 0.01 * i) for i in (-4, 3, 0, 2, -1, 1, -2, 4, 0, -3)]


def test_visits_outlast_a_machine_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every other minute it takes 40 % longer for what we do, and the copy does not show it. Runs begin in a fast and in a
    slow one."""
    clock = FakeClock(look=5e-5, pace=lambda now: 1.4 if int(now / 60) % 2 else 1.0)
    for module in (timing, measure):
        monkeypatch.setattr(module, "time", clock)

    def run(name: str, times: int, visits: int, began: float) -> compare.Results:
        def cases(device: torch.device, quick: bool) -> list[Case]:
            if clock.now > began:
                clock.now += 60  # what else is measured
            return [replace(doubling(imm=call(lambda x: (timing.time.sleep(0.003 * times), 2 * x)[1])), caches=("warm",))]

        clock.now = began
        monkeypatch.setattr(measure, "QUICK", measure.Effort(0.0, 4, 4, visits))
        monkeypatch.setattr(measure, "chosen", lambda op: {op: SimpleNamespace(cases=cases)})
        measure.run("mmd", CPU, tmp_path / name, quick=True, tests=False, say=lambda text: None)
        return compare.Results.read(tmp_path / name)

    fast, slow = (run(f"one-{began}", 1, 1, began) for began in (0, 60))
    assert list(compare.Comparison(fast, slow).moved.values()) == [1]
    for visits in (2, 3):
        fast, slow, more = (run(f"{visits}-{i}", times, visits, 60 * i) for i, times in enumerate((1, 1, 3)))
        assert compare.Comparison(fast, slow).moved == compare.Comparison(slow, fast).moved == {}
        for before in (fast, slow):
            found = compare.Comparison(before, more)
            assert [row.peer for row in found.slower] == ["imm"]
            assert 2 < found.ratios[next(iter(found.moved))] < 4.5
            assert list(compare.Comparison(more, before).moved.values()) == [-1]


BEFORE, COPIED = {"imm": around(130), "plain": around(130)}, {COPY: around(100)}
FIVE = ("imm", "imm out=", "a", "b", "c")


@pytest.mark.parametrize(
    ("before", "after", "slower"),
    [
        (BEFORE, {COPY: around(150), "imm": around(195), "plain": around(195)}, []),  # the machine, as the copy shows
        # Intervals that meet, and medians that are near, agree.
        ({"imm": [100.0] * 10}, {"imm": [100 * (1 + 0.9 * compare.LEAST)] * 10}, []),
        ({"imm": [100.0] * 10}, {"imm": [100 * (1 + 1.1 * compare.LEAST)] * 10}, ["imm"]),
        ({"imm": [100.0] * 10}, {"imm": [100.0] * 3 + [180.0] * 7}, []),
        ({"imm": [100.0] * 10}, {"imm": [100.0] + [180.0] * 9}, ["imm"]),
        # The copy knows nothing of a machine that computes slower: the others do.
        (dict.fromkeys(FIVE, around(500)), dict(zip(FIVE, map(around, (660, 900, 650, 640, 620)), strict=True)), ["imm out="]),
        # A peer of ours that is refused or lost is slower.
        (BEFORE, {"imm": [], "plain": around(130)}, ["imm"]),
        (BEFORE, {"plain": around(130)}, ["imm"]),
        (BEFORE, {"imm": around(130)}, []),
    ],
)
def test_which_of_ours_are_slower(before: dict[str, Any], after: dict[str, Any], slower: list[str]) -> None:
    sides = [{**COPIED, **side} for side in (before, after)]
    made = [[row(name, times, status=rows.OK if times else "refused: wrong") for name, times in side.items()] for side in sides]
    assert [row.peer for row in compare.Comparison(*(results(*side) for side in made)).slower] == slower


def test_what_is_missing_is_said() -> None:
    copy = row(COPY, around(100))
    peers = [copy, row("imm", around(130)), row("gone", around(130)), row("fails", around(130))]
    other = [row(COPY, around(100), "N=2"), row("imm", around(100), "N=2")]
    before = results(*peers, *other)
    after = results(copy, peers[1], row("fails", [], status="refused: RuntimeError: no"), row("young", around(9)))
    text = str(compare.Comparison(before, after))
    assert "the copy itself took 1.00 to 1.00 times as long\n2 of 2 rows agree within their spread (100 %)" in text
    assert "2 rows in both, 0 moved, 3 vanished, 1 newly refused, 1 new" in text
    assert "vanished: double forward, N=1, float32, warm, gone" in text
    assert "refused: RuntimeError: no (double forward, N=1, float32, warm, fails)" in text


def test_other_versions_are_named_and_other_machines_refused() -> None:
    plain = [row(COPY, around(100)), row("imm", around(130))]
    text = str(compare.Comparison(results(*plain), results(*plain, torch="2.14", dirty=True)))
    assert "note: torch differs: 2.13 and 2.14\nnote: dirty differs: False and True\n" in text
    for change in ({"machine": "other"}, {"threads": 1}, {"device": "cuda"}):
        with pytest.raises(ValueError, match="compare: expected results of one machine, device and number of threads"):
            compare.Comparison(results(*plain), results(*(replace(one, **change) for one in plain)))
    with pytest.raises(ValueError, match="rows with samples in common, got none"):
        compare.Comparison(results(*plain), results(*(replace(one, shape="N=7") for one in plain)))


def folder_of(path: Path, *found: Row, **environment: Any) -> Path:
    rows.write(path, found)
    (path / "environment.json").write_text(json.dumps({**ENVIRONMENT, **environment}))
    return path


def test_command_line(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", row(COPY, around(100)), row("imm", around(130)))
    b = folder_of(tmp_path / "b", row(COPY, around(100)), row("imm", around(190)))
    slower = "slower: double forward, N=1, float32, warm, imm: 130.0 us -> 190.0 us (1.46x)"
    assert slower in said("bench", "compare", a, b)
    assert invoke("bench", "compare", a, b, "--fail-if-slower", ok=False).exit_code == 1
    said("bench", "compare", b, a, "--fail-if-slower")
    missing = refused("bench", "compare", a, tmp_path)
    assert missing == f"Error: compare: expected a folder with rows.csv and environment.json, got {tmp_path}"
    for words in (["noise", "--fail-if-slower"], ["compare", a], ["noise", "mmd"]):
        assert invoke("bench", *words, ok=False).exit_code == 2


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a harness, an op and two commits; ``first`` lacks the op ``late``."""
    root = tmp_path / "checkout"
    (root / "python" / "imm" / "cli").mkdir(parents=True)
    (root / "bench").mkdir()
    git(root, "init", "--quiet")
    git(root, "commit", "--quiet", "--allow-empty", "-m", "empty")
    git(root, "tag", "empty")
    (root / "python" / "imm" / "cli" / "bench.py").write_text("")
    for name in ("first", "second"):
        (root / "bench" / "bench_noise.py").write_text(name)
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", name)
        git(root, "tag", name)
    monkeypatch.setattr(compare.against, "__defaults__", (root,))
    return root


def worktrees(root: Path) -> int:
    return len(git(root, "worktree", "list").splitlines())


def test_base_measures_both_in_turns_and_leaves_nothing(repository: Path, tmp_path: Path, monkeypatch) -> None:
    calls: list[tuple[str, list[str], str]] = []
    sides: list[Path] = []

    def measure(side: Path, op: str, options: list[str], out: Path, changes: dict[str, str]) -> compare.Results:
        text = (side / "bench" / f"bench_{op}.py").read_text()
        calls.append((text, options, out.name))
        sides.append(side)
        time = {"first": 100, "second": 150}[text]
        found = row(COPY, around(100)), row("imm", around(time))
        return compare.Results.read(folder_of(out, *found, commit=git(side, "rev-parse", "HEAD").strip()))

    monkeypatch.setattr(compare, "measure", measure)
    arguments = ["bench", "noise", "--quick", "--device=cpu", "--base", "first", "--out", tmp_path / "kept"]
    result = invoke(*arguments, "--fail-if-slower", ok=False)
    assert result.exit_code == 1
    for text in ("1 moved", "slower: double forward, N=1, float32, warm, imm: 100.0 us -> 150.0 us", "measured by its own"):
        assert text in result.output
    options = ["--device=cpu", "--quick"]
    order = (("first", "base-1"), ("second", "tree-1"), ("first", "base-2"), ("second", "tree-2"))
    assert calls == [(text, options, name) for text, name in order]
    assert sides[1] == repository
    assert not sides[0].exists()
    assert worktrees(repository) == 1
    assert refused(*arguments).startswith("Error: out: expected a folder without an earlier comparison, got ")


def test_base_refuses_in_one_line_and_cleans_up(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for revision, op, reason in (
        ("nowhere", "noise", "base: expected a commit of this checkout, got 'nowhere'"),
        ("--all", "noise", "base: expected a commit of this checkout, got '--all'"),
        ("empty", "noise", "base: expected a commit with python/imm/cli/bench.py, got 'empty', which has none"),
        ("first", "mmd", "base: expected a commit with bench/bench_mmd.py, got 'first', which has none"),
    ):
        result = invoke("bench", op, "--device=cpu", "--base", revision, ok=False)
        assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
        assert result.output.startswith(f"Error: {reason}")
    seen: list[Path] = []

    def measure(side: Path, *rest: Any) -> compare.Results:
        seen.append(side)
        assert worktrees(repository) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        compare.against("first", "noise", [], None, lambda text: None)
    assert not seen[0].exists()
    assert worktrees(repository) == 1


def test_merged_runs_count_the_spread_of_both() -> None:
    """A side whose two processes differ by 30 % does not agree less with itself than with another side."""
    fast, slow = ([row(COPY, around(100)), row("imm", around(t))] for t in (100, 130))
    both = compare.merged("both", results(*fast), results(*(replace(one) for one in slow)))
    assert compare.Comparison(results(*fast), results(*slow)).slower
    assert compare.Comparison(both, results(*slow)).moved == compare.Comparison(results(*fast), both).moved == {}
