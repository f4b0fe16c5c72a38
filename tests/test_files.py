"""Files that are written whole or not at all: their mode, what a kill leaves, and errors that name them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from imm import checkpoints
from imm.files import replacing


def test_the_mode_is_what_umask_leaves_or_the_old_files(tmp_path) -> None:
    target = tmp_path / "a.safetensors"
    for umask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            checkpoints.write_file(target, {"x": torch.ones(1)}, {"kind": "flow_map"})
        finally:
            os.umask(before)
        assert target.stat().st_mode & 0o777 == expected
        target.unlink()
    target.write_text("")
    target.chmod(0o640)
    checkpoints.write_file(target, {"x": torch.ones(1)}, {"kind": "flow_map"})
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_block_that_fails_leaves_the_old_file(tmp_path) -> None:
    target = tmp_path / "a"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as part:
            part.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "old"
    with replacing(target) as part:
        part.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_of_the_system_names_the_file(tmp_path) -> None:
    def full() -> None:
        with replacing(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def other() -> None:
        with replacing(tmp_path / "a"):
            (tmp_path / "absent").read_bytes()

    with pytest.raises(FileNotFoundError, match=f"'{tmp_path / 'absent'}'"):
        other()
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a'}'"):
        full()
    with pytest.raises(OSError, match=f"'{tmp_path / 'absent' / 'a'}'"), replacing(tmp_path / "absent" / "a"):
        pass
    with pytest.raises(checkpoints.CheckpointError, match=f"cannot write {tmp_path / 'absent' / 'a'}: No such file"):
        checkpoints.write_file(tmp_path / "absent" / "a", {}, {"kind": "flow_map"})


KILLED = """
import sys, torch
from pathlib import Path
from imm import checkpoints
while True:
    checkpoints.write_file(Path(sys.argv[1]), {"x": torch.ones(1 << 22)}, {"kind": "flow_map"})
    print("saved", flush=True)
"""


def test_a_killed_save_leaves_one_thing_at_most_and_the_next_removes_it(tmp_path) -> None:
    target = tmp_path / "a.safetensors"
    for delay in (0.0, 0.007, 0.019):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        names = {path.name for path in tmp_path.iterdir()}
        assert {"a.safetensors"} <= names <= {"a.safetensors", ".a.safetensors.part"}
        assert checkpoints.read_file(target, "flow_map")[0]["x"].sum() == 1 << 22
    checkpoints.write_file(target, {"x": torch.ones(1)}, {"kind": "flow_map"})
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_without_permission_says_so(tmp_path, monkeypatch) -> None:
    target = tmp_path / "a.safetensors"
    checkpoints.write_file(target, {"x": torch.ones(1)}, {"kind": "flow_map"})
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != target)  # root may read all
    with pytest.raises(checkpoints.CheckpointError, match="expected a file that can be read, got one without permission"):
        checkpoints.read_file(target, "flow_map")
