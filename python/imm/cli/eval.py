"""``imm eval``: metrics of images with their protocol; statistics of a reference; two results side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import click
from tqdm import tqdm

from imm.cli.options import device_line, process_device, say_left_out, say_notes, writable_file
from imm.cli.progress import bar
from imm.distributed import Processes, processes
from imm.evaluation import compare as comparison
from imm.evaluation import networks
from imm.evaluation.evaluate import (
    METRICS,
    ReferenceStatistics,
    evaluate,
    extract,
    load_networks,
    parse_metrics,
    reference_protocol,
)
from imm.evaluation.networks import INCEPTION
from imm.evaluation.sets import load_set
from imm.evaluation.statistics import is_statistics, save_statistics
from imm.files import write_text

#: Images of a published FID; what fewer do to a Frechet distance is seen.
FULL = 50_000


@contextmanager
def _bars(total: int, where: Processes) -> Iterator[Callable[[str, int], None]]:
    """Progress of the first process over its share of ``total`` pictures, for one network after the other."""
    shown: dict[str, tqdm[Any]] = {}

    def tell(name: str, done: int) -> None:
        if name not in shown:
            shown[name] = bar(total // where.world, "image", desc=name, disable=not where.first)
        shown[name].update(done)

    try:
        yield tell
    finally:
        for one in shown.values():
            one.close()


def table(values: dict[str, float]) -> list[str]:
    """Metrics as aligned lines, with what they are."""
    lines = []
    for name, value in values.items():
        if name.endswith(".std"):
            continue
        std = values.get(f"{name}.std")
        shown = f"{value:.6g}" + ("" if std is None else f" +- {std:.2g}")
        lines.append((name, shown, METRICS[name].what if name in METRICS else ""))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return [f"{name:<{widths[0]}}  {shown:>{widths[1]}}  {what}".rstrip() for name, shown, what in lines]


def run(
    data: str,
    ref: str,
    metrics: str,
    out: str,
    weights: str | None,
    resolution: int | None,
    split: str | None,
    batch: int,
    device: str,
    **pictures_as: Any,
) -> None:
    """Run ``imm eval``; the arguments are its options."""
    names = parse_metrics(metrics)
    check_weights(weights, [METRICS[name].features for name in names])
    target = writable_file(out)
    with processes() as where:
        own = process_device(device, where)
        used = load_networks(names, weights, own)
        pictures = load_set(data, resolution, **pictures_as)
        reference = ReferenceStatistics.load(ref) if is_statistics(ref) else load_set(ref, resolution, split, **pictures_as)
        if isinstance(reference, ReferenceStatistics) and split is not None:
            raise ValueError("split: expected none beside reference statistics, which have their own")
        if where.first:
            click.echo(f"{pictures.source} against {_words(reference)}, on {device_line(own)}")
            read = [pictures, *([] if isinstance(reference, ReferenceStatistics) else [reference])]
            say_notes(line for one in read for line in one.notes)
            say_left_out([line for one in read for line in one.left_out], target)
        total = len(pictures) + (0 if isinstance(reference, ReferenceStatistics) else len(reference))
        with _bars(total, where) as tell:
            result = evaluate(names, pictures, reference, used, device=own, batch=batch, split=split, progress=tell)
        if result is None:
            return
    write_text(target, json.dumps(result, indent=2, allow_nan=False) + "\n")
    click.echo("\n".join(table(result["metrics"])))
    for line in cautions(result):
        click.echo(f"note: {line}")
    click.echo(f"wrote {target}")


def check_weights(weights: str | None, features: Sequence[str | None]) -> None:
    """Refuse weights that nothing asked for would use."""
    if weights is not None and INCEPTION not in features:
        raise ValueError(f"weights: expected none, nothing asked for is of {INCEPTION} features, got {weights}")


def _words(reference: Any) -> str:
    if isinstance(reference, ReferenceStatistics):
        return f"statistics of {reference.protocol['reference']['source']}"
    return str(reference.source)


def cautions(result: dict[str, Any]) -> list[str]:
    """What a reader of the numbers should know."""
    protocol = result["protocol"]
    images, reference = (protocol[of]["count"] for of in ("images", "reference"))
    out = []
    frechet = [name for name in protocol["settings"] if METRICS[name].kind == "fd"]
    given = [name for name in frechet if "reference" in protocol["settings"][name]]
    for names, fewest in ((given, images), ([n for n in frechet if n not in given], min(images, reference or images))):
        if names and fewest < FULL:
            out.append(f"{', '.join(names)}: biased upwards by {fewest} images; compare with the same number only")
    if given:
        out.append(f"{', '.join(given)}: to mu and sigma of the reference's file" + (", not its images" if reference else ""))
    if "fid" in frechet and images != FULL:
        out.append(f"fid: of {images} images; published figures are of {FULL}")
    if protocol["images"]["digest"] == protocol["reference"]["digest"]:
        out.append("the images are the reference")
    return out


def stats(
    data: str,
    out: str,
    features: str,
    weights: str | None,
    resolution: int | None,
    split: str | None,
    batch: int,
    device: str,
    **pictures_as: Any,
) -> None:
    """Run ``imm eval stats``; the arguments are its options."""
    names = list(dict.fromkeys(features.split(",")))
    target = writable_file(out)
    if target.suffix != ".npz":
        raise ValueError(f"out: expected a file ending in .npz, got {out}")
    with processes() as where:
        own = process_device(device, where)
        used = [networks.load(name, weights, own) for name in names]
        check_weights(weights, names)
        pictures = load_set(data, resolution, split, **pictures_as)
        if pictures.moments is not None and INCEPTION in names:
            raise ValueError(f"features: expected none of {INCEPTION}, {data} has its own, mu and sigma; give it to --ref")
        if len(pictures) < 2:
            raise ValueError(f"data: expected at least 2 images, got {len(pictures)}")
        if where.first:
            click.echo(f"{pictures.source}, on {device_line(own)}")
            say_notes(pictures.notes)
            say_left_out(pictures.left_out, target)
        with _bars(len(pictures), where) as tell:
            found = {
                network.name: extract(network, pictures, own, batch, False, partial(tell, network.name)).statistics
                for network in used
            }
        if not where.first:
            return
    save_statistics(target, found, reference_protocol(pictures, split, used))
    click.echo(f"wrote {target}: {', '.join(found)} of {len(pictures)} images")


def compare(first: str, second: str) -> None:
    """Run ``imm eval compare``; the arguments are its two files."""
    a, b = comparison.read_result(first), comparison.read_result(second)
    wrong = comparison.differences(a, b)
    if wrong:
        raise click.ClickException("these numbers cannot be compared; the protocols differ in\n  " + "\n  ".join(wrong))
    click.echo("\n".join(comparison.side_by_side(a, b, (first, second))))
    differing = comparison.remarks(a, b)
    if differing:
        click.echo("\n".join(["differing, as they may:", *(f"  {line}" for line in differing)]))
