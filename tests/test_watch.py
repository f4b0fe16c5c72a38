"""What can be watched of a run: logs, pictures, scores, the best snapshot, where the time goes, the page of a run."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import struct
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from command_line import call
from small import spread
from test_training import CONFIG, assert_same_state, images, unet

from imm import FlowMap, IMMObjective, checkpoints
from imm.cli import progress
from imm.data import ImageData
from imm.evaluation.sets import picture_set
from imm.networks import DiT
from imm.training import Scoring, TrainConfig, Trainer, Watch
from imm.training.log import scalars_of
from imm.training.speed import Clock, flops_of, matmul_rate
from imm.training.stats import STATS_FILE, read_rows
from imm.training.watch import BEST_FILE, SCORES_FILE, best_of

#: All that a run can have.
ALL = dataclasses.replace(
    CONFIG, decay="cosine", decay_steps=20, clip=0.1, max_skipped=2, ema_lengths=(0.05, 0.1), mfu=True, keep_every=8
)


class KilledError(Exception):
    pass


def pixels(count: int = 50) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(
        torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(count) % 3, 3, "x"
    )


def watch(data: ImageData, log: str | None = None, say=lambda line: None) -> Watch:
    scoring = Scoring(["label-match", "mmd-pixels"], picture_set(data.pixels, data.labels), every=4, images=10)
    return Watch(log=log, grid=(5, 2), scoring=scoring, steps=(1, 3), batch=4, say=say)


def run(folder, steps: int, log: str | None = None, config: TrainConfig = ALL, killed_at: int | None = None) -> Trainer:
    """A run with everything on; killed_at: it ends there as a killed one does, without a word to anything."""

    def on_step(step: int) -> None:
        if step == killed_at:
            raise KilledError

    torch.manual_seed(0)
    data = pixels()
    seen = watch(data, log)
    made = Trainer(IMMObjective(FlowMap(unet())), data, folder, config, watch=seen)
    try:
        made.run(steps, on_step=on_step)
        seen.close()
    except KilledError:
        if log == "tensorboard":
            seen._log.flush()  # what a process has written is there when it is killed: here is the worst case, all of it
        if log == "wandb":
            seen._log._run.finish()  # ends W&B's own process
    made.close()
    return made


def scored(folder) -> list[tuple]:
    return [(row["step"], row["sampling_steps"], row["metrics"]) for row in read_rows(folder / SCORES_FILE)]


def test_with_everything_on_a_killed_run_resumes_bitwise_and_the_log_has_every_step_once(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "whole", 14)
    torch.manual_seed(0)
    plain = Trainer(IMMObjective(FlowMap(unet())), pixels(), tmp_path / "plain", dataclasses.replace(ALL, mfu=False))
    plain.run(14)  # nothing watches
    assert_same_state(tmp_path / "whole", tmp_path / "plain")
    parts = tmp_path / "parts"
    run(parts, 14, "tensorboard", killed_at=7)
    (parts / "samples-0000999.png").touch()  # of a killed run that went further
    run(parts, 14, "tensorboard", killed_at=11)
    run(parts, 14, "tensorboard")
    assert_same_state(tmp_path / "whole", parts)
    assert scored(parts) == scored(tmp_path / "whole")
    assert [(step, n) for step, n, _ in scored(parts)] == [(s, n) for s in (4, 8, 12, 14) for n in (1, 3)]
    names = sorted(p.name for p in parts.iterdir() if p.suffix == ".png")
    assert names == [f"samples-{step:07d}.png" for step in (4, 8, 12, 14)]
    assert all((parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)

    read = EventAccumulator(str(parts / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()
    rows = read_rows(parts / STATS_FILE)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14]
    for name in scalars_of(rows[0]).keys() - {"step", "t_bins"}:
        if name.startswith("t_bin_loss"):
            continue  # no group fell into some
        assert [event.step for event in read.Scalars(name)] == [2, 4, 6, 8, 10, 12, 14], name
    for row, event in zip(rows, read.Scalars("loss"), strict=True):
        assert event.value == pytest.approx(row["loss"], rel=1e-6)
    assert [event.step for event in read.Scalars("scores/3 steps/mmd-pixels")] == [4, 8, 12, 14]
    assert [event.step for event in read.Images("samples")] == [4, 8, 12, 14]
    from PIL import Image

    logged, written = Image.open(io.BytesIO(read.Images("samples")[0].encoded_image_string)), Image.open(parts / names[0])
    np.testing.assert_array_equal(np.asarray(logged), np.asarray(written))


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a W&B file: a header of seven bytes, then LevelDB's log format."""
    block, head, whole = 32768, struct.Struct("<IHB"), b""
    at = 7
    while at + head.size <= len(content):
        if block - at % block < head.size:
            at += block - at % block
            continue
        _, length, kind = head.unpack_from(content, at)
        at += head.size
        whole += content[at : at + length]
        at += length
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def test_wandb_offline_has_every_row_and_picture_once_though_a_killed_start_lost_its_own(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, 10, "wandb", killed_at=7)  # the state is of step 4
    shutil.rmtree(tmp_path / "wandb")  # its process buffers: a kill may leave no row
    run(tmp_path, 10, "wandb")

    def read() -> list[dict]:
        history: list[dict] = []
        for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"):
            for data in log_records(file.read_bytes()):
                record = Record()
                record.ParseFromString(data)
                if record.HasField("history"):
                    items = record.history.item
                    history.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        return history

    deadline = time.monotonic() + 60  # W&B's own process writes the files
    while len(history := read()) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    rows = read_rows(tmp_path / STATS_FILE)
    assert [one["_step"] for one in history] == [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert [one["loss"] for one in history] == [row["loss"] for row in rows]
    with_pictures = [one["_step"] for one in history if one.get("samples/_type") == "image-file"]
    assert with_pictures == [one["_step"] for one in history if "scores/1 step/label-match" in one] == [4, 8, 10]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_log_without_its_package_is_one_line(package, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard.writer", raising=False)
    output = call("train", "--data=mnist5k", f"--out={tmp_path / 'run'}", "--steps=1", f"--log={package}", ok=False).output
    assert output.splitlines()[-1].startswith(f"Error: log: expected the package {package} (pip install {package})")


def test_scores_are_those_of_imm_sample_and_imm_eval_to_the_digit(tmp_path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=pixels().pixels.permute(0, 2, 3, 1).numpy(), labels=np.arange(50) % 3)
    out, samples = tmp_path / "run", tmp_path / "samples"
    options = [
        "--steps=3",
        "--width=8",
        "--batch=8",
        "--lr=1e-2",
        "--ema=0.5",
        "--eval=mmd-pixels,label-match",
        "--eval-images=70",
    ]
    output = call("train", f"--data={data}", f"--out={out}", *options, "--eval-steps=2").output
    assert "scores: mmd-pixels,label-match of 70 samples in [2] steps every 500 steps, scores.jsonl" in output
    call("sample", f"--net={out / 'snapshot-0000003.safetensors'}", f"--out={samples}", "--seeds=0-69", "--steps=2")
    result = tmp_path / "result.json"
    call("eval", f"--data={samples}", f"--ref={data}", "--metrics=mmd-pixels,label-match", f"--out={result}")
    (row,) = read_rows(out / SCORES_FILE)
    expected = json.loads(result.read_text())
    assert row["metrics"] == expected["metrics"]
    assert row["protocol"]["images"]["digest"] == expected["protocol"]["images"]["digest"]
    assert row["protocol"]["settings"] == expected["protocol"]["settings"]
    assert (out / BEST_FILE).read_bytes() == (out / "snapshot-0000003.safetensors").read_bytes()


def test_the_best_snapshot_is_kept_by_the_first_metric_that_is_one_number(tmp_path) -> None:
    def write(*rows: tuple[int, int, dict]) -> None:
        lines = [json.dumps({"step": step, "sampling_steps": n, "metrics": metrics}) for step, n, metrics in rows]
        (tmp_path / SCORES_FILE).write_text("".join(line + "\n" for line in lines))

    assert best_of(tmp_path) is None
    write((4, 2, {"mmd-pixels": 0.5}), (4, 1, {"mmd-pixels": 0.1}), (8, 2, {"mmd-pixels": 0.4}), (12, 2, {"mmd-pixels": 0.4}))
    assert best_of(tmp_path)["step"] == 8
    write((4, 1, {"prdc.recall": 0.1, "label-match": 0.2}), (8, 1, {"prdc.recall": 0.0, "label-match": 0.3}))
    assert best_of(tmp_path)["step"] == 8
    write((4, 1, {"prdc.recall": 0.1}))
    assert best_of(tmp_path) is None
    write((4, 1, {"label-match": 0.2}), (8, 1, {"mmd-pixels": 0.1}))  # resumed with another metric
    assert best_of(tmp_path)["step"] == 4
    write((4, 1, {"mmd-pixels": float("nan")}), (8, 1, {"mmd-pixels": 0.1}))
    assert best_of(tmp_path)["step"] == 8


def test_the_best_snapshot_is_copied_once_it_is_saved(tmp_path) -> None:
    made = run(tmp_path, 8)
    best = best_of(tmp_path)["step"]
    assert checkpoints.read_settings(tmp_path / BEST_FILE, "flow_map")["extra"]["step"] == best
    rows = read_rows(tmp_path / SCORES_FILE)
    for row in rows:  # as if the newest were the best, and the run had been killed before it was copied
        row["metrics"]["label-match"] = float(row["step"] == made.step)
    (tmp_path / SCORES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / BEST_FILE).unlink()
    run(tmp_path, 8)
    assert (tmp_path / BEST_FILE).read_bytes() == made.snapshot_path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 6}, "eval_every: expected a multiple of snapshot_every = 4, got 6"),
        ({"metrics": ["is"], "images": 5}, "is: expected at least 10 images, got 5"),
        ({"reference": picture_set(torch.zeros(5, 1, 8, 8))}, "label-match: expected labels of the reference"),
        ({"reference": picture_set(torch.zeros(5, 3, 8, 8))}, r"expected the reference's \[channels, height, width\]"),
    ],
)
def test_scores_that_cannot_be_measured_are_refused_before_the_run(change, message, tmp_path) -> None:
    data = pixels()
    scoring = Scoring(["label-match"], picture_set(data.pixels, data.labels), every=4, images=10)
    seen = Watch(scoring=dataclasses.replace(scoring, **change))
    with pytest.raises(ValueError, match=message):
        Trainer(IMMObjective(FlowMap(unet())), data, tmp_path, CONFIG, watch=seen)


def test_options_of_scores_want_scores_and_latents_have_no_pictures(tmp_path) -> None:
    data = tmp_path / "latents.npz"
    latents = np.random.default_rng(0).standard_normal((12, 4, 8, 8)).astype(np.float32)
    np.savez(data, latents=latents * 0.5)
    command = ["train", f"--data={data}", "--width=8", "--steps=1", "--batch=4", f"--out={tmp_path / 'run'}"]
    assert "eval_images: expected no such option without --eval" in call(*command, "--eval-images=5", ok=False).output
    assert "eval: expected pictures, got latents" in call(*command, "--eval=mmd-pixels", ok=False).output
    assert "grid: expected pictures, got latents" in call(*command, "--grid=2x2", ok=False).output
    call(*command)  # the default picture is left out
    assert not list((tmp_path / "run").glob("*.png"))


def test_time_is_split_into_phases_that_sum_to_the_rows(tmp_path) -> None:
    run(tmp_path, 8)
    rows = read_rows(tmp_path / STATS_FILE)
    assert rows[0]["phases"].keys() == {"other", "data", "forward", "backward", "optimizer"}
    assert {"watch", "save"} <= rows[2]["phases"].keys()  # of the save before
    for row in rows:
        assert sum(row["phases"].values()) == pytest.approx(row["seconds"], rel=0.1, abs=0.01)
        assert 0 < row["mfu"] < 1.5
    clock = Clock(torch.device("cpu"))
    clock.mark("before it begins")
    assert clock.take() == {}


def test_flops_of_a_fused_network_are_those_of_the_plain_one_with_attention() -> None:
    counts = [flops_of(FlowMap(DiT("S", resolution=8, fused=fused)), (4, 8, 8)) for fused in (True, False)]
    assert counts[0] == counts[1]
    tokens, width, depth = 16, 384, 12
    attention = 4 * tokens**2 * width * depth
    per_token = 2 * 12 * width**2 * tokens * depth  # qkv, proj, two layers of the MLP
    assert attention + per_token < counts[0] < 1.2 * (attention + per_token)
    assert matmul_rate(torch.device("cpu"), "fp32") > 1e8


def test_with_one_particle_all_of_the_gradient_is_of_matched_pairs() -> None:
    def share(particles: int, k: int, seed: int = 0) -> float:
        torch.manual_seed(seed)
        objective = IMMObjective(FlowMap(spread(unet(0.0))), particles=particles, k=k)
        first, second = objective(images(32).images[:32], torch.arange(32) % 3, pairs=True)[1]["pairs"].tolist()
        return first / second

    assert share(1, 3) == pytest.approx(1.0, abs=1e-6)
    assert share(4, 15) == pytest.approx(1.0, abs=0.02)
    assert share(4, 1) < 0.95


def test_the_matched_share_is_that_of_the_formula() -> None:
    """By autograd through the kernel written out, of one group."""
    torch.manual_seed(0)
    flow_map = FlowMap(spread(unet(0.0)))
    objective = IMMObjective(flow_map, particles=4, k=4)
    x = images(4).images[:4]
    draws = objective.draw(x, torch.zeros(4, dtype=torch.int64))
    _, stats = objective(x, torch.zeros(4, dtype=torch.int64), draws=draws, pairs=True)
    t, s, r = (value.repeat_interleave(4) for value in (draws.t, draws.s, draws.r))
    with torch.no_grad():
        y_r, y_t = (
            flow_map(flow_map.add_noise(x, draws.noise, time), time, s, draws.labels).flatten(1).double() for time in (r, t)
        )
    y_t.requires_grad_()
    scale = float(objective.kernel_scale(draws.t, draws.s)) / y_t.shape[1]

    def kernel(distance: torch.Tensor) -> torch.Tensor:
        return torch.exp(-scale * distance.clamp_min(1e-8))

    def cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a[:, None] - b[None]).norm(dim=-1)

    (total,) = torch.autograd.grad(kernel(cross(y_t, y_t)).sum() - 2 * kernel(cross(y_t, y_r)).sum(), y_t, retain_graph=True)
    (matched,) = torch.autograd.grad(-2 * kernel((y_t - y_r).norm(dim=-1)).sum(), y_t)
    expected = float((matched * total).sum() / total.square().sum())
    assert float(stats["pairs"][0] / stats["pairs"][1]) == pytest.approx(expected, rel=1e-3)


def test_the_page_of_a_run_holds_curves_pictures_scores_settings_and_environment(tmp_path) -> None:
    data = tmp_path / "data.npz"
    np.savez(data, images=pixels().pixels.permute(0, 2, 3, 1).numpy(), labels=np.arange(50) % 3)
    out = tmp_path / "run<1>"
    options = [
        "--steps=4",
        "--width=8",
        "--batch=8",
        "--tick=1",
        "--snap=2",
        "--eval=mmd-pixels",
        "--eval-images=10",
        "--grid=3x2",
    ]
    call("train", f"--data={data}", f"--out={out}", *options)
    assert call("report", str(out)).output == f"wrote {out / 'report.html'}\n"
    text = (out / "report.html").read_text()
    assert "Training run run&lt;1&gt;" in text
    assert "4 steps, 32 images" in text
    assert text.count("data:image/png;base64,") == 1 + 2  # curves, two saves
    for part in ("mmd-pixels", "(best)", "objective.particles", "config.lr", "Environment", "CPU, "):
        assert part in text, part
    assert "http" not in text.replace("http-equiv", "")  # needs no other file
    shutil.rmtree(out)
    out.mkdir()
    assert "RUN: expected the folder of a training run" in call("report", str(out), ok=False).output


def test_a_bar_in_a_file_is_lines(monkeypatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    with progress.bar(3, "step") as shown:
        shown.mininterval = 0
        shown.update(1)
        shown.update(2)
    text = written.getvalue()
    assert "\r" not in text
    assert text.endswith("\n")
    assert len(text.splitlines()) >= 2
    assert all(line.strip() for line in text.splitlines())
