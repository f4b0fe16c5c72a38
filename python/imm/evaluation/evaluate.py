"""Metrics of a set of pictures, each written down with the protocol it was measured by."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imm.backends import repeatable
from imm.evaluation import metrics, networks
from imm.evaluation.networks import EFFICIENTNET, INCEPTION, FeatureNetwork
from imm.evaluation.pixels import PixelReference
from imm.evaluation.sets import PictureSet
from imm.evaluation.statistics import FeatureStatistics, is_statistics, load_statistics, read_moments
from imm.seeds import format_integers
from imm.version import __version__

FORMAT_VERSION = 1
#: Most images a side that the MMD by Laplace kernel takes.
MMD_COUNT = 2000


@dataclass(frozen=True)
class Metric:
    """A metric, by its name.

    Attributes:
        kind: "fd", "kid", "prdc", "is", "mmd" or "label-match". features: the network, or None for pixels. what: in words.
    """

    kind: str
    features: str | None
    what: str


METRICS = {
    "fid": Metric("fd", INCEPTION, "Frechet inception distance"),
    "kid": Metric("kid", INCEPTION, "kernel inception distance"),
    "prdc": Metric("prdc", INCEPTION, "precision, recall, density, coverage on Inception features"),
    "is": Metric("is", INCEPTION, "inception score"),
    "fd-efficientnet-lite0": Metric("fd", EFFICIENTNET, "Frechet distance on EfficientNet-Lite0 features, not FID"),
    "kid-efficientnet-lite0": Metric("kid", EFFICIENTNET, "KID's kernel distance on EfficientNet-Lite0 features, not KID"),
    "prdc-efficientnet-lite0": Metric("prdc", EFFICIENTNET, "precision to coverage on EfficientNet-Lite0 features"),
    "mmd-efficientnet-lite0": Metric("mmd", EFFICIENTNET, "squared MMD, Laplace kernel, on EfficientNet-Lite0 features"),
    "mmd-pixels": Metric("mmd", None, "squared MMD, Laplace kernel, on pixels"),
    "label-match": Metric(
        "label-match", None, "share whose nearest real image, by pixels, has the asked label; spread in a class"
    ),
}


@dataclass(frozen=True)
class ReferenceStatistics:
    """The reference as mean and covariance of features, with their protocol; enough for Frechet distances.

    ``moments``: where these are ``mu`` and ``sigma`` of somebody else's file, of which no more is known.
    """

    statistics: dict[str, FeatureStatistics]
    protocol: dict[str, Any]
    moments: FeatureStatistics | None = None

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """From the file that ``imm eval stats`` wrote, or from one of ``mu`` and ``sigma``, which are taken to be of Inception
        features. Raises ValueError for another."""
        moments = read_moments(path) if is_statistics(path) else None
        if moments is not None:
            about = {"source": f"mu and sigma in {path}", **dict.fromkeys(("count", "shape", "resize", "split"))}
            return cls({INCEPTION: moments}, {"reference": {**about, "digest": moments.digest()}, "features": {}}, moments)
        statistics, protocol = load_statistics(path)
        missing = {"reference", "features"} - protocol.keys()
        if missing:
            raise ValueError(f"{path}: expected statistics with their protocol, got none of {', '.join(sorted(missing))}")
        return cls(statistics, protocol)


@dataclass(frozen=True)
class Features:
    """What a network makes of a set: statistics of all, and, where asked for, features ``[N, D]`` and logits in their order."""

    statistics: FeatureStatistics
    features: Tensor | None
    logits: Tensor | None


def split_of(n: int, rank: int, world: int) -> range:
    """The images of a rank: contiguous, as even as can be."""
    return range(n * rank // world, n * (rank + 1) // world)


def extract(
    network: FeatureNetwork,
    pictures: PictureSet,
    device: torch.device | str = "cpu",
    batch: int = 64,
    keep: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Features:
    """Run a network over a set; every process takes its share, and all end up with the whole. Collective
    over gloo.

    Args:
        network: on ``device``. pictures: the same in every process. batch: at a time.
        keep: features and logits too, not the statistics alone. progress: called with the number of pictures that were done.
    """
    together = dist.is_initialized() and dist.get_world_size() > 1
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    mine = split_of(len(pictures), rank, world)
    statistics = FeatureStatistics(network.dimensions)
    features, logits = torch.empty(len(mine), network.dimensions), torch.empty(len(mine), network.logits)
    with repeatable(tf32=False):  # published numbers are float32 throughout; TF32 would be cuDNN's default
        for start in range(0, len(mine), batch):
            rows = range(start, min(start + batch, len(mine)))
            got, scores = network(pictures.pixels[mine.start + rows.start : mine.start + rows.stop].contiguous().to(device))
            statistics.update(got)
            if keep:
                features[rows.start : rows.stop] = got.cpu()
                if scores is not None:
                    logits[rows.start : rows.stop] = scores.cpu()
            if progress is not None:
                progress(len(rows))
    if together:
        statistics.all_reduce()
        if keep:
            features, logits = (gathered(part, len(pictures)) for part in (features, logits))
    return Features(statistics, features if keep else None, logits if keep and network.logits else None)


def gathered(part: Tensor, count: int) -> Tensor:
    """The parts ``[split_of(count), ...]`` of all ranks one after the other, on the CPU. Collective over gloo."""
    parts = []
    for rank in range(dist.get_world_size()):
        share = split_of(count, rank, dist.get_world_size())
        block = part if rank == dist.get_rank() else part.new_empty(len(share), *part.shape[1:])
        dist.broadcast(block, src=rank)
        parts.append(block)
    return torch.cat(parts)


def reference_protocol(pictures: PictureSet, split: str | None, used: Iterable[FeatureNetwork]) -> dict[str, Any]:
    """What must be written beside anything measured on the reference."""
    return {
        "reference": {**_about(pictures), "digest": pictures.digest, "split": split},
        "features": _about_networks(used),
    }


def _about_networks(used: Iterable[FeatureNetwork]) -> dict[str, Any]:
    return {
        network.name: {"sha256": network.sha256, "preprocessing": network.preprocessing, "package": network.package}
        for network in used
    }


def _about(pictures: PictureSet) -> dict[str, Any]:
    return {
        "source": pictures.source,
        "count": len(pictures),
        "shape": list(pictures.shape),
        "resize": pictures.resize,
    }


def parse_metrics(text: str) -> list[str]:
    """ "fid,kid" -> ["fid", "kid"]. Raises ValueError for unknown or repeated names."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics: expected some of {', '.join(METRICS)}, got {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"metrics: expected each once, got {text!r}")
    return names


def check(names: Sequence[str], pictures: PictureSet, reference: PictureSet | ReferenceStatistics) -> None:
    """Raise ValueError, before any work, where a metric cannot be measured on these."""
    known = reference.protocol["reference"] if isinstance(reference, ReferenceStatistics) else _about(reference)
    if known["shape"] not in (None, list(pictures.shape)):
        remedy = "--resolution resizes the reference"
        if known["shape"][0] != pictures.shape[0]:
            remedy = f"--channels={known['shape'][0]} reads the images as the reference was"
        raise ValueError(
            f"images: expected the reference's [channels, height, width] {known['shape']}, got {list(pictures.shape)}; {remedy}"
        )
    for name in names:
        metric = METRICS[name]
        least = {"prdc": metrics.DENSITY_NEIGHBOURS + 1, "is": metrics.SPLITS}.get(metric.kind, 2)
        if len(pictures) < least:
            raise ValueError(f"{name}: expected at least {least} images, got {len(pictures)}")
        if metric.kind == "is":
            continue
        if metric.kind == "fd" and metric.features == INCEPTION and reference.moments is not None:
            if known["resize"] is not None:
                raise ValueError(
                    f"{name}: expected the reference as stored, which its mu and sigma are of, got it {known['resize']}"
                )
            continue
        if known["count"] is not None and known["count"] < least:
            raise ValueError(f"{name}: expected at least {least} images in the reference, got {known['count']}")
        if isinstance(reference, ReferenceStatistics):
            if metric.kind != "fd":
                raise ValueError(f"{name}: expected images as the reference, got statistics; give their source to --ref")
            if metric.features not in reference.statistics:
                found = ", ".join(reference.statistics)
                raise ValueError(f"{name}: expected reference statistics of {metric.features}, got {found}")
        elif metric.kind == "label-match":
            for what, labels in (("images", pictures.labels), ("reference", reference.labels)):
                if labels is None:
                    raise ValueError(f"{name}: expected labels of the {what}, got none")


def load_networks(
    names: Iterable[str], weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> dict[str, FeatureNetwork]:
    """The feature networks that metrics need, by name; for ``weights`` see :func:`imm.evaluation.networks.inception`."""
    wanted = dict.fromkeys(METRICS[name].features for name in names)
    return {name: networks.load(name, weights, device) for name in wanted if name is not None}


def evaluate(
    names: Sequence[str],
    pictures: PictureSet,
    reference: PictureSet | ReferenceStatistics,
    used: Mapping[str, FeatureNetwork] | None = None,
    *,
    device: torch.device | str = "cpu",
    batch: int = 64,
    split: str | None = None,
    progress: Callable[[str, int], None] | None = None,
    of_reference: dict[str, Features] | None = None,
) -> dict[str, Any] | None:
    """Measure metrics of pictures against a reference. Collective where there is a process group.

    Args:
        names: of :data:`METRICS`. pictures: to judge. reference: real ones, or their statistics.
        used: what :func:`load_networks` gave for these names and the device; None loads them.
        device: of this process. batch: pictures at a time through a network.
        split: which split the reference is, for the record.
        progress: called with a network's name and the number of pictures it has done.
        of_reference: takes the reference's features by network, and gives them to a later call for the same reference and
            metrics, which does not compute them again.

    Returns:
        On rank 0 ``{"format_version", "metrics", "protocol"}``, what JSON can hold (fields: docs/howto/evaluation.md); None on
        other ranks.

    Raises:
        ValueError, FileNotFoundError: with what was expected and what came.

    Example:
        >>> real, fake = picture_set(torch.rand(64, 1, 8, 8)), picture_set(torch.rand(64, 1, 8, 8))
        >>> evaluate(["mmd-pixels"], fake, real)["metrics"].keys()
        dict_keys(['mmd-pixels'])
    """
    check(names, pictures, reference)
    used = load_networks(names, None, device) if used is None else used
    moments = _moments(names, reference, used)
    if isinstance(reference, ReferenceStatistics):
        _check_networks(reference, used)
    chosen, ours = {name: METRICS[name] for name in names}, dict[str, Features]()
    theirs: dict[str, Features] = {} if of_reference is None else of_reference
    for name, network in used.items():
        kinds = {metric.kind for metric in chosen.values() if metric.features == name}
        tell = None if progress is None else partial(progress, name)
        ours[name] = extract(network, pictures, device, batch, kinds != {"fd"}, tell)
        if name not in theirs:
            found = _of_reference(network, reference, moments if name == INCEPTION else None, kinds, device, batch, tell)
            theirs |= {} if found is None else {name: found}
    if dist.is_initialized() and dist.get_rank() != 0:
        return None
    about = {"features": _about_networks(used.values())}
    if isinstance(reference, ReferenceStatistics):
        about["reference"] = reference.protocol["reference"]
    else:
        about |= {"reference": reference_protocol(reference, split, ())["reference"]}
    values: dict[str, float] = {}
    settings: dict[str, Any] = {}
    for name, metric in chosen.items():
        if metric.features is None:
            assert isinstance(reference, PictureSet)
            measured, chosen_settings = _on_pixels(name, metric.kind, pictures, reference)
        else:
            both = ours[metric.features], theirs.get(metric.features)
            measured, chosen_settings = _on_features(name, metric.kind, *both, torch.device(device))
        values |= measured
        settings[name] = {"what": metric.what, **chosen_settings}
        if metric.kind == "fd" and metric.features == INCEPTION and moments is not None:
            settings[name]["reference"] = {"statistics": "mu and sigma of the file", "sha256": moments.digest()}
    versions = {"imm": __version__, "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    seeds = None if pictures.seeds is None else format_integers(pictures.seeds)
    protocol = {
        "images": {**_about(pictures), "digest": pictures.digest, "seeds": seeds},
        "generation": pictures.generation,
        **about,
        "quantisation": pictures.quantisation,
        "settings": settings,
        "versions": {**versions, "pillow": version("pillow")},
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu",
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
    }
    return {"format_version": FORMAT_VERSION, "metrics": values, "protocol": protocol}


def _moments(
    names: Sequence[str], reference: PictureSet | ReferenceStatistics, used: Mapping[str, FeatureNetwork]
) -> FeatureStatistics | None:
    """The reference's own ``mu`` and ``sigma``, where a metric is of Inception features."""
    moments = reference.moments if any(METRICS[name].features == INCEPTION for name in names) else None
    if moments is not None and INCEPTION in used and len(moments.mean) != used[INCEPTION].dimensions:
        size = used[INCEPTION].dimensions
        raise ValueError(f"reference: expected mu of the {size} features of {INCEPTION}, got {len(moments.mean)}")
    return moments


def _of_reference(
    network: FeatureNetwork,
    reference: PictureSet | ReferenceStatistics,
    moments: FeatureStatistics | None,
    kinds: set[str],
    device: torch.device | str,
    batch: int,
    tell: Callable[[int], None] | None,
) -> Features | None:
    """The reference's features as far as metrics of these kinds need them, with ``moments`` for its statistics where given."""
    if isinstance(reference, ReferenceStatistics):
        known = reference.statistics.get(network.name)
        return None if known is None else Features(known, None, None)
    needed = kinds - ({"is"} if moments is None else {"is", "fd"})
    found = extract(network, reference, device, batch, bool(needed - {"fd"}), tell) if needed else None
    if moments is None:
        return found
    return Features(moments, None, None) if found is None else replace(found, statistics=moments)


def _on_features(
    name: str, kind: str, ours: Features, theirs: Features | None, device: torch.device
) -> tuple[dict[str, float], dict[str, Any]]:
    """Values and settings of one metric."""
    if kind == "is":
        assert ours.logits is not None
        mean, std = metrics.inception_score(ours.logits)
        return {name: mean, f"{name}.std": std}, {"splits": metrics.SPLITS, "seed": metrics.SEED}
    assert theirs is not None
    if kind == "fd":
        return {name: ours.statistics.frechet_distance(theirs.statistics)}, {}
    assert ours.features is not None
    assert theirs.features is not None
    x, y = ours.features.to(device), theirs.features.to(device)
    if kind == "kid":
        mean, std = metrics.kernel_distance(x, y)
        size = min(metrics.SUBSET_SIZE, len(x), len(y))
        return {name: mean, f"{name}.std": std}, {"subsets": metrics.SUBSETS, "subset_size": size, "seed": metrics.SEED}
    if kind == "prdc":
        shares = asdict(metrics.neighbourhoods(x, y))
        neighbours = {"neighbours": metrics.NEIGHBOURS, "density_neighbours": metrics.DENSITY_NEIGHBOURS}
        return {f"{name}.{key}": value for key, value in shares.items()}, neighbours
    return _mmd(name, x, y)


def _on_pixels(name: str, kind: str, pictures: PictureSet, reference: PictureSet) -> tuple[dict[str, float], dict[str, Any]]:
    x, y = (one.pixels[:].flatten(1) for one in (pictures, reference))  # all of them in memory
    if kind == "mmd":
        return _mmd(name, x, y)
    assert reference.labels is not None
    assert pictures.labels is not None
    match, spread = PixelReference(y, reference.labels, reference.num_classes).label_scores(x, pictures.labels)
    return {name: match} | ({f"{name}.spread": spread} if math.isfinite(spread) else {}), {}


def _mmd(name: str, x: Tensor, y: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    reference = metrics.MMDReference(y, MMD_COUNT)
    used = {"count": min(len(x), reference.count), "reference_count": reference.count}
    return {name: reference.score(x)}, {"bandwidth": "median distance of the reference", **used}


def _check_networks(reference: ReferenceStatistics, used: Mapping[str, FeatureNetwork]) -> None:
    for name, network in used.items():
        if name not in reference.statistics or reference.moments is not None:
            continue
        found = reference.protocol["features"][name]
        for key, own in (("sha256", network.sha256), ("preprocessing", network.preprocessing)):
            if found[key] != own:
                raise ValueError(f"{name}: expected reference statistics of {key} {own}, got {found[key]}")
