"""``imm sample``: images from a checkpoint, on any number of processes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from imm import checkpoints, generation, latents
from imm.checkpoints.format import read_settings
from imm.cli.options import (
    PATH,
    Number,
    device_line,
    device_option,
    parse_floats,
    parse_grid,
    printable,
    process_device,
    writable_folder,
)
from imm.cli.progress import bar
from imm.distributed import Processes, processes
from imm.evaluation.pictures import QUANTISATION, QUANTISATION_DECODED, grid, save_picture
from imm.files import sha256_of
from imm.flow_map import FlowMap
from imm.generation import ImageFolder
from imm.sampler import Sampler
from imm.sampling import KINDS, METHODS, time_grid
from imm.seeds import format_integers, parse_integers

#: ``--class`` without a class: unconditional images.
NONE = "none"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Class(click.ParamType):
    """A class's number, its name, or "none"."""

    name = "class"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return click.IntRange(min=0).convert(value, param, ctx) if re.fullmatch(r"[+-]?\d+", str(value)) else str(value)


@click.command()
@click.option("--net", required=True, type=PATH, metavar="FILE", help="Checkpoint (.safetensors).")
@click.option(
    "--outdir", required=True, type=PATH, metavar="DIR", help="Where to write the images; a run that was stopped goes on there."
)
@click.option("--seeds", default="0-63", show_default=True, metavar="LIST", help="Image seeds, such as 0-49999 or 0-63,70.")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(min=1), help="Sampling steps.")
@click.option("--labels", metavar="LIST", help="Classes, repeated over the seeds. [default: all classes in turn]")
@click.option(
    "--class",
    "one_class",
    type=_Class(),
    metavar="NAME|N|none",
    help="One class for all images, by name or number; none: unconditional.",
)
@click.option("--cfg", type=Number(), metavar="W", help="Guidance scale. [default: no guidance]")
@click.option("--kind", default="uniform", show_default=True, type=click.Choice(KINDS), help="Time grid.")
@click.option("--mid-eta", default="", metavar="LIST", help="Noise levels in between, for --kind=eta, such as 1.4.")
@click.option("--method", default="pushforward", show_default=True, type=click.Choice(METHODS))
@click.option("--batch", default=64, show_default=True, type=click.IntRange(min=1), help="Images at a time.")
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(list(PRECISIONS)), help="Of the network.")
@click.option("--subdirs", is_flag=True, help="A sub-folder for every thousand seeds.")
@click.option("--grid", "grid_size", metavar="WxH", help="Also write grid.png of the first W x H images, such as 8x8.")
@click.option("--npz", type=PATH, metavar="FILE", help="Also write all images to one file, in the ADM evaluator's layout.")
@click.option(
    "--vae",
    type=PATH,
    metavar="PATH|ID",
    help="Decode latents with this AutoencoderKL, those of an earlier run in --outdir too (needs diffusers).",
)
@device_option
def command(net: str, outdir: str, seeds: str, batch: int, device: str, **options: Any) -> None:
    """Generate images from a checkpoint.

    An image depends on its own seed and label only. The files are the same whatever the number of processes ("torchrun
    --nproc-per-node=8 -m imm sample ...") and however often the run was stopped and started again.
    """
    seed_list = parse_integers(seeds, "seeds")
    if len(set(seed_list)) < len(seed_list):
        raise ValueError(f"seeds: expected every seed once, got {seeds!r}")
    with processes() as where:
        target = process_device(device, where)
        _run(Path(net), outdir, seed_list, min(batch, len(seed_list)), target, where, **options)


def _run(
    net: Path,
    outdir: str,
    seed_list: list[int],
    rows: int,
    device: torch.device,
    where: Processes,
    *,
    steps: int,
    labels: str | None,
    one_class: int | str | None,
    cfg: float | None,
    kind: str,
    mid_eta: str,
    method: str,
    precision: str,
    subdirs: bool,
    grid_size: str | None,
    npz: str | None,
    vae: str | None,
) -> None:
    layout = parse_grid(grid_size) if grid_size else None
    flow_map = checkpoints.load(net).to(device)
    between = parse_floats(mid_eta, "mid-eta")
    time_grid(flow_map, steps, kind, between)  # refuses before a folder is made
    if labels is not None and one_class is not None:
        raise ValueError("class: expected either --class or --labels, got both")
    extra = read_settings(net, "flow_map").get("extra", {})
    class_names = _class_names(extra)
    all_labels = pick_labels(flow_map, labels, len(seed_list))
    if one_class is not None:
        one_class = find_class(one_class, flow_map.num_classes, class_names, net)
        all_labels = None if all_labels is None else torch.full_like(all_labels, one_class)
        labels = None if all_labels is None else NONE if one_class == flow_map.num_classes else str(one_class)
    if cfg is not None and flow_map.num_classes == 0:
        raise ValueError("cfg: expected a class-conditional checkpoint, got one without classes")
    if cfg is not None and not math.isfinite(cfg):
        raise ValueError(f"cfg: expected a finite number, got {cfg}")
    npz_path = None if npz is None else _new_file(npz, Path(outdir))
    shape = flow_map.image_shape
    decode, autoencoder = (None, None) if vae is None else _decoder(vae, shape, device)
    pictures = shape[0] in (1, 3) or decode is not None
    if layout is not None and not pictures:
        raise ValueError(f"grid: expected pictures, got latents of {shape[0]} channels without --vae ({latents.INSTALL})")
    manifest = {
        "net": {"name": net.name, "sha256": sha256_of(net)},
        "checkpoint": extra,
        "seeds": format_integers(seed_list),
        "labels": labels if labels is not None or all_labels is None else "all in turn",
        "classes": flow_map.num_classes,
        "steps": steps,
        "kind": kind,
        "mid_eta": between,
        "method": method,
        "cfg": cfg,
        "nfe": steps * (1 if cfg is None else 2),
        "precision": precision,
        "rows": rows,
        "subdirs": subdirs,
        "vae": autoencoder,
        "quantisation": (QUANTISATION if decode is None else QUANTISATION_DECODED) if pictures else None,
        **generation.note(device),
    }
    folder = ImageFolder(writable_folder(outdir), pictures=pictures, subdirs=subdirs, decoded=decode is not None)
    click.get_current_context().call_on_close(folder.close)
    folder.begin(manifest, seed_list, where)
    missing = generation.absent(seed_list, rows, folder, where)
    sampler = Sampler(
        flow_map, steps=steps, kind=kind, mid_eta=between, method=method, guidance=cfg, rows=rows, dtype=PRECISIONS[precision]
    )
    if where.first:
        many = f", {where.world} processes" if where.world > 1 else ""
        click.echo(f"{net} on {device_line(device)}{many}: {len(seed_list)} images of {shape}, {steps} steps, {method}")
        if one_class is not None and one_class < len(class_names):  # "none" has no name
            click.echo(f"class: {one_class}, called {printable(class_names[one_class])}")
    name = f"process 0 of {where.world}" if where.world > 1 else None
    with bar(missing, "image", desc=name, disable=not where.first or not missing) as made:
        generation.generate(
            sampler, seed_list, all_labels, folder, where, decode=decode, origin=f"{net} in {precision}", on_images=made.update
        )
    made_by_all = where.total(missing)
    if where.first:
        _finish(folder, seed_list, all_labels, layout, npz_path, made_by_all)


def _finish(
    folder: ImageFolder, seeds: list[int], labels: Tensor | None, layout: tuple[int, int] | None, npz: Path | None, made: int
) -> None:
    """The grid and the array, from the files, and the last line; ``made``: how many of the images this run made."""
    if npz is not None:
        folder.write_npz(npz, seeds, labels)
    if layout is not None:
        columns, lines = layout
        shown = torch.from_numpy(np.stack([folder.read(seed) for seed in seeds[: columns * lines]])).permute(0, 3, 1, 2)
        exact = (shown.float() - 127.5) / 127.5  # to_uint8 gives these pixels back
        save_picture(grid([("", part) for part in exact.split(columns)]), folder.root / "grid.png")
    what = "images" if folder.pictures else "latents"
    also = [*(["grid.png"] if layout else []), *([str(npz)] if npz is not None else [])]
    there = f" ({len(seeds) - made} were there already)" if made < len(seeds) else ""
    click.echo(f"wrote {made} {what} to {folder.root}{there}{', and ' if also else ''}{' and '.join(also)}")
    if not folder.pictures:
        click.echo(
            f"the same command with --vae=PATH makes pictures of them; it needs the diffusers library: {latents.INSTALL}"
        )


def _new_file(path: str, outdir: Path) -> Path:
    """A file that can be written: its folder exists, or is the one that will be made."""
    target = Path(path)
    if target.suffix != ".npz" or not (target.parent.is_dir() or target.parent.resolve() == outdir.resolve()):
        raise ValueError(f"npz: expected a file name that ends in .npz, in a folder that exists, got {path}")
    return target


def _decoder(name: str, shape: tuple[int, ...], device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """Latents to pictures, one image at a time, so that the others do not matter; and what names the autoencoder."""
    if shape[0] in (1, 3):
        raise ValueError(f"vae: expected a checkpoint of latents, got images of {shape[0]} channels")
    model = latents.load_vae(name)
    record = {"name": name, "sha256": latents.fingerprint(model)}
    model = model.to(device)
    return lambda x: latents.decode(x, model, batch=1), record


def _class_names(extra: Any) -> list[str]:
    """The names that a checkpoint keeps; none for one without."""
    data = extra.get("data") if isinstance(extra, dict) else None
    names = data.get("class_names") if isinstance(data, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def find_class(name: int | str, classes: int, class_names: list[str], net: Path) -> int:
    """The label for ``--class``: a class's number, the number of the class of that name, or ``classes`` for "none".

    Raises ValueError for others; for an unknown name with the names that are alike.
    """
    if name == NONE:
        return classes
    if classes == 0:
        raise ValueError("class: expected a class-conditional checkpoint, got one without classes")
    if isinstance(name, int):
        if name >= classes:
            raise ValueError(f"class: expected 0..{classes - 1}, a class's name or {NONE}, got {name}")
        return name
    found = [number for number, known in enumerate(class_names) if known == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"class: expected a name that one class has, got {name!r}, the name of {found}; a number tells")
    if not class_names:
        raise ValueError(f"class: expected a number, for {net} keeps no class names, got {name!r}")
    lowered = {known.lower(): known for known in class_names}
    close = [lowered[one] for one in difflib.get_close_matches(name.lower(), lowered, n=5)] or class_names[:5]
    more = ", ..." if len(class_names) > len(close) else ""
    raise ValueError(f"class: expected a number or a name of {net}, such as {', '.join(close)}{more}, got {name!r}")


def pick_labels(flow_map: FlowMap, text: str | None, count: int) -> Tensor | None:
    """The classes asked for, repeated to ``count``; all classes in turn where none are. None for an unconditional network."""
    if flow_map.num_classes == 0:
        if text is not None:
            raise ValueError("labels: expected a class-conditional checkpoint, got one without classes")
        return None
    chosen = parse_integers(text, "labels") if text is not None else list(range(flow_map.num_classes))
    if max(chosen) > flow_map.num_classes:
        raise ValueError(
            f"labels: expected classes 0..{flow_map.num_classes - 1} or {flow_map.num_classes} for none, got {max(chosen)}"
        )
    return torch.tensor(chosen)[torch.arange(count) % len(chosen)]
