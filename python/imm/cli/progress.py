"""Progress bars, and a training run with one that stops cleanly on a signal."""

from __future__ import annotations

import signal
import sys
from typing import Any

from tqdm import tqdm

from imm.training import Trainer

#: Ctrl-C; what ends a job; what SLURM sends before it does (sbatch --signal=USR1@120); a terminal that was closed.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


class _Lines:
    """stderr of a file or a pipe, where a bar that is drawn again is a line of its own."""

    def write(self, text: str) -> None:
        shown = text.strip()
        if shown:
            sys.stderr.write(shown + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, unit: str, initial: int = 0, **more: Any) -> tqdm[Any]:
    """A bar on stderr: live in a terminal, a line every 15 seconds in a file or a pipe."""
    live = sys.stderr.isatty()
    where: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True} if live else {"mininterval": 15.0, "file": _Lines()}
    return tqdm(total=total, initial=initial, unit=unit, smoothing=0.05, **where, **more)


def run(trainer: Trainer, steps: int, max_seconds: float | None = None, *, quiet: bool = False) -> int | None:
    """Train to ``steps`` with a bar (loss, images/s, gradient norm, time left), or ``quiet``; the signal that ended the run, if
    one did.

    A signal lets the step end and the state be saved; a second Ctrl-C does not wait for that.
    """
    caught: list[int] = []

    def on_signal(number: int, frame: Any) -> None:
        caught.append(number)
        trainer.stop = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    # nohup has a process ignore this one.
    heeded = [n for n in STOPS if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]
    old = {number: signal.signal(number, on_signal) for number in heeded}
    steps_bar = bar(steps, "step", trainer.step, disable=quiet)

    def on_log(row: dict[str, Any]) -> None:
        loss, norm = (float("nan") if row.get(name) is None else row[name] for name in ("loss", "grad_norm"))
        steps_bar.set_postfix_str(f"loss {loss:.5f}, {row['images_per_second']:.0f} images/s, |grad| {norm:.3f}", refresh=False)

    try:
        with steps_bar:
            trainer.run(steps, max_seconds=max_seconds, on_step=lambda step: steps_bar.update(1), on_log=on_log)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    return caught[0] if caught else None
