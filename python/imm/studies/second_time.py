"""A network needs the time s that it jumps to, to be good in one step and in many of one deterministic sampler.

Without s a jump is x - (t - s) v(x, t): many steps are exact where v is the velocity, one step where v is the mean velocity to
s = 0, and on curved trajectories these differ. A ring of 8 Gaussians. Least squares on pairs of the exact flow map shows what
the network can represent, without a loss to blame; flow matching, consistency training and IMM follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm.evaluation import energy_distance
from imm.flow_map import FlowMap
from imm.objectives import IMM, Consistency, FlowMatching, Objective
from imm.sampling import initial_state, pushforward, restart, time_grid
from imm.studies import toys
from imm.studies.capacity import SIGMA, mixtures
from imm.studies.study import Criterion, Result, Study, markdown, plots

STEPS, BATCH, INTERVALS = (1, 2, 4, 8, 16, 64), 512, 64
#: What is trained, and whether it is given s; "to s = 0" is a consistency model, of one target time.
SQUARES, TO_ZERO, FLOW, CONSISTENCY, MOMENTS = "least squares", "least squares to s = 0", "flow matching", "consistency", "IMM"
MODELS = (
    *((SQUARES, True), (SQUARES, False), (TO_ZERO, False), (FLOW, False), (CONSISTENCY, False)),
    *((MOMENTS, True), (MOMENTS, False)),
)
BOUND = "best straight line, no training"
_COLUMNS = (
    *(("training", "training"), ("s", "s"), ("sampler", "sampler"), ("steps", "steps"), ("energy", "energy distance x 1000")),
    *(("rms", "RMS to the exact map"), ("rms_over_s", "RMS of jumps from t_max over all s")),
)


@dataclass
class _Plan:
    """Training steps of each kind (those without are left out), trajectories for least squares, points that are scored."""

    steps: dict[str, int] = field(default_factory=lambda: {SQUARES: 1200, TO_ZERO: 1200})
    paths: int = 8192
    points: int = 4000

    @property
    def models(self) -> list[tuple[str, bool]]:
        return [model for model in MODELS if model[0] in self.steps]


QUICK = _Plan()
FULL = _Plan({**QUICK.steps, FLOW: 2000, CONSISTENCY: 2000, MOMENTS: 4000})


class _Ring:
    """The data, exact trajectories ``bank`` ``[INTERVALS + 1, paths, 2]`` float64 at ``times``, and the scores."""

    def __init__(self, plan: _Plan) -> None:
        self.mixture, self.plan = mixtures()["ring of 8"], plan
        generator = torch.Generator().manual_seed(0)
        self.data, self.again = (self.mixture.sample(plan.points, generator) for _ in range(2))
        like = toys.flow_map(2)
        self.times = torch.linspace(like.t_max, like.t_min, INTERVALS + 1, dtype=torch.float64)
        bank = [SIGMA * torch.randn(plan.paths, 2, dtype=torch.float64, generator=generator)]
        for t, s in itertools.pairwise(self.times):
            bank.append(self.flow(bank[-1], t, s, 8))
        self.bank = torch.stack(bank)
        self.z = initial_state(like, range(plan.points), (2,))
        self.exact = self.flow(self.z.double(), self.times[0], self.times[-1], 200)

    def flow(self, x: Tensor, t: Tensor, s: Tensor, substeps: int) -> Tensor:
        return self.mixture.flow(x, t.expand(len(x), 1), s.expand(len(x), 1), substeps)

    def energy(self, x: Tensor) -> float:
        return 1000 * energy_distance(x, self.data)

    def scores(self, x: Tensor) -> dict[str, float]:
        """Of samples from the noise z."""
        return {"energy": self.energy(x), "rms": rms(x - self.exact)}

    def over_s(self, jumps: Tensor) -> float:
        """RMS error of jumps ``[INTERVALS, paths, 2]`` from t_max to every later time."""
        return rms(jumps - self.bank[1:])

    def pairs(self, model: FlowMap, to_zero: bool, generator: torch.Generator) -> Tensor:
        """The mean squared error of jumps between two times of the same trajectory, the later time before."""
        i = torch.randint(0, INTERVALS, (BATCH,), generator=generator)
        further = 1 + (torch.rand(BATCH, generator=generator) * (INTERVALS - i)).long()
        j = torch.full_like(i, INTERVALS) if to_zero else (i + further).clamp(max=INTERVALS)
        path = torch.randint(0, self.plan.paths, (BATCH,), generator=generator)
        jumped = model(self.bank[i, path].float(), self.times[i], self.times[j])
        return (jumped - self.bank[j, path].float()).square().sum(1).mean()

    def straight(self) -> Tensor:
        """The jumps x - (t - s) v from t_max of the best v that does not depend on s, ``[INTERVALS, paths, 2]``."""
        start, gaps = self.bank[0], (self.times[0] - self.times[1:])[:, None, None]
        v = (gaps * (start - self.bank[1:])).sum(0) / gaps.square().sum(0)
        return start - gaps * v

    def trained(self, kind: str, given_s: bool) -> FlowMap:
        model, steps = toys.flow_map(2, given_s=given_s), self.plan.steps[kind]
        if kind in (SQUARES, TO_ZERO):
            return toys.train(model, lambda _, generator: self.pairs(model, kind == TO_ZERO, generator), steps)[0]
        stage = max(1, steps // 8)
        objective: Objective = {
            FLOW: lambda: FlowMatching(model),
            CONSISTENCY: lambda: Consistency(model, stage_steps=stage, stages=5),
            MOMENTS: lambda: IMM(model, particles=16, k=5, a=1),
        }[kind]()
        return toys.fit(objective, lambda generator: self.mixture.sample(BATCH, generator), steps)

    def sample(self, model: FlowMap, sampler: str, steps: int) -> Tensor:
        """From the noise z."""
        times = time_grid(model, steps)
        if sampler == "restart":
            return restart(model, self.z, times, seeds=range(len(self.z)))
        return pushforward(model, self.z, times)

    @torch.no_grad()
    def jumps(self, model: FlowMap) -> Tensor:
        """One jump of each trajectory's start to every later time, ``[INTERVALS, paths, 2]``."""
        start = self.bank[0].float()
        return torch.stack([model(start, self.times[0], s) for s in self.times[1:]])


def rms(difference: Tensor) -> float:
    """Root of the mean squared length of ``[..., 2]``."""
    return float(difference.double().square().sum(-1).mean().sqrt())


def run(folder: Path, quick: bool, device: torch.device, say: Callable[[str], None]) -> Result:
    """Train, sample and score, on the CPU; quick: least squares alone."""
    ring = _Ring(QUICK if quick else FULL)
    line = ring.straight()
    rows = [
        {"training": "exact flow map", **ring.scores(ring.exact)},
        {"training": "data again", "energy": ring.energy(ring.again)},
        {"training": BOUND, "s": "hidden", "sampler": "pushforward", "steps": 1, **ring.scores(line[-1, : ring.plan.points])},
    ]
    rows[-1] |= {"rms": rms(line[-1] - ring.bank[-1]), "rms_over_s": ring.over_s(line)}
    models = {}
    for kind, given_s in ring.plan.models:
        model = models[kind, given_s] = ring.trained(kind, given_s)
        for sampler in ("pushforward", "restart") if kind in (TO_ZERO, CONSISTENCY) else ("pushforward",):
            of = {"training": kind, "s": "given" if given_s else "hidden", "sampler": sampler}
            own: list[dict[str, Any]] = [{**of, "steps": n, **ring.scores(ring.sample(model, sampler, n))} for n in STEPS]
            if kind in (SQUARES, MOMENTS):
                own[0]["rms_over_s"] = ring.over_s(ring.jumps(model))
            rows += own
            energies = ", ".join(f"{row['energy']:.2f} in {row['steps']}" for row in own)
            say(f"{kind}, s {of['s']}, {sampler}: energy distance x 1000 {energies} steps")
    return Result(rows, criteria(rows), _COLUMNS, _figures(folder, ring, rows, models), _TEXT, summary(rows))


_TEXT = (
    "A jump from t to s is x - (t - s) v. A network that does not see s has one v for every s, and its jumps lie on a straight "
    "line; the trajectory is curved. Many steps need the velocity as v, one step the mean velocity to s = 0. The line with the "
    "least error over all s is known in closed form, and least squares without s ends on it. Given s, the same network follows "
    "the curve after the same number of training steps.",
    "By a deterministic sampler (pushforward) only a network that is given s is good in one step and in many: flow matching "
    "needs many, a consistency model is at its best in one.",
    "What does not hold: in two steps a hidden s costs nothing. A consistency model sampled by restart, with fresh noise "
    "before each step, is good in one step and in many. What it gives up is the map: a seed's sample changes with the number "
    "of steps, as its RMS distance says.",
)


def criteria(rows: Sequence[dict[str, Any]]) -> list[Criterion]:
    """What must hold, of what was trained."""
    found = {(row["training"], row["s"], row["steps"]): row for row in rows if row.get("sampler") == "pushforward"}
    energy = lambda kind, s, steps: float(found[kind, s, steps]["energy"])
    worse = {(kind, s): max(energy(kind, s, 1), energy(kind, s, STEPS[-1])) for kind, s, steps in found if kind != BOUND}
    hidden = min(value for (_, s), value in worse.items() if s == "hidden")
    over_s = found[SQUARES, "hidden", 1]["rms_over_s"] / found[BOUND, "hidden", 1]["rms_over_s"]
    one = energy(SQUARES, "hidden", 1)
    many = f"energy distance x 1000, the larger of 1 and {STEPS[-1]} steps"
    checks = [
        Criterion(
            "least squares: energy distance of one step, s hidden over s given", one / energy(SQUARES, "given", 1), low=8
        ),
        Criterion(
            "least squares, s hidden: energy distance of one step over the bound's", one / energy(BOUND, "hidden", 1), 0.8, 1.25
        ),
        Criterion("least squares, s hidden: RMS error over all s, over the bound's", over_s, 1, 1.25),
        Criterion(f"least squares, s given: {many}", worse[SQUARES, "given"], high=4),
        Criterion(f"the best of what does not see s: {many}", hidden, low=8),
    ]
    if (MOMENTS, "given") in worse:
        ratio = energy(MOMENTS, "hidden", 1) / energy(MOMENTS, "given", 1)
        checks.append(Criterion("IMM: energy distance of one step, s hidden over s given", ratio, low=2))
    return checks


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Energy distance over steps, in Markdown."""
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        if "steps" in row:
            name = f"{row['training']}, s {row['s']}" + (", restart" if row["sampler"] == "restart" else "")
            lines.setdefault(name, {})[row["steps"]] = f"{row['energy']:.2f}"
    header = ["energy distance x 1000 in steps", *map(str, STEPS)]
    return markdown(header, [[name, *(cells.get(steps, "") for steps in STEPS)] for name, cells in lines.items()])


def _figures(
    folder: Path, ring: _Ring, rows: Sequence[dict[str, Any]], models: dict[tuple[str, bool], FlowMap]
) -> list[tuple[Path, str]]:
    pyplot = plots()
    if pyplot is None:
        return []
    shown = [(kind, given_s) for kind in (SQUARES, MOMENTS) for given_s in (False, True) if (kind, given_s) in models]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(3.6 * len(shown), 3.7), constrained_layout=True)
    paths = torch.linspace(0, 60, 12).long()
    for axis, (kind, given_s) in zip(axes, shown, strict=True):
        axis.scatter(*ring.data[:1500].T, s=1, color="0.8")
        jumped = torch.cat([ring.bank[:1, paths], ring.jumps(models[kind, given_s])[:, paths]])
        for path in range(len(paths)):
            axis.plot(*ring.bank[:, paths[path]].T, color="0.2", linewidth=0.8)
            axis.plot(*jumped[:, path].T, color="C3", linewidth=1.2)
        axis.plot(*jumped[-1].T, "o", color="C3", markersize=4)
        axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", title=f"{kind}, s {'given' if given_s else 'hidden'}")
    trajectories, curves = folder / "trajectories.png", folder / "curves.png"
    figure.savefig(trajectories, dpi=110)
    pyplot.close(figure)
    figure, axis = pyplot.subplots(figsize=(7.5, 4.2), constrained_layout=True)
    lines = dict.fromkeys(
        (row["training"], row["s"], row["sampler"]) for row in rows if row.get("steps") and row["training"] != BOUND
    )
    for i, (kind, s, sampler) in enumerate(lines):
        own = [row for row in rows if (row["training"], row.get("s"), row.get("sampler")) == (kind, s, sampler)]
        style = "-" if s == "given" else ":" if sampler == "restart" else "--"
        name = f"{kind}, s {s}" + (", restart" if sampler == "restart" else "")
        axis.loglog(
            [r["steps"] for r in own], [max(r["energy"], 0.1) for r in own], style, marker="o", color=f"C{i}", label=name
        )
    axis.set_xticks(STEPS, list(map(str, STEPS)), minor=False)
    axis.minorticks_off()
    axis.set(xlabel="steps", ylabel="energy distance x 1000 (0.1: none seen)")
    axis.grid(True, alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(curves, dpi=110)
    pyplot.close(figure)
    return [
        (trajectories, "Where one jump from t_max lands for every s (red), beside the exact trajectory (black). A dot: s = 0."),
        (curves, "Energy distance over steps. Solid: s given. Dashed: hidden. Dotted: a consistency model with fresh noise."),
    ]


STUDY = Study("The second time: the same network with and without s", run)
