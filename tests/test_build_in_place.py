"""bench/build_in_place.py: what is tried after what fails. The builds themselves are those of builds.py."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import build_in_place

    return build_in_place


@pytest.mark.parametrize(
    ("options", "works", "tried", "status"),
    [
        (["--cuda"], {("setup", True)}, [("setup", True)], 0),
        (["--cuda"], {("hand", True), ("setup", False)}, [("setup", True), ("hand", True)], 0),
        (["--cuda"], {("setup", False)}, [("setup", True), ("hand", True), ("setup", False)], 1),
        (["--cuda", "--by-hand"], {("hand", False)}, [("hand", True), ("hand", False)], 1),
        ([], {("hand", False)}, [("setup", False), ("hand", False)], 0),
        ([], set(), [("setup", False), ("hand", False)], 1),
    ],
)
def test_what_fails_is_followed_by_the_next_way(options, works, tried, status, script, monkeypatch, capsys) -> None:
    log: list[tuple[str, bool]] = []

    def with_setup(cuda: bool) -> bool:
        log.append(("setup", cuda))
        return log[-1] in works

    def by_hand(cuda: bool, out: Path) -> None:
        log.append(("hand", cuda))
        if log[-1] not in works:
            raise RuntimeError("c++: error")

    monkeypatch.setattr(script, "lacking", list)
    monkeypatch.setattr(script, "with_setup", with_setup)
    monkeypatch.setattr(script, "by_hand", by_hand)
    monkeypatch.setattr(sys, "argv", ["build_in_place.py", *options])
    assert script.main() == status
    assert log == tried
    assert ("everything runs without" in capsys.readouterr().out) is (not works)
