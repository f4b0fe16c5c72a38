"""``imm bench``: time an op beside its baselines, or compare two such runs. The harness is ``bench/`` of a checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from imm.cli.options import PATH, device_line, pick_device, writable_folder

BENCH = Path(__file__).resolve().parents[3] / "bench"


@click.command("bench")
@click.argument("words", nargs=-1, type=PATH, metavar="[OP | compare A B]")
@click.option("--device", "device_name", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--out", type=PATH, metavar="DIR", help="Add to rows.csv there; write environment.json, figures and report.html.")
@click.option("--quick/--full", help="The first shape of each op, for a few seconds; or every shape, which is the default.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default torch's own number.")
@click.option("--base", metavar="REV", help="Measure this commit and the working tree, twice each, and compare.")
@click.option("--fail-if-slower", is_flag=True, help="With --base or compare: exit with 1 where ours is slower.")
@click.option("--predict", metavar="NAME", help="Time nothing: print rooflines of a machine that may be absent (h100, ...).")
@click.pass_context
def command(
    context: click.Context,
    words: tuple[str, ...],
    device_name: str,
    out: str | None,
    quick: bool,
    threads: int | None,
    base: str | None,
    fail_if_slower: bool,
    predict: str | None,
) -> None:
    """Time OP (a file bench/bench_OP.py, or all) beside its baselines: interleaved, checked, against a copy of the same bytes.

    Or compare A B: what moved from folder A to folder B (of --out) beyond the spread of both.
    """
    if not (BENCH / "harness").is_dir():
        raise FileNotFoundError("bench: needs a checkout of the project, installed with pip install --editable")
    if str(BENCH) not in sys.path:
        sys.path.insert(0, str(BENCH))
    op, *folders = words or ("all",)
    if len(folders) != 2 * (op == "compare"):
        raise click.UsageError(f"expected OP, or compare and two folders, got {' '.join(words)}")
    if op == "compare":
        from harness.compare import Comparison, Results

        comparison = Comparison(*(Results.read(Path(folder)) for folder in folders))
    elif predict is not None:
        from harness.predict import report as floors

        if (device_name, out, threads, base, fail_if_slower) != ("auto", None, None, None, False):
            raise ValueError("predict: expected OP and --quick or --full alone, since nothing is timed")
        return floors(op, predict, quick=quick, say=click.echo)
    elif base is not None:
        from harness.case import chosen
        from harness.compare import against

        chosen(op)
        given = [f"--device={device_name}", *["--quick"] * quick, *([f"--threads={threads}"] if threads else [])]
        comparison = against(base, op, given, writable_folder(out) if out else None, say=click.echo)
    elif fail_if_slower:
        raise click.UsageError("--fail-if-slower belongs to --base, or to imm bench compare")
    else:
        return _measure(op, device_name, out, quick, threads)
    click.echo(str(comparison))
    if fail_if_slower and comparison.slower:
        context.exit(1)


def _measure(op: str, device_name: str, out: str | None, quick: bool, threads: int | None) -> None:
    import torch

    from harness import report
    from harness.case import chosen
    from harness.measure import run
    from harness.rows import TESTS

    chosen(op)
    device, folder = pick_device(device_name), writable_folder(out) if out else None
    if threads is not None:
        torch.set_num_threads(threads)
    click.echo(f"{device_line(device)}; medians of interleaved rounds")
    rows = run(op, device, folder, quick=quick, say=click.echo)
    refused = [row.op for row in rows if row.mode == TESTS]
    if folder is not None and len(rows) > len(refused):
        click.echo(f"rows: {folder / 'rows.csv'}")
        click.echo(f"report: {report.make(folder, click.echo)}")
    if refused:
        raise ValueError(f"{', '.join(refused)}: not timed, since tests fail")
