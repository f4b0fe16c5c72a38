"""``imm bench``: time an op beside its peers; needs a checkout."""

from __future__ import annotations

import click

from imm.cli.options import device_line, pick_device, writable_folder


@click.command()
@click.argument("op", default="all")
@click.option("--device", "device_name", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--out", metavar="DIR", help="Append rows.csv and rows.jsonl there; write environment.json and report.html.")
@click.option("--quick", is_flag=True, help="The first shape of each op, a few seconds each.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; by default torch's own number.")
def command(op: str, device_name: str, out: str | None, quick: bool, threads: int | None) -> None:
    """Time OP (mmd, flow_step, noise or all) beside its peers: interleaved, checked, against a copy of the same bytes."""
    import torch

    from imm.benchmark import load, operations, report, run

    if op != "all":
        load(op)
    operations()
    device = pick_device(device_name)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = None if out is None else writable_folder(out)
    click.echo(f"{device_line(device)}; medians of interleaved rounds")
    run(op, device, folder, quick=quick, say=click.echo)
    if folder is not None:
        click.echo(f"rows: {folder / 'rows.csv'}")
        click.echo(f"report: {report.make(folder, click.echo)}")
