"""How waiting threads are told to wait: by the command line, before torch, unless the user has said so."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from imm import threads


@pytest.mark.parametrize(
    ("argv", "orig_argv", "is_command_line"),
    [
        (["/usr/bin/imm", "train"], ["python", "/usr/bin/imm", "train"], True),
        (["-m"], ["python", "-u", "-m", "imm", "train"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["train.py"], ["python", "train.py"], False),
        (["-c"], ["python", "-c", "import imm"], False),
        ([], ["python"], False),
    ],
)
def test_the_command_line_is_known(argv, orig_argv, is_command_line, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert threads.command_line() is is_command_line


def test_it_is_set_for_the_command_line_alone_and_not_over_the_users_own(monkeypatch) -> None:
    for given, expected in (({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        importlib.reload(threads)
        assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
        monkeypatch.setattr(sys, "argv", ["/usr/bin/imm"])
        importlib.reload(threads)
        assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_it_is_set_before_torch_is_loaded() -> None:
    watch = "import sys; sys.argv = ['imm']; import builtins, os; real, seen = builtins.__import__, []\n"
    watch += "def note(name, *rest, **more):\n"
    watch += "    if name == 'torch' and not seen: seen.append(os.environ.get('GOMP_SPINCOUNT'))\n"
    watch += "    return real(name, *rest, **more)\n"
    watch += "builtins.__import__ = note\nimport imm\nimm.FlowMap\nprint(seen)"
    own = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", watch], env=own, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['1000']"
