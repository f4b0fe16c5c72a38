"""The losses side by side: one network, one data set, one budget, one protocol; only the loss differs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imm import checkpoints
from imm.data import ImageData, mnist_5k
from imm.evaluation import PixelReference, evaluate, picture_set
from imm.evaluation.evaluate import load_networks
from imm.files import write_text
from imm.flow_map import FlowMap
from imm.networks import UNet
from imm.objectives import OBJECTIVES, SAMPLED_BY, Objective
from imm.pictures import grid, save_picture
from imm.sampling import Sampler
from imm.studies.study import Criterion, Result, Study, markdown, plots
from imm.training import TrainConfig, Trainer
from imm.training.stats import STATS_FILE, read_rows

RESOLUTION, SAMPLES, STEPS = 16, 1000, 3000
EVALUATIONS = (1, 2, 4, 8)
#: Of a velocity, which needs more.
MORE = (16, 32, 64)
#: A run's own settings beside its class's defaults: the best of what was tried on this data.
SETTINGS: dict[str, dict[str, Any]] = {
    "imm": {"particles": 4, "k": 12, "a": 1},
    "fm": {},
    "consistency": {"stages": 5},
    "shortcut": {},
    "progressive": {},
    "lagrangian": {},
    "meanflow": {},
    "energy": {},
}
#: Of the flow map, likewise.
FLOW_MAPS: dict[str, dict[str, Any]] = {"meanflow": {"time_scale": 1.0}}
ROWS_FILE = "rows.jsonl"
#: Where its package is installed: at the end of training, of these numbers of evaluations.
FD, FD_EVALUATIONS = "fd-efficientnet-lite0", (1, 4, max(MORE))
_COLUMNS = (
    *(("loss", "loss"), ("seed", "seed"), ("step", "training steps"), ("seconds", "training seconds"), ("method", "sampler")),
    *(("evaluations", "evaluations"), ("label_match", "label match"), ("spread", "spread"), ("mmd", "MMD"), ("fd", "FD")),
)


@dataclass
class _Plan:
    """What of the study is run: a few steps of a few losses where it is quick.

    seeds: of every loss. again: further seeds of the losses in ``contest``, whose ranking they check.
    """

    losses: Sequence[str]
    seeds: Sequence[int]
    steps: int
    every: int
    samples: int
    more: Sequence[int] = field(default=MORE)
    contest: Sequence[str] = ()
    again: Sequence[int] = ()

    def seeds_of(self, loss: str) -> Sequence[int]:
        return (*self.seeds, *self.again) if loss in self.contest else self.seeds


FULL = _Plan(list(SETTINGS), (0,), STEPS, 500, SAMPLES, contest=("imm", "shortcut", "progressive"), again=(1, 2))
SHORT = _Plan(("imm", "fm", "shortcut"), (0,), 1500, 500, SAMPLES)
QUICK = _Plan(("imm", "fm", "shortcut"), (0,), 60, 60, 100, (16,))


def objective_of(loss: str, seed: int, steps: int, device: torch.device) -> Objective:
    """The study's network with fresh weights and a loss; of one seed, all losses begin with the same weights."""
    torch.manual_seed(seed)
    flow_map = FlowMap(UNet(channels=1, resolution=RESOLUTION, num_classes=10), **FLOW_MAPS.get(loss, {}))
    stages = {"stage_steps": max(1, steps // 8)} if loss == "consistency" else {}
    return OBJECTIVES[loss](flow_map.to(device), **SETTINGS[loss], **stages)


def run(folder: Path, quick: bool, device: torch.device, say: Callable[[str], None]) -> Result:
    """Train what is missing, score what is not scored."""
    return _run(QUICK if quick else FULL, folder, device, say)


def short(folder: Path, device: torch.device, say: Callable[[str], None]) -> Result:
    """The same for three losses, one seed and half of the steps."""
    return _run(SHORT, folder, device, say)


def _run(plan: _Plan, folder: Path, device: torch.device, say: Callable[[str], None]) -> Result:
    data = mnist_5k(RESOLUTION)
    reference = _Reference(data, device)
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Tensor]] = []
    for loss in plan.losses:
        for seed in plan.seeds_of(loss):
            out = folder / f"{loss}-{seed}"
            found = read_rows(out / ROWS_FILE)
            if found and found[-1]["step"] != plan.steps:
                raise ValueError(f"out: expected a study of {plan.steps} steps in {folder}, got one of {found[-1]['step']}")
            if not found:
                found = _one(out, loss, seed, plan, data, reference, device, say)
            rows += found
            if seed == plan.seeds[0]:
                shown += _shown(out, loss, plan, device)
    picture = folder / "samples.png"
    save_picture(grid(shown), picture)
    figures = [
        *_curves(folder, rows, plan),
        (picture, f"Samples of the same seeds and classes, one step and four (fm: {max(plan.more)})."),
    ]
    return Result(rows, criteria(rows, plan), _COLUMNS, figures, _text(plan), summary(rows))


def _one(
    out: Path,
    loss: str,
    seed: int,
    plan: _Plan,
    data: ImageData,
    reference: _Reference,
    device: torch.device,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train a loss, or what is left of it, and score its snapshots."""
    config = TrainConfig(
        batch=64, lr=2e-3, warmup=100, ema=0.998, seed=seed, log_every=25, snapshot_every=plan.every, keep_every=plan.every
    )
    trainer = Trainer(objective_of(loss, seed, plan.steps, device), data, out, config)
    trainer.run(plan.steps)
    trainer.close()
    spent = _seconds(out)
    labels = torch.arange(plan.samples) % data.num_classes
    rows = []
    for step in range(plan.every, plan.steps + 1, plan.every):
        flow_map = checkpoints.load(_snapshot(out, step)).to(device)
        last = step == plan.steps
        for count in (*EVALUATIONS, *(plan.more if loss == "fm" else ())) if last else EVALUATIONS[:2]:
            images = sample(flow_map, loss, count, labels)
            scores = reference.pixels.score(images, labels)
            row = {"loss": loss, "seed": seed, "step": step, "images": step * config.batch, "seconds": spent[step]}
            row |= {"method": _method(loss), "evaluations": count}
            row |= {"label_match": scores.label_match, "spread": scores.spread, "mmd": scores.mmd}
            if last and count in FD_EVALUATIONS and plan is FULL:
                row |= reference.distance(images)
            rows.append(row)
        one = next(row for row in rows if row["step"] == step and row["evaluations"] == 1)
        say(f"{loss}, seed {seed}, step {step}: label match {one['label_match']:.1%}, spread {one['spread']:.1%} in one step")
    write_text(out / ROWS_FILE, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


class _Reference:
    """The real digits: pixel scores, and the Frechet distance where its network is at hand."""

    def __init__(self, data: ImageData, device: torch.device) -> None:
        assert data.labels is not None
        self.pixels = PixelReference(data.images, data.labels, data.num_classes)
        self.real, self.device = picture_set(data.images), device
        self.features: dict[str, Any] = {}
        try:
            self.networks = load_networks([FD], None, device)
        except FileNotFoundError:
            self.networks = {}

    def distance(self, images: Tensor) -> dict[str, float]:
        """``{"fd": ...}`` of samples in [-1, 1], or nothing without the network."""
        if not self.networks:
            return {}
        samples = picture_set(images.clamp(-1, 1))
        found = evaluate([FD], samples, self.real, self.networks, device=self.device, of_reference=self.features)
        assert found is not None
        return {"fd": float(found["metrics"][FD])}


def _text(plan: _Plan) -> tuple[str, ...]:
    short = (
        f"The short form: {', '.join(plan.losses)}, one seed, {plan.steps:,} training steps. The long form, imm study losses, "
    )
    long = f"has {len(FULL.losses)} losses, three of them with {len(FULL.again) + 1} seeds, and {FULL.steps:,} steps."
    return (
        *([short + long] if plan is SHORT else ()),
        "One U-Net (169,249 parameters), 5,000 digits at 16x16, 64 images a step, AdamW 2e-3, an average of 0.998, label "
        f"dropout 0.1; {plan.samples:,} samples of the same seeds and classes. Every loss begins with the same weights and "
        "sees the same images in the same order.",
        "Label match: share of samples whose nearest real digit has the class asked for. Spread: pixel deviation inside a "
        "class over the real one. MMD: squared, on raw pixels. A class mean has a label match of 100 % and a spread of 0. FD: "
        "Frechet distance on features of EfficientNet-Lite0 (not FID) to the real digits.",
        "Training seconds are of the machine that ran this, without saves. Equal images are rows of equal steps; for equal "
        "seconds read across the rows of a loss.",
    )


def _snapshot(out: Path, step: int) -> Path:
    return out / f"snapshot-{step:07d}.safetensors"


def _seconds(out: Path) -> dict[int, float]:
    """Seconds of training up to the step of each row, without saves."""
    total, found = 0.0, {}
    for row in read_rows(out / STATS_FILE):
        total += sum(seconds for name, seconds in row["phases"].items() if name not in ("save", "watch"))
        found[row["step"]] = round(total, 2)
    return found


def _method(loss: str) -> str:
    return SAMPLED_BY.get(loss, "pushforward")


def sample(flow_map: FlowMap, loss: str, steps: int, labels: Tensor) -> Tensor:
    """Images of seeds 0, 1, ... with the labels, by the method that belongs to the loss; on the CPU."""
    sampler = Sampler(flow_map, steps=steps, method=_method(loss), rows=min(250, len(labels)))
    return sampler.sample(range(len(labels)), labels).cpu()


def _shown(out: Path, loss: str, plan: _Plan, device: torch.device) -> list[tuple[str, Tensor]]:
    flow_map = checkpoints.load(_snapshot(out, plan.steps)).to(device)
    many = max(plan.more) if loss == "fm" else 4
    return [(f"{loss}, {n}", sample(flow_map, loss, n, torch.arange(10))) for n in (1, many)]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A line a loss at the end of training: label match, spread and MMD over evaluations, in Markdown."""
    last = max(row["step"] for row in rows)
    final = [row for row in rows if row["step"] == last and row["seed"] == rows[0]["seed"]]
    counts = sorted({row["evaluations"] for row in final})
    lines = []
    for loss in dict.fromkeys(row["loss"] for row in final):
        own = {row["evaluations"]: row for row in final if row["loss"] == loss}
        cells = [
            f"{own[n]['label_match']:.0%} / {own[n]['spread']:.0%} / {own[n]['mmd'] * 1000:.1f}" if n in own else ""
            for n in counts
        ]
        lines.append([f"`{loss}`", *cells])
    return markdown(["", *(str(n) for n in counts)], lines) + distances_table(final) + seeds_table(rows)


def distances_table(final: Sequence[dict[str, Any]]) -> str:
    """FD over evaluations; empty without any."""
    found = {(row["loss"], row["evaluations"]): row["fd"] for row in final if "fd" in row}
    if not found:
        return ""
    counts = sorted({count for _, count in found})
    cell = lambda loss, count: f"{found[loss, count]:.1f}" if (loss, count) in found else ""
    lines = [[f"`{loss}`", *(cell(loss, count) for count in counts)] for loss in dict.fromkeys(loss for loss, _ in found)]
    return "\n" + markdown(["FD", *map(str, counts)], lines)


def seeds_table(rows: Sequence[dict[str, Any]]) -> str:
    """One step of the losses that were trained more than once, a column a seed, and the order by MMD; empty without any."""
    last = max(row["step"] for row in rows)
    one = {(row["loss"], row["seed"]): row for row in rows if row["step"] == last and row["evaluations"] == 1}
    seeds = sorted({seed for _, seed in one})
    contest = [loss for loss in dict.fromkeys(loss for loss, _ in one) if all((loss, seed) in one for seed in seeds)]
    if len(seeds) < 2:
        return ""
    cell = lambda row: f"{row['label_match']:.0%} / {row['spread']:.0%} / {row['mmd'] * 1000:.1f}"
    lines = [[f"`{loss}`", *(cell(one[loss, seed]) for seed in seeds)] for loss in contest]
    order = []
    for seed in seeds:
        mmd = {loss: one[loss, seed]["mmd"] for loss in contest}
        order.append(" < ".join(sorted(mmd, key=mmd.__getitem__)))
    return "\n" + markdown(["one step", *(f"seed {seed}" for seed in seeds)], [*lines, ["order by MMD", *order]])


def criteria(rows: Sequence[dict[str, Any]], plan: _Plan) -> list[Criterion]:
    """What the table must show; nothing of a quick run, whose networks have learned nothing yet."""
    if plan is QUICK:
        return []
    one = {(row["loss"], row["evaluations"]): row for row in rows if row["step"] == plan.steps and row["seed"] == plan.seeds[0]}
    if plan is SHORT:
        mmd = lambda loss, count: float(one[loss, count]["mmd"])
        falls = min(mmd("fm", count) / mmd("fm", 2 * count) for count in EVALUATIONS[:-1])
        return [
            Criterion("fm, one step is the class blur: spread", one["fm", 1]["spread"], high=0.4),
            Criterion("fm, one step: MMD", mmd("fm", 1), low=0.05),
            Criterion("imm, one step: spread", one["imm", 1]["spread"], low=0.6),
            Criterion("imm, one step: MMD", mmd("imm", 1), high=0.02),
            Criterion("MMD of imm in two steps over that of fm in four", mmd("imm", 2) / mmd("fm", 4), high=1),
            Criterion("fm: MMD over that in twice the steps, the least of 1, 2 and 4", falls, low=1),
        ]
    many = max(plan.more)
    # Of the losses that learn jumps from themselves, the best one by the smaller margin over both bounds.
    margin = lambda loss: min(one[loss, 1]["label_match"] / 0.8, one[loss, 1]["spread"] / 0.6)
    best = max(("consistency", "shortcut", "progressive"), key=margin)
    return [
        Criterion("imm, one step: label match", one["imm", 1]["label_match"], low=0.8),
        Criterion("imm, one step: spread", one["imm", 1]["spread"], low=0.6),
        Criterion(
            f"{best}, the best of consistency, shortcut, progressive, one step: label match", one[best, 1]["label_match"], 0.8
        ),
        Criterion(f"{best}, one step: spread", one[best, 1]["spread"], low=0.6),
        Criterion("fm, one step is the class blur: spread", one["fm", 1]["spread"], high=0.4),
        Criterion(f"fm, {many} evaluations: spread", one["fm", many]["spread"], low=0.6),
    ]


def _curves(folder: Path, rows: Sequence[dict[str, Any]], plan: _Plan) -> list[tuple[Path, str]]:
    pyplot = plots()
    if pyplot is None:
        return []
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    for loss in plan.losses:
        own = [row for row in rows if row["loss"] == loss and row["seed"] == plan.seeds[0]]
        final = [row for row in own if row["step"] == plan.steps]
        single = [row for row in own if row["evaluations"] == 1]
        axes[0].plot([r["evaluations"] for r in final], [r["mmd"] for r in final], marker="o", label=loss)
        axes[1].plot([r["images"] for r in single], [r["mmd"] for r in single], marker="o", label=loss)
        axes[2].plot([r["seconds"] for r in single], [r["mmd"] for r in single], marker="o", label=loss)
    axes[0].set(xlabel="evaluations of the network", ylabel="MMD", xscale="log", title="after training")
    axes[1].set(xlabel="training images", ylabel="MMD in one step", title="at equal images")
    axes[2].set(xlabel="training seconds", ylabel="MMD in one step", title="at equal seconds")
    for axis in axes:
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.grid(True, alpha=0.25)
    axes[0].legend(fontsize=8)
    target = folder / "curves.png"
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return [(target, "MMD to the real digits, lower is better: over evaluations, images and seconds.")]


STUDY = Study("The losses of the family, side by side", run, short)
