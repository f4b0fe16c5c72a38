"""Capacity is not what DDIM lacks: with the exact velocity it still needs many steps, and the exact flow map needs one.

Mixtures of Gaussians in closed form; the schedule is flow matching's, t from 1 to 0. No network is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm.evaluation import energy_distance
from imm.flow_map import FlowMap
from imm.sampling import pushforward, time_grid
from imm.studies.study import Criterion, Result, Study, markdown, plots

STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
POINTS, SUBSTEPS, SIGMA, DEVIATION = 4000, 400, 0.5, 0.05
_COLUMNS = (
    *(("data", "data"), ("sampler", "sampler"), ("steps", "steps"), ("energy", "energy distance x 1000")),
    *(("rms", "RMS to the exact map"), ("spread", "spread")),
)


class Mixture:
    """Equal weights, means ``[K, D]`` float64, one deviation; the law of x in x_t = (1 - t) x + t z, z ~ N(0, SIGMA^2)."""

    def __init__(self, means: Tensor, deviation: float = DEVIATION) -> None:
        self.means, self.variance = means.double(), deviation**2

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(0, len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[rows] + self.variance**0.5 * noise

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[z - x | x_t], the marginal velocity, ``[B, D]`` at times t ``[B, 1]``."""
        variance = (1 - t).square() * self.variance + t.square() * SIGMA**2  # [B, 1]
        apart = x[:, None] - (1 - t)[..., None] * self.means  # [B, K, D]
        share = torch.softmax(-0.5 * apart.square().sum(2) / variance, 1)[..., None]
        slope = ((t * SIGMA**2 - (1 - t) * self.variance) / variance)[..., None]
        return (share * (slope * apart - self.means)).sum(1)

    def flow(self, x: Tensor, t: Tensor, s: Tensor, substeps: int = SUBSTEPS) -> Tensor:
        """The flow map from t to s, times ``[B, 1]``, by the fourth-order Runge-Kutta method."""
        h = (s - t) / substeps
        for i in range(substeps):
            at = t + i * h
            a = self.velocity(x, at)
            b = self.velocity(x + 0.5 * h * a, at + 0.5 * h)
            c = self.velocity(x + 0.5 * h * b, at + 0.5 * h)
            d = self.velocity(x + h * c, at + h)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x


class Exact(nn.Module):
    """What a network would have to learn: the velocity, or, given s, the average velocity to s; in units of SIGMA."""

    num_classes = 0

    def __init__(self, mixture: Mixture, given_s: bool) -> None:
        super().__init__()
        self.mixture, self.given_s = mixture, given_s
        self.means = nn.Parameter(mixture.means, requires_grad=False)  # of the network's dtype

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None) -> Tensor:
        t, s = t[:, None], s[:, None]
        x = x * SIGMA * (t.square() + (1 - t).square()).sqrt()  # c_in undone
        if not self.given_s:
            return self.mixture.velocity(x, t) / SIGMA
        return (x - self.mixture.flow(x, t, s)) / (t - s) / SIGMA


def flow_map(mixture: Mixture, given_s: bool) -> FlowMap:
    """The velocity (``second_time="none"``) or the flow map itself, t from 1 to 0."""
    second = "identity" if given_s else "none"
    return FlowMap(Exact(mixture, given_s), second_time=second, time_scale=1.0, sigma_data=SIGMA, t_max=1.0).eval()


def mixtures() -> dict[str, Mixture]:
    """Eight Gaussians on a ring, and two on a line."""
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    ring = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    return {"ring of 8": Mixture(ring), "2 on a line": Mixture(torch.tensor([[-0.5], [0.5]]))}


def run(folder: Path, quick: bool, device: torch.device, say: Callable[[str], None]) -> Result:
    """Sample with the exact velocity and with the exact flow map, from the same noise. Quick or not, on the CPU."""
    rows: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    largest: dict[str, float] = {}
    for name, mixture in mixtures().items():
        generator = torch.Generator().manual_seed(0)
        data, again = mixture.sample(POINTS, generator), mixture.sample(POINTS, generator)
        z = SIGMA * torch.randn(data.shape, dtype=torch.float64, generator=generator)
        velocity, exact = flow_map(mixture, given_s=False), flow_map(mixture, given_s=True)
        true = pushforward(exact, z, time_grid(exact, 1), dtype=torch.float64)
        scores: dict[str, Any] = {"data": name, "real": data, "true": true}
        for steps in STEPS:
            x = pushforward(velocity, z, time_grid(velocity, steps), dtype=torch.float64, method="ddim")
            rows.append(_row("DDIM", steps, x, **scores))
            shown[f"{name}, DDIM, {steps}"] = x
            if steps == 1:
                largest[name] = float((x - mixture.means.mean(0)).abs().max())
        for steps in (1, 2):
            rows.append(_row("flow map", steps, pushforward(exact, z, time_grid(exact, steps), dtype=torch.float64), **scores))
        rows.append(_row("data again", None, again, **scores))
        shown[f"{name}, flow map, 1"] = true
        say(f"{name}: one step of DDIM is within {largest[name]:.1e} of the mean of the data")
    return Result(rows, criteria(rows, largest), _COLUMNS, _figures(folder, rows, shown), _TEXT, summary(rows))


def _row(sampler: str, steps: int | None, x: Tensor, *, data: str, real: Tensor, true: Tensor) -> dict[str, Any]:
    deviation = lambda x: float((x - x.mean(0)).square().sum(1).mean().sqrt())
    rms = float((x - true).square().sum(1).mean().sqrt()) if steps else None
    found = {"energy": 1000 * energy_distance(x, real), "rms": rms, "spread": deviation(x) / deviation(real)}
    return {"data": data, "sampler": sampler, "steps": steps, **found}


_TEXT = (
    "A network of unlimited capacity that sees t alone learns the velocity. One DDIM step along it ends at the mean of the "
    "data, for every noise. The error falls in proportion to the step: many steps are needed, however good the network is.",
    "The flow map sees t and s. One jump is exact: what limits it is what the network can represent, not the sampler.",
    "The energy distance of 4,000 points cannot tell 16 steps from the truth; the RMS distance to the exact map, from the same "
    "noise, can.",
)


def criteria(rows: list[dict[str, Any]], largest: dict[str, float]) -> list[Criterion]:
    """What must hold, of each mixture."""
    found = {(row["data"], row["sampler"], row["steps"]): row for row in rows}
    checks = []
    for name, value in largest.items():
        ratio = found[name, "DDIM", 64]["rms"] / found[name, "DDIM", 32]["rms"]
        checks += [
            Criterion(f"{name}: one step of DDIM, largest distance from the mean of the data", value, high=1e-10),
            Criterion(f"{name}: error of 64 steps of DDIM over that of 32", ratio, low=0.45, high=0.60),
            Criterion(f"{name}: energy distance x 1000 of one step of DDIM", found[name, "DDIM", 1]["energy"], low=400),
            Criterion(f"{name}: energy distance x 1000 of four steps of DDIM", found[name, "DDIM", 4]["energy"], low=2),
            Criterion(
                f"{name}: energy distance x 1000 of one step of the flow map", found[name, "flow map", 1]["energy"], -1, 1
            ),
        ]
    return checks


def summary(rows: list[dict[str, Any]]) -> str:
    """Energy distance and RMS over steps, in Markdown."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    header = ["", *(f"{name}: {what}" for name in names for what in ("energy x 1000", "RMS", "spread"))]
    lines = []
    for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        own = {row["data"]: row for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)}
        cells = [
            cell
            for name in names
            for cell in (
                f"{own[name]['energy']:.2f}",
                "" if own[name]["rms"] is None else f"{own[name]['rms']:.4f}",
                f"{own[name]['spread']:.3f}",
            )
        ]
        lines.append([sampler if steps is None else f"{sampler}, {steps}", *cells])
    return markdown(header, lines)


def _figures(folder: Path, rows: list[dict[str, Any]], shown: dict[str, Tensor]) -> list[tuple[Path, str]]:
    pyplot = plots()
    if pyplot is None:
        return []
    ring = next(iter(mixtures()))
    picked = [f"{ring}, DDIM, {n}" for n in (1, 2, 4, 16)] + [f"{ring}, flow map, 1"]
    figure, axes = pyplot.subplots(1, len(picked), figsize=(15, 3.2), constrained_layout=True)
    for axis, name in zip(axes, picked, strict=True):
        axis.scatter(*shown[name][:1500].T, s=2)
        axis.set(xlim=(-1, 1), ylim=(-1, 1), title=name.removeprefix(f"{ring}, "), aspect="equal")
    points, curve = folder / "points.png", folder / "curve.png"
    figure.savefig(points, dpi=110)
    pyplot.close(figure)
    figure, axis = pyplot.subplots(figsize=(5.5, 4), constrained_layout=True)
    for name in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == name and row["sampler"] == "DDIM"]
        axis.loglog([row["steps"] for row in own], [row["rms"] for row in own], marker="o", label=name)
    axis.set(xlabel="steps of DDIM with the exact velocity", ylabel="RMS distance to the exact flow map")
    axis.grid(True, alpha=0.25)
    axis.legend()
    figure.savefig(curve, dpi=110)
    pyplot.close(figure)
    return [
        (points, "The ring of 8: DDIM with the exact velocity in 1, 2, 4 and 16 steps, and one step of the exact flow map."),
        (curve, "DDIM's error falls in proportion to the step; the flow map's is 0."),
    ]


STUDY = Study("Capacity: DDIM with the exact velocity against the exact flow map", run)
