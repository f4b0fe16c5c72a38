"""Watching a run: a log, pictures of samples, scores of the average."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imm import pictures
from imm.backends import repeatable
from imm.checkpoints.format import CheckpointError, read_settings
from imm.evaluation.evaluate import METRICS, Features, ReferenceStatistics, check, evaluate, gathered, load_networks, split_of
from imm.evaluation.sets import PictureSet, picture_set
from imm.files import replacing
from imm.flow_map import FlowMap
from imm.objectives import SAMPLED_BY
from imm.sampling import Sampler
from imm.training.log import Log, check_log, open_log, scalars_of
from imm.training.stats import STATS_FILE, append, read_rows, trim

if TYPE_CHECKING:
    from imm.training.trainer import Trainer

SCORES_FILE = "scores.jsonl"
BEST_FILE = "best.safetensors"
#: Of pictures: "samples-0000500.png".
SAMPLES = "samples"


@dataclass(frozen=True)
class Scoring:
    """How the average is scored while it trains, by the protocol of ``imm eval``.

    Attributes:
        metrics: of :data:`imm.evaluation.evaluate.METRICS`. The first that is one number decides which snapshot is the best.
        reference: what samples are compared with. split: of the reference, for the record.
        every: steps between scores, a multiple of ``snapshot_every``; the last step is scored too.
        images: samples, of seeds 0, 1, ... with the classes in order. weights: of Inception, for ``fid`` and its kind.
    """

    metrics: Sequence[str]
    reference: PictureSet | ReferenceStatistics
    every: int
    images: int
    split: str | None = None
    weights: str | None = None


class Watch:
    """Logs rows, draws samples and scores the average of a run at its saves.

    Args:
        log: "tensorboard" or "wandb", or None. grid: (columns, rows) of the picture of samples that every save leaves, or None.
        scoring: or None for no scores. steps: numbers of sampling steps, of pictures and scores; the first decides which
            snapshot is the best. batch: images a call of the sampler and of a feature network.
        say: called with a line for each score.

    Pictures and scores are of the average, by the method that belongs to the loss (:data:`imm.objectives.SAMPLED_BY`) on a
    uniform grid of times, without guidance. They take no random numbers from training.
    """

    def __init__(
        self,
        *,
        log: str | None = None,
        grid: tuple[int, int] | None = None,
        scoring: Scoring | None = None,
        steps: Sequence[int] = (1, 2),
        batch: int = 64,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._kind, self._grid, self._scoring = log, grid, scoring
        self._steps, self._batch, self._say = list(steps), batch, say
        self._log: Log | None = None
        self._of_reference: dict[str, Features] = {}

    @property
    def scores(self) -> bool:
        """Whether the average is scored."""
        return self._scoring is not None

    def check(self, trainer: Trainer) -> None:
        """Look at what is asked for before the run begins, in each of its processes.

        Raises:
            ValueError: pictures or scores of latents, metrics that the reference does not allow.
        """
        flow_map, scoring = trainer.objective.flow_map, self._scoring
        if self._kind is not None:
            check_log(self._kind)
        if (self._grid or scoring) and flow_map.image_shape[0] not in (1, 3):
            raise ValueError(f"{'eval' if scoring else 'grid'}: expected pictures, got latents {list(flow_map.image_shape)}")
        if scoring is not None:
            if scoring.every % trainer.config.snapshot_every:
                raise ValueError(
                    f"eval_every: expected a multiple of snapshot_every = {trainer.config.snapshot_every}, got {scoring.every}"
                )
            classes = flow_map.num_classes
            labels = torch.arange(scoring.images) % classes if classes else None
            some = torch.zeros((), dtype=torch.uint8).expand(scoring.images, *flow_map.image_shape)
            check(scoring.metrics, PictureSet(some, labels, classes, "samples"), scoring.reference)
            self._networks = load_networks(scoring.metrics, scoring.weights, trainer.device)

    def begin(self, trainer: Trainer) -> None:
        """Bring the run's files to the step of its state, and open the log, in the first of its processes.

        Raises:
            ValueError: a log whose package is not installed; a file of scores that is none.
        """
        out = trainer.out
        trim(out / SCORES_FILE, trainer.resumed_from)
        if self._scoring is not None:
            self._keep_best(trainer)
        for path in out.glob(f"{SAMPLES}-*.png"):  # of a killed run, after its last state
            number = path.stem.removeprefix(f"{SAMPLES}-")
            if number.isdigit() and int(number) > trainer.step:
                path.unlink()
        if self._kind is not None:
            self._log = open_log(self._kind, out, trainer.resumed_from, trainer.settings)
            if self._log.replays:
                self._replay(out)

    def _replay(self, out: Path) -> None:
        """Log what the files of the run have."""
        scores = read_rows(out / SCORES_FILE)
        for row in read_rows(out / STATS_FILE):
            self.row(row)
            for score in scores:
                if score["step"] == row["step"]:
                    self._log_score(score)
            path = _picture_path(out, row["step"])
            if self._log is not None and path.exists():
                self._log.picture(row["step"], SAMPLES, pictures.decode(path.read_bytes(), str(path)))

    def row(self, row: dict[str, Any]) -> None:
        """A row of statistics."""
        if self._log is not None:
            self._log.scalars(row["step"], scalars_of({name: row[name] for name in row if name not in ("step", "t_bins")}))

    def saving(self, trainer: Trainer, *, last: bool) -> None:
        """A state is about to be written, the ``last`` of the run or not: pictures and scores come before it, so that a resumed
        run makes again what a killed one did not."""
        scoring = self._scoring if self._scoring is not None and (trainer.step % self._scoring.every == 0 or last) else None
        if self._grid is None and scoring is None:
            return
        average = trainer.ema_flow_map
        if self._grid is not None and trainer.writes:
            self._draw(trainer, average, *self._grid)
        if scoring is not None:
            self._score(trainer, average, scoring)

    def flush(self) -> None:
        """Hand everything to the log: a run that is killed from here on resumes after it."""
        if self._log is not None:
            self._log.flush()

    def saved(self, trainer: Trainer) -> None:
        """A state and its snapshot were written."""
        if trainer.writes and self._scoring is not None:
            self._keep_best(trainer)

    def close(self) -> None:
        """End the log."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _draw(self, trainer: Trainer, average: FlowMap, columns: int, lines: int) -> None:
        rows: list[tuple[str, Tensor]] = []
        for steps in self._steps:
            images = self._sample(trainer, average, steps, range(columns * lines))
            rows += [(in_steps(steps) if i == 0 else "", part) for i, part in enumerate(images.split(columns))]
        picture = pictures.grid(rows)
        if self._log is not None:
            self._log.picture(trainer.step, SAMPLES, picture)
        pictures.save_picture(picture, _picture_path(trainer.out, trainer.step))

    def _sample(self, trainer: Trainer, flow_map: FlowMap, steps: int, seeds: range, of: int | None = None) -> Tensor:
        """Images of seeds, the classes in order, in the batches of ``imm sample``; ``of``: how many all processes make."""
        method = SAMPLED_BY.get(trainer.objective.name, "pushforward")
        rows = min(self._batch, of or len(seeds))
        classes = flow_map.num_classes
        parts = []
        with repeatable(tf32=False):
            sampler = Sampler(flow_map, steps=steps, rows=rows, method=method)
            for start in range(seeds.start, seeds.stop, rows):
                some = range(start, min(start + rows, seeds.stop))
                labels = torch.tensor(some) % classes if classes else None
                parts.append(sampler.sample(some, labels).cpu())
        return torch.cat(parts) if parts else torch.empty(0, *flow_map.image_shape)

    def _score(self, trainer: Trainer, average: FlowMap, scoring: Scoring) -> None:
        flow_map = trainer.objective.flow_map
        for steps in self._steps:
            start = time.perf_counter()
            share = split_of(scoring.images, *trainer.place)
            own = pictures.to_uint8(self._sample(trainer, average, steps, range(share.start, share.stop), scoring.images))
            pixels = gathered(own, scoring.images) if trainer.place[1] > 1 else own
            classes = flow_map.num_classes
            labels = torch.arange(scoring.images) % classes if classes else None
            samples = picture_set(pixels, labels, f"samples in {in_steps(steps)} of the average of step {trainer.step}")
            result = evaluate(
                scoring.metrics,
                samples,
                scoring.reference,
                self._networks,
                device=trainer.device,
                batch=self._batch,
                split=scoring.split,
                of_reference=self._of_reference,
            )
            if result is None:
                continue
            seconds = time.perf_counter() - start
            row = {"step": trainer.step, "sampling_steps": steps, "seconds": seconds, **result}
            append(trainer.out / SCORES_FILE, row)
            self._log_score(row)
            values = ", ".join(f"{name} {value:.5g}" for name, value in result["metrics"].items())
            self._say(f"step {trainer.step}, {in_steps(steps)}: {values} ({scoring.images} images, {seconds:.1f} s)")

    def _log_score(self, row: dict[str, Any]) -> None:
        if self._log is not None:
            values = {**row["metrics"], "seconds": row["seconds"]}
            of = in_steps(row["sampling_steps"])
            self._log.scalars(row["step"], {f"scores/{of}/{name}": value for name, value in values.items()})

    def _keep_best(self, trainer: Trainer) -> None:
        """Copy the snapshot of the step under way if it is the best one scored."""
        best = best_of(trainer.out)
        if best is None or best["step"] != trainer.step:
            return
        target = trainer.out / BEST_FILE
        try:
            if read_settings(target, "flow_map")["extra"]["step"] == trainer.step:
                return
        except (CheckpointError, KeyError, TypeError):
            pass
        with replacing(target) as part:
            shutil.copyfile(trainer.snapshot_path, part)


def best_of(folder: Path) -> dict[str, Any] | None:
    """The row of the best score in a run's folder: of its first number of steps, by the first metric that is one number."""
    rows = read_rows(folder / SCORES_FILE)
    found = [row for row in rows if row["sampling_steps"] == rows[0]["sampling_steps"]]
    name = next((name for row in found[:1] for name in row["metrics"] if name in METRICS), None)
    if name is None:
        return None
    sign = -1.0 if METRICS[name].kind in ("is", "label-match") else 1.0
    known = [row for row in found if math.isfinite(row["metrics"].get(name, math.nan))]
    return min(known, key=lambda row: (sign * row["metrics"][name], row["step"]), default=None)


def _picture_path(out: Path, step: int) -> Path:
    return out / f"{SAMPLES}-{step:07d}.png"


def in_steps(steps: int) -> str:
    """A number of sampling steps in words."""
    return f"{steps} step{'s' if steps > 1 else ''}"
