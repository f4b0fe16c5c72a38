"""What the command line sets before torch loads, unless the user has set it: how threads wait, what malloc keeps."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys

import pytest

from imm import startup


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
    assert startup.command_line() is is_command_line


def test_it_is_set_for_the_command_line_alone_and_not_over_the_users_own(monkeypatch) -> None:
    for given, expected in (({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        importlib.reload(startup)
        assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
        monkeypatch.setattr(sys, "argv", ["/usr/bin/imm"])
        importlib.reload(startup)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_freed_memory_is_kept_unless_the_user_sets_malloc() -> None:
    program = "import sys; sys.argv = ['imm']; import imm, resource, torch\n"
    program += "for _ in range(40):\n    torch.ones(2**21)\n"  # 8 MiB, 2048 pages
    program += "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    own = {name: value for name, value in os.environ.items() if name not in {*startup.MALLOC, "GLIBC_TUNABLES"}}

    def faults(**more: str) -> int:
        done = subprocess.run([sys.executable, "-c", program], env=own | more, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults() + 30 * 2048 < faults(MALLOC_MMAP_THRESHOLD_=str(2**20))
