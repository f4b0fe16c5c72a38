"""The recorded cases: weights are made from their names, so that no file has to carry them."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tolerance import distance
from torch import Tensor

DATA = Path(__file__).parent / "data"


def names(file: str) -> dict[str, tuple[int, ...]]:
    """A recorded list of published names and shapes."""
    rows = (line.split(" ", 1) for line in (DATA / file).read_text().splitlines())
    return {name: tuple(json.loads(shape)) for name, shape in rows}


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The recorded cases' weight of that published name."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    if len(shape) >= 2:
        n = n / np.sqrt(np.prod(shape[1:]))
    elif ".norm" in name and name.endswith("weight"):
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.from_numpy(n.astype(np.float32))


def case(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and settings of a sampling case."""
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def published_settings(meta: dict[str, Any]) -> dict[str, Any]:
    """A sampling case's settings under the published attribute names."""
    latents = meta["network"] != "SongUNet"  # or the published CIFAR-10 network
    return {
        "model_type": meta["network"],
        "img_resolution": 32,
        "img_channels": 4 if latents else 3,
        "label_dim": 1000 if latents else 0,
        "mixed_precision": None,
        "noise_schedule": meta["schedule"],
        "T": meta["T"],
        "eps": meta["eps"],
        "sigma_data": meta["sigma_data"],
        "f_type": meta["parametrization"],
        "time_scale": meta["time_scale"],
        "temb_type": meta["second_time"],
    }


def relative(value: Tensor, expected: np.ndarray) -> float:
    """Relative L2 error."""
    return distance(value, torch.from_numpy(expected))
