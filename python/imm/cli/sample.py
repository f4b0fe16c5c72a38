"""``imm sample``: images from a checkpoint, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from imm import checkpoints, latents, pictures
from imm.backends import PRECISIONS, repeatable
from imm.checkpoints.format import read_settings
from imm.cli.options import device_line, printable, process_device, writable_folder
from imm.cli.progress import bar
from imm.distributed import Processes, processes
from imm.files import sha256_of
from imm.flow_map import FlowMap
from imm.integrations.autoencoder import INSTALL, load_vae
from imm.networks import TokenModel
from imm.sampling import Sampler, TokenSampler, step_table, time_grid
from imm.sampling.classes import NONE, class_names_of, find_class, method_of
from imm.sampling.folder import ImageFolder, absent, generate, note
from imm.seeds import format_integers, parse_integers


def run(net: str, out: str, seeds: str, batch: int, device: str, **options: Any) -> None:
    """Run ``imm sample``; the arguments are its options."""
    seed_list = parse_integers(seeds, "seeds")
    if len(set(seed_list)) < len(seed_list):
        raise ValueError(f"seeds: expected every seed once, got {seeds!r}")
    with processes() as where:
        target = process_device(device, where)
        _run(Path(net), out, seed_list, min(batch, len(seed_list)), target, where, **options)


def _run(
    net: Path,
    out: str,
    seed_list: list[int],
    rows: int,
    device: torch.device,
    where: Processes,
    *,
    steps: int,
    labels: str | None,
    one_class: int | str | None,
    guidance: float | None,
    kind: str,
    mid_eta: list[float],
    method: str | None,
    precision: str,
    subdirs: bool,
    grid: tuple[int, int] | None,
    npz: str | None,
    vae: str | None,
) -> None:
    flow_map = checkpoints.load(net).to(device)
    times = time_grid(flow_map, steps, kind, mid_eta)  # refuses before a folder is made
    if labels is not None and one_class is not None:
        raise ValueError("class: expected either --class or --labels, got both")
    extra = read_settings(net, "flow_map").get("extra", {})
    class_names = class_names_of(extra)
    sequences = isinstance(flow_map.network, TokenModel)
    method = method_of(extra, method)
    all_labels = pick_labels(flow_map, labels, len(seed_list))
    if one_class is not None:
        one_class = find_class(one_class, flow_map.num_classes, class_names, net)
        all_labels = None if all_labels is None else torch.full_like(all_labels, one_class)
        labels = None if all_labels is None else NONE if one_class == flow_map.num_classes else str(one_class)
    if guidance is not None and flow_map.num_classes == 0:
        raise ValueError("guidance: expected a class-conditional checkpoint, got one without classes")
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")
    npz_path = None if npz is None else _new_file(npz, Path(out))
    shape = _shape(flow_map, precision, grid, vae)
    decode, autoencoder = (None, None) if vae is None else decoder(vae, shape, device)
    drawn = (not sequences and shape[0] in (1, 3)) or decode is not None
    if grid is not None and not drawn:
        raise ValueError(f"grid: expected pictures, got latents of {shape[0]} channels without --vae ({INSTALL})")
    sampling: dict[str, Any] = {"steps": steps, "kind": kind, "mid_eta": mid_eta, "method": method, "guidance": guidance}
    manifest = {
        "net": {"name": net.name, "sha256": sha256_of(net)},
        "checkpoint": extra,
        "seeds": format_integers(seed_list),
        "labels": labels if labels is not None or all_labels is None else "all in turn",
        "classes": flow_map.num_classes,
        **sampling,
        "nfe": len(step_table(flow_map, times, method)) * (1 if guidance is None else 2),
        "precision": precision,
        "rows": rows,
        "subdirs": subdirs,
        "vae": autoencoder,
        "quantisation": (pictures.QUANTISATION if decode is None else pictures.QUANTISATION_DECODED) if drawn else None,
        **note(device),
    }
    folder = ImageFolder(writable_folder(out), pictures=drawn, subdirs=subdirs, decoded=decode is not None)
    click.get_current_context().call_on_close(folder.close)
    folder.begin(manifest, seed_list, where)
    missing = absent(seed_list, rows, folder, where)
    make = token_sampler if sequences else partial(Sampler, dtype=PRECISIONS[precision])
    sampler = make(flow_map, **sampling, rows=rows)
    if where.first:
        many, kind = f", {where.world} processes" if where.world > 1 else "", "sequences" if sequences else "images"
        click.echo(f"{net} on {device_line(device)}{many}: {len(seed_list)} {kind} of {shape}, {steps} steps, {method}")
        if one_class is not None and one_class < len(class_names):  # "none" has no name
            click.echo(f"class: {one_class}, called {printable(class_names[one_class])}")
    name = f"process 0 of {where.world}" if where.world > 1 else None
    progress = bar(missing, "image", desc=name, disable=not where.first or not missing)
    with progress as made, repeatable(tf32=precision == "tf32"):
        generate(
            sampler, seed_list, all_labels, folder, where, decode=decode, origin=f"{net} in {precision}", on_images=made.update
        )
    made_by_all = where.total(missing)
    if where.first:
        _finish(folder, kind if sequences or drawn else "latents", seed_list, all_labels, grid, npz_path, made_by_all)


def sequence_shape(flow_map: FlowMap) -> tuple[int, int]:
    """(tokens, features) of the longest sequence of a flow map around a :class:`imm.networks.TokenModel`."""
    network: Any = flow_map.network
    return network.max_tokens, network.token_dim


def token_sampler(flow_map: FlowMap, **settings: Any) -> TokenSampler:
    """The sampler of a flow map around a :class:`imm.networks.TokenModel`."""
    network: Any = flow_map.network
    head = FlowMap(network.head, **flow_map.settings).eval()
    return TokenSampler(network.backbone, head, max_tokens=network.max_tokens, **settings)


def _shape(flow_map: FlowMap, precision: str, grid: tuple[int, int] | None, vae: str | None) -> tuple[int, ...]:
    """The shape of an image or sequence; refuses options that do not apply to it."""
    if not isinstance(flow_map.network, TokenModel):
        return flow_map.image_shape
    if precision not in ("fp32", "tf32"):
        raise ValueError(f"precision: expected fp32 or tf32 for sequences, got {precision}")
    for name, given in (("grid", grid), ("vae", vae)):
        if given is not None:
            raise ValueError(f"{name}: expected no such option for sequences, got {given}")
    return sequence_shape(flow_map)


def _finish(
    folder: ImageFolder,
    what: str,
    seeds: list[int],
    labels: Tensor | None,
    layout: tuple[int, int] | None,
    npz: Path | None,
    made: int,
) -> None:
    """The grid and the array, from the files, and the last line; ``made``: how many of the images this run made."""
    if npz is not None:
        folder.write_npz(npz, seeds, labels)
    if layout is not None:
        columns, lines = layout
        shown = torch.from_numpy(np.stack([folder.read(seed) for seed in seeds[: columns * lines]])).permute(0, 3, 1, 2)
        exact = (shown.float() - 127.5) / 127.5  # to_uint8 gives these pixels back
        pictures.save_picture(pictures.grid([("", part) for part in exact.split(columns)]), folder.root / "grid.png")
    also = [*(["grid.png"] if layout else []), *([str(npz)] if npz is not None else [])]
    there = f" ({len(seeds) - made} were there already)" if made < len(seeds) else ""
    click.echo(f"wrote {made} {what} to {folder.root}{there}{', and ' if also else ''}{' and '.join(also)}")
    if what == "latents":
        click.echo(f"the same command with --vae=PATH makes pictures of them; it needs the diffusers library: {INSTALL}")


def _new_file(path: str, out: Path) -> Path:
    """A file that can be written: its folder exists, or is the one that will be made."""
    target = Path(path)
    if target.suffix != ".npz" or not (target.parent.is_dir() or target.parent.resolve() == out.resolve()):
        raise ValueError(f"npz: expected a file name that ends in .npz, in a folder that exists, got {path}")
    return target


def decoder(name: str, shape: tuple[int, ...], device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """Latents to pictures, one image at a time, so that the others do not matter; and what names the autoencoder."""
    if shape[0] in (1, 3):
        raise ValueError(f"vae: expected a checkpoint of latents, got images of {shape[0]} channels")
    model = load_vae(name)
    record = {"name": name, "sha256": latents.fingerprint(model)}
    model = model.to(device)
    return lambda x: latents.decode(x, model, batch=1), record


def pick_labels(flow_map: FlowMap, text: str | None, count: int) -> Tensor | None:
    """The classes asked for, repeated to ``count``; all classes in order where none are. None for an unconditional network."""
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
