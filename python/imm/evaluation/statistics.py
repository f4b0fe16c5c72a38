"""Mean and covariance of features, gathered in parts and across processes, and the Frechet distance between two such."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from imm.data.arrays import MOMENTS, names_in, read_arrays
from imm.files import replacing

FORMAT_VERSION = 1
_KEY = "imm_statistics"


class FeatureStatistics:
    """Count, mean and scatter of features, in float64 on the CPU.

    Parts are merged by the update of Chan, Golub and LeVeque (1979), which never subtracts two large sums: the result does not
    depend on how the features were cut into parts, beyond rounding.

    Attributes:
        n: how many feature vectors. mean: ``[D]``. m2: ``[D, D]``, the sum of (x - mean)(x - mean)^T.

    Example:
        >>> statistics = FeatureStatistics(8)
        >>> statistics.update(torch.randn(100, 8))
        >>> statistics.covariance().shape
        torch.Size([8, 8])
    """

    def __init__(self, dimensions: int) -> None:
        if dimensions < 1:
            raise ValueError(f"dimensions: expected at least 1, got {dimensions}")
        self.n = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64)
        self.m2 = torch.zeros(dimensions, dimensions, dtype=torch.float64)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> FeatureStatistics:
        """Statistics of vectors of which only mean ``[D]`` and covariance ``[D, D]`` are known, not how many there were."""
        made = cls(len(mean))
        # As of two vectors, whose scatter is the covariance.
        made.n, made.mean, made.m2 = 2, mean.to(torch.float64), covariance.to(torch.float64)
        return made

    def digest(self) -> str:
        """SHA-256 of mean and covariance, float64."""
        return hashlib.sha256(torch.cat([self.mean, self.covariance().flatten()]).numpy().tobytes()).hexdigest()

    def update(self, features: Tensor) -> None:
        """Add features ``[N, D]``, any device. Raises ValueError for another shape and for values that are not finite."""
        if features.dim() != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: expected [N, {len(self.mean)}], got {list(features.shape)}")
        if len(features) == 0:
            return
        x = features.detach().to(torch.float64)
        if not bool(torch.isfinite(x).all()):
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        mean = x.mean(0)
        centred = x - mean
        self._add(len(x), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: FeatureStatistics) -> None:
        """Add what another one gathered."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"statistics: expected {len(self.mean)} dimensions, got {len(other.mean)}")
        if other.n:
            self._add(other.n, other.mean, other.m2)

    def _add(self, n: int, mean: Tensor, m2: Tensor) -> None:
        total = self.n + n
        shift = mean - self.mean
        self.mean = self.mean + shift * (n / total)
        self.m2 = self.m2 + m2 + torch.outer(shift, shift) * (self.n * n / total)
        self.n = total

    def all_reduce(self, device: torch.device | str = "cpu") -> None:
        """Merge what all processes gathered, in the order of their ranks, so that all are bitwise identical. Collective.

        Args:
            device: what the process group's backend carries: "cpu" for gloo, the rank's CUDA device for nccl.
        """
        merged = FeatureStatistics(len(self.mean))
        for rank in range(dist.get_world_size()):
            part = torch.cat([torch.tensor([self.n], dtype=torch.float64), self.mean, self.m2.flatten()]).to(device)
            dist.broadcast(part, src=rank)
            part = part.cpu()
            if part[0] > 0:
                mean, m2 = part[1:].split([len(self.mean), self.m2.numel()])
                merged._add(int(part[0]), mean, m2.reshape(self.m2.shape))
        self.n, self.mean, self.m2 = merged.n, merged.mean, merged.m2

    def covariance(self) -> Tensor:
        """``[D, D]`` float64, divided by n - 1. Raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"statistics: expected at least 2 images, got {self.n}")
        return self.m2 / (self.n - 1)

    def frechet_distance(self, other: FeatureStatistics) -> float:
        """:func:`frechet_distance` to the other's mean and covariance."""
        return frechet_distance(self.mean, self.covariance(), other.mean, other.covariance())


def _root(sigma: Tensor) -> Tensor:
    """A with A A^T = sigma, of as many columns as sigma has eigenvalues above rounding error."""
    values, vectors = torch.linalg.eigh(0.5 * (sigma + sigma.T))
    noise = float(values.abs().max()) * len(values) * torch.finfo(torch.float64).eps
    if float(values.min()) < -1e3 * noise:
        raise ValueError(f"sigma: expected a positive semi-definite matrix, got an eigenvalue of {float(values.min()):.3g}")
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared 2-Wasserstein distance between two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

    ``|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2))``; the trace of the root is the sum of the singular values
    of A1^T A2 with sigma = A A^T, from symmetric eigenvectors. So rounding errors have no root, which would count where a
    covariance is singular: with fewer vectors than dimensions it is.

    Args:
        mu1, mu2: ``[D]``. sigma1, sigma2: ``[D, D]``, symmetric. All are taken to float64.

    Returns:
        The distance, >= 0; 0 to rounding for equal arguments.

    Raises:
        ValueError: other shapes, values that are not finite, a covariance with a negative eigenvalue.
    """
    mu1, sigma1, mu2, sigma2 = (value.detach().to("cpu", torch.float64) for value in (mu1, sigma1, mu2, sigma2))
    d = len(mu1) if mu1.dim() else 0
    for name, value, shape in (("mu1", mu1, [d]), ("sigma1", sigma1, [d, d]), ("mu2", mu2, [d]), ("sigma2", sigma2, [d, d])):
        if d == 0 or list(value.shape) != shape:
            raise ValueError(f"{name}: expected {shape if d else '[D]'}, got {list(value.shape)}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    first, second = _root(sigma1), _root(sigma2)
    cross = float(torch.linalg.svdvals(first.T @ second).sum()) if first.shape[1] and second.shape[1] else 0.0
    # The traces of the roots, not of sigma: then equal arguments cancel.
    distance = float((mu1 - mu2).square().sum()) + float(first.square().sum()) + float(second.square().sum()) - 2.0 * cross
    return max(distance, 0.0)


def save_statistics(
    path: str | os.PathLike[str], statistics: Mapping[str, FeatureStatistics], about: Mapping[str, Any]
) -> None:
    """Write statistics by the name of their feature network, and what they are of, to one npz file, atomically.

    Args:
        path: the file; its folder must exist. statistics: one entry a network. about: what JSON can hold.
    """
    target = Path(path)
    arrays: dict[str, Any] = {_KEY: np.array(json.dumps({"format_version": FORMAT_VERSION, **about}, allow_nan=False))}
    for name, value in statistics.items():
        arrays |= {f"{name}/n": np.array(value.n), f"{name}/mean": value.mean.numpy(), f"{name}/m2": value.m2.numpy()}
    with replacing(target) as part:
        np.savez(part, **arrays)


def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether the file is one that :func:`save_statistics` wrote, or holds ``mu`` and ``sigma`` and no images."""
    try:
        names = names_in(Path(path))
    except ValueError:
        return False
    return _KEY in names or (names >= set(MOMENTS) and not names & {"images", "arr_0"})


def read_moments(path: str | os.PathLike[str]) -> FeatureStatistics | None:
    """``mu`` ``[D]`` and ``sigma`` ``[D, D]`` of an npz file: mean and covariance of Inception features, as ADM's reference
    batches, EDM and pytorch-fid have them. None where it has neither.

    Raises:
        ValueError: one without the other, other shapes, values that are not finite, or a sigma that is no covariance.
    """
    found = read_arrays(Path(path), MOMENTS)
    if not found:
        return None
    shapes = {name: list(value.shape) for name, value in found.items()}
    d = shapes.get("mu", [0])[0] if shapes.get("mu") else 0
    numbers = all(value.dtype.kind == "f" for value in found.values())
    if shapes != {"mu": [d], "sigma": [d, d]} or not d or not numbers:
        got = ", ".join(f"{name} {shape} of {found[name].dtype}" for name, shape in shapes.items())
        raise ValueError(f"{path}: expected floating mu [D] and sigma [D, D], got {got}")
    # Cloned: numpy's memory is aligned now so and now so, and with it the last bits of products.
    mu, sigma = (torch.from_numpy(found[name].astype(np.float64)).clone() for name in MOMENTS)
    if not bool(mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{path}: expected finite mu and sigma, got NaN or infinity")
    values, vectors = torch.linalg.eigh(0.5 * (sigma + sigma.T))
    rounding = float(np.finfo(found["sigma"].dtype).eps) * d * float(values.abs().max())
    least = float(values.min())
    if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=rounding) or least < -rounding * (1e3 if rounding < 1e-9 else 1):
        raise ValueError(f"{path}: expected a covariance as sigma, got no symmetric one or an eigenvalue of {least:.3g}")
    return FeatureStatistics.from_moments(mu, sigma if least >= 0 else (vectors * values.clamp(min=0)) @ vectors.T)


def load_statistics(path: str | os.PathLike[str]) -> tuple[dict[str, FeatureStatistics], dict[str, Any]]:
    """Read what :func:`save_statistics` wrote. Raises ValueError for another file or a newer format."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(str(archive[_KEY]))
            if about.pop("format_version") > FORMAT_VERSION:
                raise ValueError(f"a format newer than {FORMAT_VERSION}")
            statistics = {}
            for name in [key.removesuffix("/n") for key in archive.files if key.endswith("/n")]:
                # Cloned: numpy's memory is aligned now so and now so, and with it the last bits of products.
                mean, m2 = (torch.from_numpy(archive[f"{name}/{part}"]).clone() for part in ("mean", "m2"))
                value = statistics[name] = FeatureStatistics(len(mean))
                if m2.shape != value.m2.shape or mean.dtype != torch.float64 or m2.dtype != torch.float64:
                    raise ValueError(
                        f"{name}/m2 {list(m2.shape)} of {m2.dtype} for {name}/mean {list(mean.shape)} of {mean.dtype}"
                    )
                value.n, value.mean, value.m2 = int(archive[f"{name}/n"]), mean, m2
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected statistics that imm eval stats wrote, got: {error}") from error
    return statistics, about
