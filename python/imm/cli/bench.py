"""``imm bench``: time an op beside its peers or compare two such runs; needs a checkout."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from imm.cli.options import PATH, device_line, pick_device, writable_folder

_OF_BASE = ("out", "base", "fail_if_slower")


class _Bench(click.Command):
    """OP with its options; ``compare`` in its place is a command of its own."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        if args[:1] == ["compare"]:
            return compare.make_context(f"{info_name} compare", args[1:], *rest, **extra)
        return super().make_context(info_name, args, *rest, **extra)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from imm.benchmark import operations

        with contextlib.suppress(FileNotFoundError):  # without a checkout there are none
            found = ", ".join([*operations(), "or all"])
            with formatter.section("OP"):
                formatter.write_text(found)
        with formatter.section("Commands"):
            formatter.write_dl([("compare A B", compare.get_short_help_str(90))])


@click.command(cls=_Bench)
@click.argument("op", default="all")
@click.option("--device", "device_name", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--out", type=PATH, metavar="DIR", help="Add to rows.csv there; write environment.json, figures and report.html.")
@click.option("--quick/--full", help="The first shape of each op, for a few seconds; or every shape, which is the default.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default torch's own number.")
@click.option("--base", metavar="REV", help="Measure this commit and the working tree, twice each in turns, and compare.")
@click.option("--fail-if-slower", is_flag=True, help="With --base: exit with 1 where a peer of ours is slower.")
@click.option(
    "--predict", metavar="NAME", help="Time nothing: print floors on a machine (h100, h200, ..., or a results folder)."
)
@click.pass_context
def command(
    context: click.Context,
    op: str,
    device_name: str,
    out: str | None,
    quick: bool,
    threads: int | None,
    base: str | None,
    fail_if_slower: bool,
    predict: str | None,
) -> None:
    """Time OP beside its peers: interleaved, checked, against a copy of the same bytes."""
    import torch

    if predict is not None:
        from imm.benchmark.predict import report as floors

        if (device_name, out, threads, base, fail_if_slower) != ("auto", None, None, None, False):
            raise ValueError("predict: expected OP and --quick or --full alone, since nothing is timed")
        floors(op, predict, quick=quick, say=click.echo)
        return

    from imm.benchmark import load, operations, report, run
    from imm.benchmark.rows import TESTS

    if op != "all":
        load(op)
    operations()
    device = pick_device(device_name)
    if base is not None:
        from imm.benchmark.revisions import against

        folder = None if out is None else writable_folder(out)
        _show(context, against(base, op, _given(context), folder, say=click.echo), fail_if_slower)
        return
    if fail_if_slower:
        raise click.UsageError("--fail-if-slower belongs to --base, or to imm bench compare")
    if threads is not None:
        torch.set_num_threads(threads)
    folder = None if out is None else writable_folder(out)
    click.echo(f"{device_line(device)}; medians of interleaved rounds")
    rows = run(op, device, folder, quick=quick, say=click.echo)
    refused = [row.op for row in rows if row.mode == TESTS]
    if folder is not None and len(rows) > len(refused):
        click.echo(f"rows: {folder / 'rows.csv'}")
        click.echo(f"report: {report.make(folder, click.echo)}")
    if refused:
        raise ValueError(f"{', '.join(refused)}: not timed, since tests fail")


def _given(context: click.Context) -> list[str]:
    """The options of the command line that both runs of a comparison take."""
    given = []
    for option in context.command.params:
        name = option.name or ""
        source = context.get_parameter_source(name)
        if isinstance(option, click.Option) and name not in _OF_BASE and source is click.core.ParameterSource.COMMANDLINE:
            value = context.params[name]
            names = option.opts if value else option.secondary_opts
            given.append(names[0] if option.is_flag else f"{option.opts[0]}={value}")
    return given


def _show(context: click.Context, comparison: Any, fail_if_slower: bool) -> None:
    click.echo(str(comparison))
    if fail_if_slower and comparison.slower:
        context.exit(1)


@click.command()
@click.argument("first", type=PATH, metavar="A")
@click.argument("second", type=PATH, metavar="B")
@click.option("--fail-if-slower", is_flag=True, help="Exit with 1 where a peer of ours is slower.")
@click.pass_context
def compare(context: click.Context, first: str, second: str, fail_if_slower: bool) -> None:
    """What moved from folder A to folder B (of --out) beyond the spread of both."""
    from imm.benchmark import compare as comparison

    found = comparison.compare(*(comparison.Results.read(Path(folder)) for folder in (first, second)))
    _show(context, found, fail_if_slower)
