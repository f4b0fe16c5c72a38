"""``imm demo``: train, sample, score and report once, on real digits, with a verdict."""

from __future__ import annotations

import html
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch
from torch import Tensor

from imm import checkpoints
from imm.cli import progress
from imm.cli.doctor import op_lines
from imm.cli.options import device_line, pick_device, writable_folder
from imm.cli.report import ENVIRONMENT_FILE, image, page, write_environment
from imm.cli.report import table as html_table
from imm.data import ImageData, mnist_5k
from imm.evaluation import PixelReference, PixelScores
from imm.files import write_text
from imm.flow_map import FlowMap
from imm.networks import UNet
from imm.objectives import IMM
from imm.pictures import grid, save_picture
from imm.sampling import Sampler
from imm.training import TrainConfig, Trainer, Watch
from imm.training.state import EARLIER, read_state, states_in
from imm.training.stats import STATS_FILE
from imm.training.watch import SAMPLES as PICTURES
from imm.training.watch import in_steps
from imm.version import __version__

RESOLUTION = 16
#: In --out. Not a name that a folder of the user's is likely to have: what a trainer wrote there is removed.
TRAINING_FOLDER = "demo-training"
STEP_COUNTS = (1, 2, 4, 8)
SAMPLES = 1000
#: Least one-step label match and spread, and largest MMD as a share of the class means': blurs of class averages must fail.
LEAST_MATCH, LEAST_SPREAD, LARGEST_MMD_SHARE = 0.80, 0.60, 0.5


def make_objective(seed: int, device: torch.device) -> IMM:
    """The demo's network and objective: OT-FM, Euler-FM, Laplace kernel, M = 4, k = 12, a = 1."""
    torch.manual_seed(seed)
    flow_map = FlowMap(UNet(channels=1, resolution=RESOLUTION, num_classes=10))
    return IMM(flow_map.to(device), particles=4, kernel="laplace", k=12, a=1)


def make_config(seed: int, snapshot_every: int = 500, precision: str = "fp32") -> TrainConfig:
    """The demo's training settings."""
    return TrainConfig(
        batch=64,
        lr=2e-3,
        warmup=100,
        ema=0.998,
        precision=precision,
        seed=seed,
        log_every=25,
        snapshot_every=snapshot_every,
    )


def _remove_run(folder: Path) -> None:
    """Remove what a trainer wrote there, and nothing else."""
    for state in states_in(folder):
        shutil.rmtree(state)
    for name in (EARLIER, STATS_FILE, "snapshot-*.safetensors", f"{PICTURES}-*.png", ENVIRONMENT_FILE):
        for path in folder.glob(name):
            path.unlink()


def resume_is_exact(data: ImageData, seed: int, device: torch.device, precision: str = "fp32", steps: int = 12) -> bool:
    """Whether ``steps`` steps equal a third of them, a stop, and the rest from the saved state, bit for bit."""
    states = []
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in (("whole", [steps]), ("parts", [steps // 3, steps])):
            for until in parts:
                config = make_config(seed, precision=precision)
                trainer = Trainer(make_objective(seed, device), data, Path(folder) / name, config)
                trainer.run(until)
            states.append(read_state(trainer.out))
    (tensors, settings), (other_tensors, other_settings) = states
    for found in (settings, other_settings):
        del found["replaced_step"]  # which saves there were, not what was trained
    same = tensors.keys() == other_tensors.keys() and settings == other_settings
    return same and all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def sample(flow_map: FlowMap, steps: int, labels: Tensor) -> Tensor:
    """Images from seeds 0, 1, ... with the given labels, on the CPU."""
    sampler = Sampler(flow_map, steps=steps)
    starts = range(0, len(labels), 250)
    seeds = (range(start, min(start + 250, len(labels))) for start in starts)
    return torch.cat([sampler.sample(s, labels[s.start : s.stop]).cpu() for s in seeds])


def verdict(one_step: PixelScores, blur: PixelScores) -> list[str]:
    """What is wrong with the one-step samples; empty if nothing is."""
    wrong = []
    if not one_step.label_match >= LEAST_MATCH:
        wrong.append(f"one-step label match {one_step.label_match:.1%} is below {LEAST_MATCH:.0%}")
    if not one_step.spread >= LEAST_SPREAD:
        wrong.append(f"one-step spread {one_step.spread:.1%} is below {LEAST_SPREAD:.0%} of real")
    if not one_step.mmd <= LARGEST_MMD_SHARE * blur.mmd:
        wrong.append(f"one-step MMD {one_step.mmd:.5f} is above half of the class means' {blur.mmd:.5f}")
    return wrong


def table(rows: dict[str, PixelScores]) -> list[str]:
    """The scores as aligned lines."""
    lines = [f"{'':<14}{'label match':>12}{'spread':>10}{'MMD':>11}"]
    for name, scores in rows.items():
        lines.append(f"{name:<14}{scores.label_match:>12.1%}{scores.spread:>10.1%}{scores.mmd:>11.5f}")
    return lines


def _lead(header: Sequence[str], rows: dict[str, PixelScores], picture: Path, wrong: Sequence[str]) -> str:
    """What the demo has to say at the top of its page: verdict, scores, samples, what ran."""
    verdict = "Failed: " + "; ".join(wrong) if wrong else "Passed: one-step digits with the asked labels and real variety."
    lines = [[name, f"{one.label_match:.1%}", f"{one.spread:.1%}", f"{one.mmd:.5f}"] for name, one in rows.items()]
    return f"""<p class="verdict">{html.escape(verdict)}</p>
{html_table(["", "label match", "spread", "MMD"], lines)}
<p>Label match: share of samples whose nearest real image has the requested class. Spread: pixel standard deviation inside a
class, as a share of the real one. MMD: squared, unbiased, on raw pixels. Class means are what blurs would score.</p>
<h2>Samples</h2>
<p>One column per requested class, 0 to 9; the same seeds in every step count.</p>
{image(picture.read_bytes(), "samples in 1, 2, 4 and 8 steps above real digits")}
<pre>{html.escape(chr(10).join(header))}</pre>"""


def run(out: str, steps: int, minutes: float | None, seed: int, precision: str, resume: bool, device: str) -> None:
    """Run ``imm demo``; the arguments are its options."""
    target = pick_device(device)
    data = mnist_5k(RESOLUTION)
    folder = writable_folder(out)
    if states_in(folder) or (folder / EARLIER).exists():
        raise ValueError(f"out: expected a folder without a training run, whose {STATS_FILE} the demo would replace, got {out}")
    objective = make_objective(seed, target)
    count = sum(p.numel() for p in objective.flow_map.network.parameters())
    header = [
        f"imm {__version__} demo on {device_line(target)}",
        *(f"op {line}" for line in op_lines(target)),
        f"data: {data.source}, {RESOLUTION}x{RESOLUTION}, {data.num_classes} classes",
        f"network: UNet, {count:,} parameters; objective: IMM, M = 4, Laplace kernel, k = 12; schedule fm, euler_fm",
        f"plan: {steps} steps of 64 images in {precision}, then "
        f"{SAMPLES} samples in each of {', '.join(map(str, STEP_COUNTS))} steps",
    ]
    click.echo("\n".join(header))
    training = folder / TRAINING_FOLDER
    if not resume:
        _remove_run(training)
    start = time.perf_counter()
    watch = Watch(grid=(10, 2))
    trainer = Trainer(objective, data, training, make_config(seed, precision=precision), watch=watch)
    write_environment(training, device_line(target), 1)
    if trainer.resumed_from is not None:
        click.echo(f"resuming at step {trainer.resumed_from}")
    signal_number = progress.run(trainer, steps, None if minutes is None else 60.0 * minutes)
    if signal_number is not None:
        click.echo(f"stopped by signal {signal_number} at step {trainer.step}; imm demo --resume resumes there")
        raise SystemExit(128 + signal_number)
    train_seconds = time.perf_counter() - start
    checkpoint = folder / "checkpoint.safetensors"
    shutil.copyfile(trainer.snapshot_path, checkpoint)
    shutil.copyfile(training / STATS_FILE, folder / STATS_FILE)
    click.echo(f"trained {trainer.step} steps in {train_seconds:.0f} s; sampling from {checkpoint}")

    flow_map = checkpoints.load(checkpoint).to(target)
    assert data.labels is not None
    reference = PixelReference(data.images, data.labels, data.num_classes)
    labels = torch.arange(SAMPLES) % data.num_classes
    rows: dict[str, PixelScores] = {}
    pictures: list[tuple[str, Tensor]] = []
    for n in STEP_COUNTS:
        images = sample(flow_map, n, labels)
        name = in_steps(n)
        rows[name] = reference.score(images, labels)
        pictures += [(name, images[:10]), ("", images[10:20])]
    by_class = [data.images[data.labels == c] for c in range(data.num_classes)]
    pictures += [("real", torch.stack([c[0] for c in by_class])), ("", torch.stack([c[1] for c in by_class]))]
    rows["class means"] = reference.score_class_means()
    rows["real"] = reference.score_real()
    lines = table(rows)
    click.echo("\n".join(lines))

    exact = resume_is_exact(data, seed, target, precision)
    click.echo(f"resume: 12 steps and 4 + stop + 8 steps are {'equal bit for bit' if exact else 'NOT equal'}")
    wrong = verdict(rows["1 step"], rows["class means"]) + ([] if exact else ["a resumed run differs from an unbroken one"])
    if trainer.step < steps:
        click.echo(f"note: {trainer.step} of {steps} steps were made")
    picture = folder / "samples.png"
    save_picture(grid(pictures), picture)
    summary = {
        "scores": {name: asdict(scores) for name, scores in rows.items()},
        "steps": trainer.step,
        "seed": seed,
        "seconds": train_seconds,
        "resume_exact": exact,
        "wrong": wrong,
    }
    (folder / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_text(folder / "report.html", page("imm demo: real digits", training, _lead(header, rows, picture, wrong)))
    click.echo("FAILED: " + "; ".join(wrong) if wrong else "PASSED: one-step digits with the asked labels and real variety")
    click.echo(f"results: {folder}/ (picture: {picture}, report: {folder / 'report.html'})")
    if wrong:
        raise SystemExit(1)
