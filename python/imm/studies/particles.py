"""What more than one particle a group is worth: IMM on a ring of 8 Gaussians for M = 1 to 16, over the gap between t and r.

The gap is about 1 / 2^k. M = 1 is a consistency loss, whose blur more particles remove where the gap is wide (k = 3 and 5).
Where it is narrow they do not: at k = 12 nearly all of the gradient is of matched pairs, y_t and y_r of one image and noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.evaluation import energy_distance
from imm.flow_map import FlowMap
from imm.objectives import IMM
from imm.sampling import initial_state, pushforward, time_grid
from imm.studies import toys
from imm.studies.capacity import DEVIATION, Mixture, mixtures
from imm.studies.study import Criterion, Result, Study, markdown, plots

BATCH, POINTS, EVERY = 256, 2000, 20
#: Of k: a wide gap, where M counts, and narrow ones.
WIDE, NARROW = 3, (8, 12)
_COLUMNS = (
    *(("k", "k"), ("particles", "M"), ("seed", "seed"), ("energy", "energy distance x 1000 in 1 step")),
    *(("energy_2", "in 2"), ("energy_8", "in 8"), ("spread", "spread in 1 step"), ("on_mode", "within 3 deviations of a mode")),
    *(("grad_norm", "median gradient norm"), ("spike", "largest over median"), ("matched_share", "matched pairs' share")),
)


@dataclass
class _Plan:
    """Seeds of each k, numbers of particles, training steps."""

    seeds: dict[int, Sequence[int]]
    particles: Sequence[int]
    steps: int = 800


FULL = _Plan({3: (0, 1, 2), 5: (0, 1), 8: (0, 1), 12: (0, 1)}, (1, 2, 4, 8, 16))
QUICK = _Plan({3: (0,)}, (1, 4, 16))


def objective_of(model: FlowMap, particles: int, k: int) -> IMM:
    """The loss of the study."""
    return IMM(model, particles=particles, k=k, a=1)


def run(folder: Path, quick: bool, device: torch.device, say: Callable[[str], None]) -> Result:
    """Train and score, on the CPU; quick: the widest gap with one seed."""
    plan, mixture = QUICK if quick else FULL, mixtures()["ring of 8"]
    data = mixture.sample(POINTS, torch.Generator().manual_seed(0))
    rows: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}
    for k, seeds in plan.seeds.items():
        for particles in plan.particles:
            for seed in seeds:
                model, of_training = _trained(mixture, k, particles, seed, plan.steps)
                scores, points = _scores(model, data, mixture)
                rows.append({"k": k, "particles": particles, "seed": seed, **scores, **of_training})
                if k == WIDE and seed == seeds[0] and particles in (1, 4, 16):
                    shown[f"k = {k}, M = {particles}"] = points
                say(f"k {k}, M {particles}, seed {seed}: one step {scores['energy']:.1f}, spread {scores['spread']:.2f}")
    gap = consistency_gap()
    say(f"gradient at M = 1 and of the consistency loss: relative difference {gap:.1e}")
    return Result(rows, criteria(rows, gap), _COLUMNS, _figures(folder, rows, shown, data), _TEXT, summary(rows))


def _trained(mixture: Mixture, k: int, particles: int, seed: int, steps: int) -> tuple[FlowMap, dict[str, float]]:
    """A flow map, and what the second half of its training was like."""
    objective = objective_of(toys.flow_map(2, seed), particles, k)
    shares: list[Tensor] = []

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        watched = 2 * step >= steps and step % EVERY == 0
        loss, stats = objective(mixture.sample(BATCH, generator).float(), generator=generator, pairs=watched)
        if watched:
            shares.append(stats["pairs"])
        return loss

    model, norms = toys.train(objective.flow_map, loss_of, steps, seed)
    half = norms[steps // 2 :]
    matched, whole = torch.stack(shares).sum(0).tolist()
    median = statistics.median(half)
    return model, {"grad_norm": median, "spike": max(half) / median, "matched_share": matched / whole}


def _scores(model: FlowMap, data: Tensor, mixture: Mixture) -> tuple[dict[str, float], Tensor]:
    z = initial_state(model, range(POINTS), (2,))
    one, two, eight = (pushforward(model, z, time_grid(model, steps)).double() for steps in (1, 2, 8))
    deviation = lambda x: float((x - x.mean(0)).square().sum(1).mean().sqrt())
    near = (one[:, None] - mixture.means).norm(dim=2).amin(1) < 3 * DEVIATION
    energies = {name: 1000 * energy_distance(x, data) for name, x in (("energy", one), ("energy_2", two), ("energy_8", eight))}
    return {**energies, "spread": deviation(one) / deviation(data), "on_mode": float(near.double().mean())}, one


def consistency_gap(particles: int = 1) -> float:
    """The largest difference of IMM's gradient from that of 2 w(t) (1 - exp(-|y_t - y_r| / (|c_out| D))), relative; float64.

    The latter compares matched pairs alone: it is a consistency loss. With one particle they are all that there is.
    """
    model = toys.flow_map(2).double()
    objective, generator = objective_of(model, particles, 8), torch.Generator().manual_seed(0)
    x = mixtures()["ring of 8"].sample(64, generator)
    draws = objective.draw(x, generator=generator)
    t, s, r = (time.repeat_interleave(len(x) // len(draws.t)) for time in (draws.t, draws.s, draws.r))
    y_t = model(model.add_noise(x, draws.noise, t), t, s)
    with torch.no_grad():
        y_r = model(model.add_noise(x, draws.noise, r), r, s)
    distance = (y_t - y_r).norm(dim=1).clamp_min(objective.eps)
    pairs = (2 * objective.weight(t) * (1 - torch.exp(-objective.kernel_scale(t, s) * distance / x.shape[1]))).mean()
    wanted = torch.autograd.grad(pairs, list(model.parameters()))
    found = torch.autograd.grad(objective(x, draws=draws)[0], list(model.parameters()))
    largest = max(float(one.abs().max()) for one in wanted)
    return max(float((one - other).abs().max()) for one, other in zip(wanted, found, strict=True)) / largest


_TEXT = (
    "The gap between t and r is about 1 / 2^k of the range of noise. Where it is wide (k = 3 and 5), one particle, a "
    "consistency loss, shrinks its samples towards the mean; the larger M, the nearer they are to the data, at equal batch and "
    "training steps.",
    "What does not hold: where the gap is narrow, M hardly helps (k = 8) or not at all (k = 12). At k = 12 y_t and y_r of one "
    "image and noise are so close that these matched pairs make nearly all of the gradient: the loss is a consistency loss "
    "whatever M is. At k = 8 that is not the reason: with M = 16 they are half of it. No run is unstable at any M.",
    "The gradient's norm goes nearly as 1 / M, which Adam divides out. Energy distance punishes shrinking more than blur: an "
    "untrained network, whose samples are plain noise, has 24. Read it beside the share of samples at a mode.",
)


def criteria(rows: Sequence[dict[str, Any]], gap: float) -> list[Criterion]:
    """What must hold, at each seed."""
    found = {(row["k"], row["particles"], row["seed"]): row for row in rows}
    seeds = lambda k: [seed for at, particles, seed in found if at == k and particles == 1]
    ratios = lambda k, few, many: [found[k, few, seed]["energy"] / found[k, many, seed]["energy"] for seed in seeds(k)]
    spreads = lambda particles: [found[WIDE, particles, seed]["spread"] for seed in seeds(WIDE)]
    checks = [
        Criterion("M = 1: gradient against the consistency loss's, relative difference", gap, high=1e-12),
        Criterion(f"k = {WIDE}: energy distance of one step, M = 1 over M = 4", min(ratios(WIDE, 1, 4)), low=2),
        Criterion(f"k = {WIDE}: energy distance of one step, M = 4 over M = 16", min(ratios(WIDE, 4, 16)), low=1.2),
        Criterion(f"k = {WIDE}, M = 1: spread of one step", max(spreads(1)), high=0.65),
        Criterion(f"k = {WIDE}, M = 4: spread of one step", min(spreads(4)), low=0.70),
    ]
    for k in (k for k in NARROW if seeds(k)):
        checks.append(Criterion(f"k = {k}: energy distance of one step, M = 1 over M = 16", max(ratios(k, 1, 16)), high=1.6))
    if seeds(NARROW[-1]):
        share = min(row["matched_share"] for row in rows if row["k"] == NARROW[-1])
        checks.append(Criterion(f"k = {NARROW[-1]}: matched pairs' share of the gradient, the least over M", share, low=0.9))
    return checks


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Energy distance and spread of one step, and the matched pairs' share, over M, in Markdown: the means of the seeds."""
    columns = list(dict.fromkeys(row["particles"] for row in rows))
    lines = []
    for k in dict.fromkeys(row["k"] for row in rows):
        cells = []
        for particles in columns:
            own = [row for row in rows if (row["k"], row["particles"]) == (k, particles)]
            mean = lambda name, own=own: statistics.fmean(row[name] for row in own)
            cells.append(f"{mean('energy'):.1f} / {mean('spread'):.2f} / {mean('matched_share'):.0%}")
        lines.append([f"k = {k}", *cells])
    return markdown(["energy x 1000 / spread / matched share", *(f"M = {particles}" for particles in columns)], lines)


def _figures(folder: Path, rows: Sequence[dict[str, Any]], shown: dict[str, Tensor], data: Tensor) -> list[tuple[Path, str]]:
    pyplot = plots()
    if pyplot is None:
        return []
    points, curves = folder / "points.png", folder / "curves.png"
    figure, axes = pyplot.subplots(1, len(shown) + 1, figsize=(3.2 * len(shown) + 3.2, 3.4), constrained_layout=True)
    for axis, (name, x) in zip(axes, {**shown, "data": data}.items(), strict=True):
        axis.scatter(*x.T, s=2)
        axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", title=name)
    figure.savefig(points, dpi=110)
    pyplot.close(figure)
    panels = (("energy", "energy distance x 1000, 1 step"), ("spread", "spread, 1 step"), ("grad_norm", "gradient norm x M"))
    figure, axes = pyplot.subplots(1, 4, figsize=(15, 3.6), constrained_layout=True)
    for axis, (name, title) in zip(axes, (*panels, ("matched_share", "matched pairs' share of the gradient")), strict=True):
        for i, k in enumerate(dict.fromkeys(row["k"] for row in rows)):
            for seed in dict.fromkeys(row["seed"] for row in rows if row["k"] == k):
                own = [row for row in rows if (row["k"], row["seed"]) == (k, seed)]
                values = [row[name] * (row["particles"] if name == "grad_norm" else 1) for row in own]
                label = f"k = {k}" if seed == own[0]["seed"] == 0 else None
                axis.plot([row["particles"] for row in own], values, marker="o", markersize=4, color=f"C{i}", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(FULL.particles, list(map(str, FULL.particles)))
        axis.set(xlabel="M", title=title)
        axis.set_ylim(bottom=0)
        axis.grid(True, alpha=0.25)
    axes[0].legend(fontsize=8)
    figure.savefig(curves, dpi=110)
    pyplot.close(figure)
    return [
        (points, "Samples of one step at the widest gap: one particle shrinks towards the mean, more do not."),
        (
            curves,
            "Over M, a line a seed: energy distance, spread, gradient norm times M, matched pairs' share of the gradient.",
        ),
    ]


STUDY = Study("Particles: what M is worth, and where", run)
