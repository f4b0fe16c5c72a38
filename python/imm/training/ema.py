"""Averages of a network's weights over the steps of training, and others made of these afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imm import checkpoints
from imm.training.sharding import local

#: The kind of the files that hold power-function averages, what their names begin with, and the names of a state's tensors.
AVERAGES = "averages"
#: Steps of a run are cut into at most so many parts where profiles are compared.
_PARTS = 20_000


class _Average:
    """An average of a network's weights, in ``network``, a copy of it."""

    def __init__(self, live: nn.Module) -> None:
        self.network = copy.deepcopy(live).eval().requires_grad_(False)

    @torch.no_grad()
    def _towards(self, live: nn.Module, share: float) -> None:
        """Move the parameters this share of the way to the live ones; buffers are copied."""
        mine, theirs = ([local(parameter) for parameter in module.parameters()] for module in (self.network, live))
        torch._foreach_lerp_(mine, theirs, share)
        for buffer, other in zip(self.network.buffers(), live.buffers(), strict=True):
            buffer.copy_(other)


class EMA(_Average):
    """The average ``ema <- beta ema + (1 - beta) live`` in ``network`` (the paper's 0.9999, no warm-up)."""

    def __init__(self, live: nn.Module, beta: float) -> None:
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"ema: expected beta in [0, 1), got {beta}")
        self.beta = beta
        super().__init__(live)

    def update(self, live: nn.Module) -> None:
        """One step towards the live weights."""
        self._towards(live, 1.0 - self.beta)


class PowerEMA(_Average):
    """The power-function average of Karras et al. 2024, section 3.1: after step n the weights of step m count as m^gamma does,
    and the initial weights do not count.

    ``beta = (1 - 1/n)^(gamma + 1)`` at step n = 1, 2, ... ``length`` is the relative standard deviation of that profile, its
    width as a share of the training so far: 0.05 and 0.1 are usual.
    """

    def __init__(self, live: nn.Module, length: float) -> None:
        self.length, self.gamma = length, gamma_of(length)
        super().__init__(live)

    def update(self, live: nn.Module, step: int) -> None:
        """Take in the live weights after ``step`` steps, the first of which is 1."""
        self._towards(live, 1.0 - (1.0 - 1.0 / step) ** (self.gamma + 1.0))


def gamma_of(length: float) -> float:
    """gamma of the profile of this length: the root of ``length^2 (gamma + 2)^2 (gamma + 3) = gamma + 1`` with gamma > 0.

    Raises:
        ValueError: a length outside (0, 0.28]: 1 / sqrt(12) is the length of gamma = 0, a plain mean.
    """
    if not 0.0 < length <= 0.28:
        raise ValueError(f"length: expected the length of an average in (0, 0.28], got {length}")
    inverse = length**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def profile(length: float, step: int, edges: np.ndarray) -> np.ndarray:
    """How much the steps from one edge to the next count in the average of ``length`` after ``step`` steps: ``[E - 1]`` float64
    that sum to 1. edges: ``[E]``, from 0 to at least ``step``. Exact for :class:`PowerEMA`, whose factors telescope."""
    reached = np.minimum(edges / step, 1.0) ** (gamma_of(length) + 1.0)
    return np.diff(reached)


def mixture(stored: list[tuple[float, int]], length: float, step: int) -> tuple[np.ndarray, float]:
    """Factors of stored averages, whose sum is the nearest to the average of ``length`` after ``step`` steps.

    Args:
        stored: (length, step) of each.

    Returns:
        Factors ``[N]`` float64 that sum to 1, by least squares of the profiles (Karras et al. 2024, section 3.2), and the norm
        of the difference of their sum and the wanted profile, relative to the latter's.
    """
    last = max(step, *(at for _, at in stored))
    edges = np.unique(np.linspace(0, last, min(last, _PARTS) + 1).round())
    per_step = np.sqrt(np.diff(edges))  # the norm is that of the density
    matrix = np.stack([profile(*one, edges) / per_step for one in stored], axis=1)
    wanted = profile(length, step, edges) / per_step
    # The sum is a row of its own that outweighs the others: then weights that do not move are reconstructed exactly.
    heavy = 1e4 * np.linalg.norm(wanted)
    rows, values = np.vstack([matrix, np.full(len(stored), heavy)]), np.append(wanted, heavy)
    factors = np.linalg.lstsq(rows, values, rcond=1e-14)[0]
    return factors, float(np.linalg.norm(matrix @ factors - wanted) / np.linalg.norm(wanted))


def reconstruct(folder: Path, length: float, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any], float]:
    """A power-function average that was not tracked, from those that a run left (``TrainConfig.ema_lengths``).

    Args:
        folder: of the run. length: relative standard deviation of the wanted average. step: after which; None for the latest
            that the run left averages of.

    Returns:
        The network's tensors, in the dtypes of the stored ones; the settings of the stored averages of that step; and the
        relative error of the profile (:func:`mixture`), 0 for an average that was tracked.

    Raises:
        ValueError: a length outside (0, 0.28], a folder without averages, a step of which it has none.
    """
    gamma_of(length)
    files: dict[int, Path] = {}
    for path in folder.glob(f"{AVERAGES}-*.safetensors"):
        name = path.stem.removeprefix(f"{AVERAGES}-")
        if name.isdigit():
            files[int(name)] = path
    if not files:
        raise ValueError(f"runs: expected files {AVERAGES}-STEP.safetensors in {folder} (imm train --ema-lengths), found none")
    at = max(files) if step is None else step
    if at not in files:
        raise ValueError(f"step: expected one that {folder} has averages of, {sorted(files)}, got {step}")
    files = {number: files[number] for number in sorted(files) if number <= at}
    lengths = {number: checkpoints.read_settings(path, AVERAGES)["lengths"] for number, path in files.items()}
    stored = [(of, number) for number, found in lengths.items() for of in found]
    factors, error = mixture(stored, length, at)
    totals: dict[str, Tensor] = {}
    index = 0
    for at_step, path in files.items():  # one file in memory at a time
        tensors, settings = checkpoints.read_file(path, AVERAGES)
        for place in range(len(lengths[at_step])):
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{place}.")}
            for key, value in own.items():
                if value.is_floating_point():
                    part = factors[index] * value.double()
                    totals[key] = totals[key].add_(part) if key in totals else part
                else:
                    totals[key] = value
            index += 1
    return {key: value.to(own[key].dtype) for key, value in totals.items()}, settings, error
