"""The trainer: exact resume, precisions, EMA, kill at any moment, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import spread

from imm import FlowMap, IMMObjective, checkpoints, files
from imm.data import ImageData
from imm.networks import NETWORKS, DDPMpp, UNet
from imm.training import EMA, TrainConfig, Trainer, TrainingError
from imm.training.state import SETTINGS_FILE, read_state, states_in
from imm.training.stats import STATS_FILE

CONFIG = TrainConfig(batch=8, lr=1e-3, warmup=3, ema=0.9, log_every=2, snapshot_every=4, seed=3)


def images(count: int = 50) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    return ImageData(torch.randn(count, 1, 8, 8, generator=generator) * 0.5, torch.arange(count) % 3, 3, "made up")


def unet(dropout: float = 0.3) -> UNet:
    return UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2), dropout=dropout)


def trainer(folder, config: TrainConfig = CONFIG, data: ImageData | None = None, dropout: float = 0.3, **options) -> Trainer:
    torch.manual_seed(0)
    return Trainer(IMMObjective(FlowMap(unet(dropout)), **options), images() if data is None else data, folder, config)


def state(folder) -> tuple[dict, dict]:
    return read_state(folder)


def assert_same_state(one, other) -> None:
    (a, settings), (b, other_settings) = state(one), state(other)
    settings["replaced_step"] = other_settings["replaced_step"] = None  # where a run was stopped
    assert settings == other_settings
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", "fp32"), ("adamw", "tf32"), ("adamw", "bf16"), ("adamw", "fp16"), ("radam", "fp32")]
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(optimizer, precision, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, optimizer=optimizer, precision=precision)
    trainer(tmp_path / "whole", config).run(13)
    for until in (5, 6, 13):  # in the middle of an epoch, of a log window, of everything
        resumed = trainer(tmp_path / "parts", config)
        resumed.run(until)
    assert resumed.resumed_from == 6
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("network", ["UNet", "DDPMpp", "DiT"])
@pytest.mark.parametrize(
    ("optimizer", "precision"), [("adamw", "fp32"), ("radam", "tf32"), ("adamw", "bf16"), ("adamw", "fp16")]
)
def test_on_a_gpu_two_runs_and_a_resumed_one_are_equal_bit_for_bit(network, optimizer, precision, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, batch=16, optimizer=optimizer, precision=precision)
    generator = torch.Generator().manual_seed(0)
    data = ImageData(torch.randn(50, 4, 16, 16, generator=generator) * 0.5, torch.arange(50) % 3, 3, "made up")
    arguments = {
        "UNet": {"width": 16, "dropout": 0.3},
        "DDPMpp": {"width": 16, "dropout": 0.3, "blocks": 1},
        "DiT": {"size": "S", "patch": 2},
    }

    def made(name: str) -> Trainer:
        torch.manual_seed(0)
        net = NETWORKS[network](channels=4, resolution=16, num_classes=3, **arguments[network])
        return Trainer(IMMObjective(FlowMap(net).cuda()), data, tmp_path / name, config)

    for name, parts in (("one", [20]), ("other", [20]), ("parts", [7, 20])):
        for until in parts:
            made(name).run(until)
    assert_same_state(tmp_path / "one", tmp_path / "other")
    assert_same_state(tmp_path / "one", tmp_path / "parts")


def test_a_resumed_state_lies_in_memory_as_the_weights_do(tmp_path) -> None:
    """A fused optimizer would give each weight the moments of another."""

    def made() -> Trainer:
        network = UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2))
        network.to(memory_format=torch.channels_last)
        return Trainer(IMMObjective(FlowMap(network)), images(), tmp_path, CONFIG)

    made().run(2)
    resumed = made()
    assert resumed.resumed_from == 2
    assert not all(parameter.is_contiguous() for parameter in resumed._shards.parameters)
    for parameter in resumed._shards.parameters:
        moments = [value for value in resumed._optimizer.state[parameter].values() if value.shape == parameter.shape]
        assert len(moments) == 2
        assert all(moment.stride() == parameter.stride() for moment in moments)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_backends_settings_hold_within_a_run_only(precision, tmp_path) -> None:
    def now() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return (
            cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            cudnn.conv.fp32_precision == "tf32",
            torch.backends.cuda.matmul.fp32_precision == "tf32",
        )

    def broken(step: int) -> None:
        seen.append(now())
        raise KeyError

    before, seen = now(), []
    with pytest.raises(KeyError):
        trainer(tmp_path, dataclasses.replace(CONFIG, precision=precision)).run(1, on_step=broken)
    assert seen == [(True, True, True, False, precision == "tf32", precision == "tf32")]
    assert now() == before
    assert before[1] is False


def test_training_changes_the_network_and_the_rows_say_so(tmp_path) -> None:
    run = trainer(tmp_path)
    before = [p.detach().clone() for p in run.objective.parameters()]
    run.run(8)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.objective.parameters(), strict=True))
    rows = [json.loads(line) for line in (tmp_path / STATS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert row["images"] == row["step"] * 8
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
        assert row["nonfinite"] == 0
        assert row["images_per_second"] > 0
        assert 0 <= row["at_s"] <= 1
        assert len(row["t_bin_loss"]) == 4
    assert rows[0]["lr"] == pytest.approx(1e-3 * 2 / 3)
    assert rows[-1]["lr"] == 1e-3


def test_every_image_is_seen_once_an_epoch(tmp_path) -> None:
    run = trainer(tmp_path, dataclasses.replace(CONFIG, batch=12))
    seen = []
    for step in range(25):  # 300 images: six epochs of 50
        seen.append(run._batches.indices(step))
    for epoch in torch.cat(seen).reshape(6, 50):
        assert sorted(epoch.tolist()) == list(range(50))
    assert not torch.equal(torch.cat(seen)[:50], torch.cat(seen)[50:100])


@pytest.mark.parametrize(("precision", "batch_gpu"), [("fp32", 4), ("fp32", 12), ("fp16", 8), ("fp32", 100)])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(precision, batch_gpu, tmp_path) -> None:
    """The same draws, weighted by the parts' sizes: equal to rounding where the network has no dropout."""
    found = []
    for name, size in (("whole", None), ("parts", batch_gpu)):
        config = dataclasses.replace(CONFIG, batch=32, precision=precision, batch_gpu=size)
        run = trainer(tmp_path / name, config, dropout=0.0)
        run.run(3)  # until the last layer, 0 at first, lets gradients through
        calls, forward = [], run.objective.forward
        run.objective.forward = lambda x, *more, _f=forward, _c=calls, **options: _c.append(len(x)) or _f(x, *more, **options)
        stats, norm = run._step()
        assert calls == ([32] if size is None or size > 32 else [size] * (32 // size) + [32 % size] * bool(32 % size))
        found.append((stats, norm, [p.grad for p in run._shards.parameters]))
    (stats, norm, gradients), (part_stats, part_norm, part_gradients) = found
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if precision == "fp32" else {"rtol": 5e-2, "atol": 1e-4}
    torch.testing.assert_close(part_stats, stats, equal_nan=True, check_dtype=False, **tolerance)
    torch.testing.assert_close(part_norm, norm, **tolerance)
    torch.testing.assert_close(part_gradients, gradients, **tolerance)
    assert float(norm) > 0


def test_xflip_shows_every_image_twice_an_epoch_once_mirrored(tmp_path) -> None:
    pixels = torch.arange(12 * 64).remainder(251).to(torch.uint8).reshape(12, 1, 8, 8)
    found = ImageData(pixels, torch.arange(12) % 3, 3, "made up")
    run = trainer(tmp_path, dataclasses.replace(CONFIG, batch=12, xflip=True), found)
    seen, update = [], run.update
    run.update = lambda x, labels, told, **_: seen.extend(zip(x, labels, strict=True)) or update(x, labels, told)
    run.run(2)

    def key(image, label) -> tuple:
        return (*image.flatten().tolist(), int(label))

    expected = [key(x, y) for images in (found.images, found.images.flip(3)) for x, y in zip(images, found.labels, strict=True)]
    assert sorted(key(*pair) for pair in seen) == sorted(expected)
    with pytest.raises(ValueError, match="xflip: expected images, a mirrored latent"):
        trainer(tmp_path / "latents", dataclasses.replace(CONFIG, xflip=True))


def test_ema_follows_the_rule(tmp_path) -> None:
    live = torch.nn.Linear(2, 2)
    live.register_buffer("count", torch.zeros(1))
    ema = EMA(live, 0.9)
    start = live.weight.detach().clone()
    with torch.no_grad():
        live.weight.add_(1.0)
        live.count.add_(1)
    ema.update(live)
    torch.testing.assert_close(ema.network.weight, start + 0.1)
    assert float(ema.network.count) == 1.0
    assert not ema.network.weight.requires_grad


def test_snapshots_hold_the_average(tmp_path) -> None:
    run = trainer(tmp_path)
    run.run(4)
    loaded = checkpoints.load(tmp_path / "snapshot-0000004.safetensors")
    for mine, averaged in zip(loaded.network.parameters(), run.ema.network.parameters(), strict=True):
        assert torch.equal(mine, averaged)
    assert checkpoints.read_file(tmp_path / "snapshot-0000004.safetensors", "flow_map")[1]["extra"]["step"] == 4


def test_snapshots_are_replaced_but_those_to_keep(tmp_path) -> None:
    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("snapshot-*"))

    def expected(*steps: int) -> list[str]:
        return [f"snapshot-{step:07d}.safetensors" for step in steps]

    other = tmp_path / "snapshot-0000001.safetensors"  # not of this run
    trainer(tmp_path).run(3)
    other.write_bytes(b"mine")
    trainer(tmp_path).run(9)
    assert names() == expected(1, 9)
    assert state(tmp_path)[1]["step"] == 9
    other.unlink()
    trainer(tmp_path, dataclasses.replace(CONFIG, keep_every=5)).run(22)  # saves at 10, 12, 15, 16, 20, 22
    assert names() == expected(10, 15, 20, 22)
    assert checkpoints.read_file(tmp_path / names()[1], "flow_map")[1]["extra"]["step"] == 15
    trainer(tmp_path, dataclasses.replace(CONFIG, keep_every=10)).run(23)
    assert names() == expected(10, 15, 20, 23)


@pytest.mark.parametrize(("config", "left"), [(CONFIG, [8]), (dataclasses.replace(CONFIG, keep_every=4), [4, 8])])
@pytest.mark.parametrize(
    ("at", "step"),
    [
        ("imm.training.state.write_text", 7),
        ("pathlib.Path.replace", 7),
        ("imm.checkpoints.write_file", 8),
        ("pathlib.Path.unlink", 8),
        ("imm.training.state.State._remove", 8),
    ],
)
def test_killed_within_a_save_its_files_are_as_if_it_had_not_been(at, step, config, left, tmp_path, monkeypatch) -> None:
    def snapshots(folder) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.lstrip(".").startswith("snapshot-")}

    trainer(tmp_path / "whole", config).run(8)
    assert sorted(snapshots(tmp_path / "whole")) == [f"snapshot-{step:07d}.safetensors" for step in left]
    run = trainer(tmp_path / "killed", config)
    run.run(7)
    monkeypatch.setattr(at, Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.run(8)
    monkeypatch.undo()
    resumed = trainer(tmp_path / "killed", config)
    assert resumed.resumed_from == step
    resumed.run(8)
    assert snapshots(tmp_path / "killed") == snapshots(tmp_path / "whole")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("killed", "whole")]
    assert names[0] == names[1]


def test_fp16_has_a_loss_scale_that_is_kept(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, precision="fp16")
    trainer(tmp_path, config).run(2)
    assert state(tmp_path)[1]["scaler"]["scale"] > 1
    rows = [json.loads(line) for line in (tmp_path / STATS_FILE).read_text().splitlines()]
    assert rows[0]["loss_scale"] > 1


def test_a_time_limit_and_a_stop_keep_the_state(tmp_path) -> None:
    run = trainer(tmp_path)
    run.run(100000, max_seconds=0.5)
    assert 0 < run.step < 100000
    assert state(tmp_path)[1]["step"] == run.step
    again = trainer(tmp_path)
    again.stop = True
    again.run(100000)
    assert again.step == run.step


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nonfinite_losses_stop_the_run_and_spare_the_state(precision, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, precision=precision)
    run = trainer(tmp_path, config)
    run.run(4)
    with torch.no_grad():
        next(run.objective.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"not finite before step 6 \(\d+ groups\); the saved state of step 4 is good"):
        run.run(20)
    assert all(torch.isfinite(v).all() for v in state(tmp_path)[0].values())
    trainer(tmp_path, config).run(6)


def test_a_broken_gradient_is_not_saved(tmp_path) -> None:
    """The loss may still be finite when the gradient, and so the weights of the snapshot, are not."""
    run = trainer(tmp_path)
    run.run(4)
    parameter = next(run.objective.parameters())
    parameter.register_hook(lambda grad: grad * float("nan") if run.step == 7 else grad)
    with pytest.raises(TrainingError, match="the saved state of step 4 is good"):
        run.run(20)
    assert all(torch.isfinite(v).all() for v in state(tmp_path)[0].values())


def test_a_run_cannot_go_back(tmp_path) -> None:
    trainer(tmp_path).run(4)
    with pytest.raises(ValueError, match="steps: expected at least the 4 steps already made, got 2"):
        trainer(tmp_path).run(2)


def test_a_run_of_an_earlier_version_is_refused_with_its_remedy(tmp_path) -> None:
    trainer(tmp_path).run(2)
    shutil.rmtree(states_in(tmp_path)[0])
    (tmp_path / "training-state.safetensors").touch()
    with pytest.raises(ValueError, match=r"got the state of an earlier one, .*--init=.*snapshot-0000002.safetensors begins"):
        trainer(tmp_path)


def test_a_state_without_later_settings_resumes(tmp_path) -> None:
    trainer(tmp_path).run(2)
    path = states_in(tmp_path)[0] / SETTINGS_FILE
    settings = json.loads(path.read_text())
    for name in ("xflip", "augment", "compile"):
        del settings["settings"]["config"][name]
    path.write_text(json.dumps(settings))
    assert trainer(tmp_path).resumed_from == 2


def told_trainer(folder, **changes) -> Trainer:
    """On images of bytes, with a network that is told how they are augmented."""
    torch.manual_seed(0)
    network = DDPMpp(3, 8, width=8, multipliers=(1, 2), blocks=1, attention=(), augment_dim=9, dropout=0.0)
    spread(network)  # else it begins deaf
    pixels = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    config = dataclasses.replace(CONFIG, augment=0.5, **changes)
    return Trainer(IMMObjective(FlowMap(network)), ImageData(pixels, None, 0, "made up"), folder, config)


def test_augmented_images_and_what_is_told_of_them(tmp_path) -> None:
    """Both branches are told; a resumed run repeats it; the parts of a batch are told their own."""
    run, told, seen = told_trainer(tmp_path / "whole"), [], []
    run.objective.flow_map.network.register_forward_pre_hook(lambda _, arguments: told.append(arguments[4]))
    update = run.update
    run.update = lambda x, labels, numbers, **_: seen.append(numbers) or update(x, labels, numbers)
    run.run(3)
    assert len(told) == 6
    assert all(torch.equal(told[2 * i], numbers) and torch.equal(told[2 * i + 1], numbers) for i, numbers in enumerate(seen))
    assert seen[0].shape == (8, 9)
    assert bool((seen[0] != seen[1]).any())
    told_trainer(tmp_path / "parts").run(2)
    told_trainer(tmp_path / "parts").run(3)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    whole, parts = told_trainer(tmp_path / "one"), told_trainer(tmp_path / "batch-gpu", batch_gpu=4)
    for one in (whole, parts):
        one.run(1)
    for a, b in zip(whole.objective.parameters(), parts.objective.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_augmentation_that_does_not_fit(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, augment=0.1)
    with pytest.raises(ValueError, match="augment: expected images, a turned latent"):
        trainer(tmp_path, config)
    pixels = ImageData(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), 3, "made up")
    with pytest.raises(ValueError, match=r"augment: expected a network that is conditioned on it .* got UNet with 0"):
        trainer(tmp_path, config, pixels)
    with pytest.raises(ValueError, match="augment: expected a probability from 0 to 1, got 2"):
        dataclasses.replace(CONFIG, augment=2)
    assert not list(tmp_path.iterdir())


def test_a_foreign_stats_file_is_not_touched(tmp_path) -> None:
    text = '{"epoch": 3}\n'
    (tmp_path / STATS_FILE).write_text(text)
    with pytest.raises(ValueError, match="expected rows of a training run"):
        trainer(tmp_path)
    assert (tmp_path / STATS_FILE).read_text() == text


def test_a_folder_whose_state_is_lost_is_refused_or_its_rows_are_kept(tmp_path) -> None:
    trainer(tmp_path).run(5)
    shutil.rmtree(states_in(tmp_path)[0])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"out: expected a state beside snapshot-0000005.safetensors, .*--init="):
        trainer(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    (tmp_path / "snapshot-0000005.safetensors").unlink()  # killed before its first save: rows alone
    for count in (1, 2):
        trainer(tmp_path)
        assert (tmp_path / "stats-1.jsonl").read_bytes() == before[STATS_FILE]
        assert (tmp_path / STATS_FILE).read_text() == ""
        assert len(list(tmp_path.glob("stats-*.jsonl"))) == 1, count  # an empty file is nobody's


def test_an_empty_or_half_written_row_takes_none_away_and_those_after_the_state_are_dropped(tmp_path) -> None:
    trainer(tmp_path).run(6)
    rows = (tmp_path / STATS_FILE).read_text().splitlines()
    (tmp_path / STATS_FILE).write_text("\n".join([rows[0], "", *rows[1:]]) + '\n{"step": 8, "loss": 1}\n{"step": 10, "lo')
    trainer(tmp_path)
    assert (tmp_path / STATS_FILE).read_text().splitlines() == rows
    broken = "\n".join([rows[0], '{"st', *rows[1:]])
    (tmp_path / STATS_FILE).write_text(broken)
    with pytest.raises(ValueError, match="expected rows of a training run"):
        trainer(tmp_path)
    assert (tmp_path / STATS_FILE).read_text() == broken


def test_other_settings_or_data_do_not_resume(tmp_path) -> None:
    trainer(tmp_path).run(2)
    text = r"expected the settings of the run to resume, got others: .* was "
    for change in ({"config": dataclasses.replace(CONFIG, lr=2e-3)}, {"k": 10}, {"dropout": 0.0}, {"data": images(60)}):
        with pytest.raises(checkpoints.CheckpointError, match=text):
            trainer(tmp_path, **change)
    free = [{"config": dataclasses.replace(CONFIG, **change)} for change in ({"log_every": 1}, {"batch_gpu": 4})]
    for step, change in enumerate((*free, {"data": dataclasses.replace(images(), source="moved")}), 3):
        trainer(tmp_path, **change).run(step)


def test_a_broken_state_is_refused(tmp_path) -> None:
    trainer(tmp_path).run(2)
    folder = states_in(tmp_path)[0]
    (path,), settings = folder.glob("*.safetensors"), folder / SETTINGS_FILE
    whole, text = path.read_bytes(), settings.read_text()
    small = {name: value[:1] for name, value in load_file(path).items() if "exp_avg" in name}
    broken: list[tuple[Callable[[], object], str]] = [
        (lambda: path.write_bytes(whole[:-10]), "expected whole safetensors files"),
        (lambda: path.write_bytes(b""), "expected whole safetensors files"),
        (path.unlink, "missing"),
        (lambda: save_file({**load_file(path), **small}, path), "exp_avg.*expected"),
        (lambda: settings.write_text(text[:-10]), f"expected a readable {SETTINGS_FILE}"),
        (lambda: settings.write_text("[1]"), f"expected a readable {SETTINGS_FILE}"),
        (lambda: settings.write_text(text.replace('"kind": "training"', '"kind": "other"')), "expected a state of format 1"),
        (settings.unlink, f"expected a readable {SETTINGS_FILE}"),
    ]
    for breaks, message in broken:
        breaks()
        with pytest.raises(checkpoints.CheckpointError, match=message):
            trainer(tmp_path)
        path.write_bytes(whole), settings.write_text(text)
    assert trainer(tmp_path).resumed_from == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch": 6}, "batch: expected a multiple of particles = 4, got 6"),
        ({"batch_gpu": 6}, "batch_gpu: expected a multiple of particles = 4, got 6"),
        ({"batch_gpu": 0}, "batch_gpu: expected at least 1, got 0"),
        ({"keep_every": 0}, "keep_every: expected at least 1, got 0"),
        ({"lr": 0.0}, "lr: expected a positive rate"),
        ({"lr": float("inf")}, "lr: expected a positive rate, got inf"),
        ({"optimizer": "sgd"}, r"unknown optimizer 'sgd'; expected one of \['adamw', 'radam'\]"),
        ({"precision": "int8"}, "unknown precision"),
        ({"ema": 1.0}, r"ema: expected beta in \[0, 1\)"),
        ({"log_every": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(change, text, tmp_path) -> None:
    with pytest.raises(ValueError, match=text):
        trainer(tmp_path, dataclasses.replace(CONFIG, **change))


def test_bad_data_is_refused(tmp_path) -> None:
    good = images()
    broken = good.pixels.clone()
    broken[3] = float("nan")
    for data, text in (
        (dataclasses.replace(good, pixels=broken), "expected finite images, got NaN"),
        (dataclasses.replace(good, labels=None, num_classes=0), "expected labels of at most 3 classes"),
        (dataclasses.replace(good, num_classes=7), "at most 3 classes, got 7"),
        (dataclasses.replace(good, pixels=good.pixels[:0]), "expected images, got none"),
        (dataclasses.replace(good, pixels=good.pixels.repeat(1, 3, 1, 1)), r"expected images of \[1, 8\] .*, got \[3, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=text):
            trainer(tmp_path, data=data)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: expected a folder that can be written to"):
        trainer(tmp_path / "file" / "below")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import test_training
run = test_training.trainer(__import__("pathlib").Path({folder!r}), test_training.CONFIG)
run.run(int(sys.argv[1]))
"""


def test_killed_at_any_moment_it_resumes_exactly(tmp_path) -> None:
    trainer(tmp_path / "whole").run(30)
    code = SCRIPT.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "killed"))
    newest = lambda: max((path.name for path in states_in(tmp_path / "killed")), default="")
    for wait in (0.0, 0.07):
        process = subprocess.Popen([sys.executable, "-c", code, "100000"])
        deadline = time.monotonic() + 60
        before = newest()
        while newest() == before:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = state(tmp_path / "killed")[1]["step"]
    assert step % CONFIG.snapshot_every == 0
    trainer(tmp_path / "whole").run(max(30, step))
    subprocess.run([sys.executable, "-c", code, str(max(30, step))], check=True)
    assert_same_state(tmp_path / "whole", tmp_path / "killed")


# The module alone: torch takes seconds to import.
LOCKED = """
import pathlib, runpy, sys, time
lock = runpy.run_path(sys.argv[1])["lock_folder"](pathlib.Path(sys.argv[2]))
"""
HOLD = LOCKED + "print('locked', flush=True); time.sleep(60)"


def free(folder) -> bool:
    """Whether another process may write to the folder."""
    line = [sys.executable, "-c", LOCKED, files.__file__, str(folder)]
    taken = subprocess.run(line, capture_output=True, text=True)
    assert (taken.returncode == 0) is ("that no other run writes to" not in taken.stderr), taken.stderr
    return taken.returncode == 0


def test_one_process_writes_to_a_folder(tmp_path) -> None:
    line = [sys.executable, "-c", HOLD, files.__file__, str(tmp_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            text = f"that no other run writes to, got {tmp_path}, where process {other.pid} does"
            with pytest.raises(ValueError, match=text):
                trainer(tmp_path)
            assert os.listdir(tmp_path) == [files.LOCK_FILE]
        finally:
            other.kill()  # which leaves no lock behind
    first = trainer(tmp_path)
    second = trainer(tmp_path)  # of the same process
    del first
    assert not free(tmp_path)
    second.close()
    assert free(tmp_path)
    third = trainer(tmp_path)
    assert not free(tmp_path)
    del third
    assert free(tmp_path)


def test_a_folder_made_anew_is_locked_anew(tmp_path) -> None:
    first = trainer(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    second = trainer(tmp_path / "run")
    second.run(1)
    assert not free(tmp_path / "run")
    assert first.step == 0
