"""Commands under torchrun, started, stopped and looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from command_line import call

from imm.training.stats import STATS_FILE

IMM = ["-m", "imm", "train"]
OPTIONS = ["--batch", "16", "--particles", "2", "--width", "8", "--tick", "1", "--snap", "100", "--device", "cpu"]


def write_data(path: Path) -> Path:
    """40 images of 3 classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(40) % 3)
    return path


def command(data, outdir, *options: str, processes: int, common: list[str] = OPTIONS) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launch, *IMM, "--data", str(data), "--out", str(outdir), *common, *options]


def workers(launcher: subprocess.Popen) -> list[int]:
    """The processes that torchrun started, each in a session of its own."""
    try:
        return [int(n) for n in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


@contextmanager
def started(line: list[str], **options) -> Iterator[subprocess.Popen]:
    """A command that is there no longer at the end, nor what it started, whatever happens."""
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options) as launcher:
        try:
            yield launcher
        finally:
            for number in (*workers(launcher), launcher.pid):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


def output_of(line: list[str], ok: bool = True, **options) -> str:
    with started(line, **options) as launcher:
        output, _ = launcher.communicate(timeout=240)
    assert (launcher.returncode == 0) is ok, output
    return output


def run(*arguments, ok: bool = True, **options) -> str:
    return output_of(command(*arguments, **options), ok)


def in_this(*arguments, ok: bool = True, **options) -> str:
    """The command of one process, in this one."""
    return call(*command(*arguments, processes=1, **options)[3:], ok=ok).output


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / STATS_FILE).read_text().splitlines()]


def assert_alike(one, many, rel: float = 1e-4) -> None:
    """The rows of two runs, to rounding."""
    ours, theirs = rows(one), rows(many)
    assert [row["step"] for row in theirs] == [row["step"] for row in ours] == list(range(1, len(ours) + 1))
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "gap", "at_s"):
            assert b[name] == pytest.approx(a[name], rel=rel), name
        of_bins = ([float("nan") if v is None else v for v in row["t_bin_loss"]] for row in (b, a))
        np.testing.assert_allclose(*of_bins, rtol=rel)
        assert b["nonfinite"] == 0
