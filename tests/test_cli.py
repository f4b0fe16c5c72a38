"""The command line: what it writes, that it stops and resumes, and one clear line for every mistake."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from command_line import call, refused
from PIL import Image

from imm import FlowMap, checkpoints
from imm.cli import options, progress
from imm.cli.commands import COMMANDS
from imm.cli.options import process_device, writable_folder
from imm.distributed import Processes
from imm.networks import DiT, UNet
from imm.training.state import read_state, states_in

IMM = [sys.executable, "-c", "from imm.cli import main; main()"]


@pytest.fixture
def net(small_flow_map, tmp_path):
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, small_flow_map)
    return path


def test_help() -> None:
    output = call("--help").output
    for command in (*COMMANDS, "bench"):
        assert f"\n  {command} " in output
        assert "--help" in call(command, "--help").output
    assert "No such command" in refused("dream")


def test_doctor_names_every_op_and_a_reason() -> None:
    output = call("doctor").output
    for op in ("mmd_loss", "mmd_gram", "flow_step", "noise"):
        assert re.search(rf"  {op}: \w+ \(.+\)", output)
    assert f"torch {torch.__version__}" in output


def test_sample_writes_images_that_depend_on_their_seed_only(net, tmp_path) -> None:
    call("sample", "--net", net, "--seeds", "0-9", "--steps", "2", "--out", tmp_path / "a", "--grid", "5x2")
    call("sample", "--net", net, "--seeds", "0-9", "--steps", "2", "--out", tmp_path / "b", "--batch", "3")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(10)), "generation.json", "grid.png"]
    for name in names[:10]:
        one, other = (np.asarray(Image.open(tmp_path / d / name)).astype(int) for d in "ab")
        assert one.shape == (8, 8)
        assert np.abs(one - other).max() <= 1
    call("sample", "--net", net, "--seeds", "4", "--labels", "1", "--out", tmp_path / "c")  # 4 % 3 classes = 1
    assert (tmp_path / "c" / "000004.png").read_bytes() == (tmp_path / "a" / "000004.png").read_bytes()


@pytest.mark.parametrize("options", [["--method", "restart"], ["--cfg", "2.0"], ["--kind", "eta", "--mid-eta", "1.4"]])
def test_sample_options_do_something(options, net, tmp_path) -> None:
    call("sample", "--net", net, "--seeds", "1", "--out", tmp_path / "a")
    call("sample", "--net", net, "--seeds", "1", "--out", tmp_path / "b", *options)
    assert (tmp_path / "a" / "000001.png").read_bytes() != (tmp_path / "b" / "000001.png").read_bytes()


def test_sample_refusals(net, tmp_path) -> None:
    out = tmp_path / "out"
    base = ("sample", "--net", net, "--out", out)
    assert "seeds: expected numbers and ranges such as 0-63,70, got 'x'" in refused(*base, "--seeds", "x")
    assert "-1 is not in the range" in refused(*base, "--class", "-1")
    assert "npz: expected a file name" in refused(*base, "--npz", tmp_path / "absent" / "all.npz")
    assert "got '5-2'" in refused(*base, "--seeds", "5-2")
    assert "labels: expected classes 0..2 or 3 for none, got 4" in refused(*base, "--labels", "4")
    assert "grid: expected COLUMNSxROWS" in refused(*base, "--grid", "8")
    assert "steps - 1 = 1 noise levels, got 0" in refused(*base, "--kind", "eta")
    for device in ("tpu9", "meta"):
        assert "device: expected auto or a device of this machine" in refused(*base, "--device", device)
    assert "mid-eta: expected numbers such as 1.4,0.5, got 'x'" in refused(*base, "--kind", "eta", "--mid-eta", "x")
    assert "guidance: expected a finite number" in refused(*base, "--guidance", "inf")
    assert "below 2^63" in refused(*base, "--seeds", str(2**63))
    assert "found none" in refused("sample", "--net", tmp_path / "absent", "--out", out)
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "out: expected a folder that can be written to" in refused(*base[:3], "--out", tmp_path / "file")
    net.write_bytes(net.read_bytes()[:500])
    assert "expected a whole safetensors file" in refused(*base)
    unconditional = tmp_path / "plain.safetensors"
    checkpoints.save(unconditional, FlowMap(UNet(resolution=8, num_classes=0, width=8, multipliers=(1, 2))))
    for option in (("--labels", "0"), ("--cfg", "1.5")):
        assert "one without classes" in refused("sample", "--net", unconditional, "--out", out, *option)


def test_cuda_under_torchrun_is_the_processes_own_gpu(monkeypatch) -> None:
    here = [Processes(rank=4 + i, world=8, local_rank=i) for i in range(3)]
    assert {process_device("cpu", where) for where in here} == {torch.device("cpu")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(options, "pick_device", torch.device)
    for name in ("auto", "cuda"):
        assert [str(process_device(name, where)) for where in here] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {str(process_device("cuda:1", where)) for where in here} == {"cuda:1"}
    assert process_device("cpu", here[1]) == torch.device("cpu")


def test_containers_prove_one_folder_at_once(tmp_path, monkeypatch) -> None:
    """Processes of two containers may have one number: here the second one's whole proof falls into the first one's."""
    inner, entered = tempfile.NamedTemporaryFile, []

    def interrupted(*arguments, **named):
        file = inner(*arguments, **named)
        if not entered:
            entered.append(file.name)
            writable_folder(str(tmp_path))
            assert Path(file.name).exists()
        return file

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", interrupted)
    assert writable_folder(str(tmp_path)) == tmp_path
    assert entered
    assert not list(tmp_path.iterdir())


@pytest.fixture
def digits(tmp_path):
    """Sixty made-up 8x8 images of three classes."""
    path = tmp_path / "data.npz"
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(60) % 3)
    return path


TRAIN = ("--batch", "8", "--width", "8", "--tick", "2", "--snap", "4", "--lr", "1e-3")


def test_train_snapshots_and_resume(digits, tmp_path) -> None:
    out = tmp_path / "run"
    first = call("train", "--data", digits, "--out", out, "--steps", "5", *TRAIN).output
    assert "UNet" in first
    assert "3 classes" in first
    second = call("train", "--data", digits, "--out", out, "--steps", "9", "--keep", "3", *TRAIN).output
    assert "resuming at step 5" in second
    call("train", "--data", digits, "--out", tmp_path / "whole", "--steps", "9", *TRAIN)
    assert [p.name for p in sorted(out.glob("snapshot-*"))] == [f"snapshot-000000{n}.safetensors" for n in (6, 9)]
    name = "snapshot-0000009.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 8, 9]
    call("sample", "--net", out, "--seeds", "0-3", "--out", tmp_path / "samples")
    assert json.loads((tmp_path / "samples" / "generation.json").read_text())["net"]["name"] == name
    (tmp_path / "empty").mkdir()
    message = refused("sample", "--net", tmp_path / "empty", "--seeds", "0", "--out", tmp_path / "other")
    assert "expected a checkpoint or the folder of a run with a snapshot" in message


@pytest.mark.parametrize(
    "options",
    [
        ["--network", "dit", "--patch", "4"],
        ["--precision", "bf16", "--min-gap", "1e-4", "--second-time", "identity"],
        ["--kernel=rbf", "--mapping=log_snr", "--t-min=0.006", "--schedule=vp_cosine", "--parametrization=simple_edm"],
        ["--optimizer", "radam", "--dropout", "0.2", "--particles", "2", "-k", "10", "-b", "5"],
        ["--xflip", "--batch-gpu", "4"],
    ],
    ids=lambda o: o[1],
)
def test_train_options(options, digits, tmp_path) -> None:
    common = ["--batch", "8", *TRAIN[4:]] if "dit" in options else TRAIN  # a DiT has no width
    call("train", "--data", digits, "--out", tmp_path / "run", "--steps", "2", *common, *options)
    flow_map = checkpoints.load(tmp_path / "run" / "snapshot-0000002.safetensors")
    assert isinstance(flow_map.network, DiT if "dit" in options else UNet)


def test_train_with_checkpointing_gives_the_same(digits, tmp_path, monkeypatch) -> None:
    from imm.networks import layers

    calls, own = [], layers.checkpoint
    monkeypatch.setattr(layers, "checkpoint", lambda *args, **options: calls.append(1) or own(*args, **options))
    options = ("train", "--data", digits, "--steps", "2", "--batch", "8", "--network", "dit", "--patch", "4", "--out")
    call(*options, tmp_path / "plain")
    assert not calls
    call(*options, tmp_path / "less", "--checkpointing")
    assert calls
    names = [tmp_path / name / "snapshot-0000002.safetensors" for name in ("plain", "less")]
    assert names[0].read_bytes() == names[1].read_bytes()
    refusal = refused("train", "--data", digits, "--out", tmp_path / "unet", "--checkpointing")
    assert "checkpointing: expected a network that has it, got UNet" in refusal


def test_train_from_a_checkpoint(digits, tmp_path) -> None:
    base = ("train", "--data", digits, "--steps", "2", "--tick", "2", "--batch", "8", "--out")
    settings = ("--width=8", "--t-min=0.006", "--second-time=identity")
    call(*base, tmp_path / "first", *settings, "--lr", "1e-2")
    path = tmp_path / "first" / "snapshot-0000002.safetensors"
    half = tmp_path / "half.safetensors"
    checkpoints.save(half, checkpoints.load(path).to(torch.bfloat16))
    for name, start in (("tuned", path), ("widened", half)):
        output = call(*base, tmp_path / name, "--init", start, "--lr", "1e-30", "-k", "10").output
        assert re.search(rf"init: {start}, sha256 {hashlib.sha256(start.read_bytes()).hexdigest()}", output)
        first, tuned = checkpoints.load(start), checkpoints.load(tmp_path / name / "snapshot-0000002.safetensors")
        assert tuned.settings == first.settings
        assert tuned.settings["t_min"] == 0.006
        assert tuned.network_dtype == torch.float32
        for mine, theirs in zip(tuned.parameters(), first.float().parameters(), strict=True):  # the average begins there too
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)
    state = read_state(tmp_path / "tuned")[1]["settings"]
    assert state["init"] == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    call(*base, tmp_path / "tuned", "--init", path, "--lr", "1e-30", "-k", "10", "--steps", "3")
    refusal = refused(*base, tmp_path / "tuned", "--init", half, "--lr", "1e-30", "-k", "10")
    assert "init.sha256 was" in refusal
    assert "init was {'sha256'" in refused(*base, tmp_path / "tuned", "--lr", "1e-30", "-k", "10", *settings)
    out = tmp_path / "no"
    for option in ("--width=8", "--t-min=0.1", "--size=S"):
        name = option[2:].partition("=")[0].replace("-", "_")
        assert f"{name}: expected no such option beside --init" in refused(*base, out, "--init", path, option)
    refusal = refused(*base, out, "--init", path, "--preset", "cifar10")
    assert "init: expected network = DDPMpp for the preset cifar10, got UNet" in refusal
    refusal = refused(*base, out, "--init", path, "--resolution", "16")
    assert f"data: expected images of 1 channels and 8x8 for {path}" in refusal
    assert "expected a checkpoint file, found none" in refused(*base, out, "--init", tmp_path / "absent")
    assert not out.exists()


def test_train_refusals(digits, tmp_path) -> None:
    base = ("train", "--data", digits, "--out", tmp_path / "run", "--steps", "2", *TRAIN)
    assert "multiple of particles = 4, got 6" in refused(*base, "--batch", "6")
    assert "expected t_min > 0" in refused(*base, "--mapping", "log_snr")
    assert "expected 'mnist5k', a folder, or a .zip" in refused("train", "--data", "nowhere", *base[3:])
    assert "is not one of" in refused(*base, "--kernel", "gauss")
    text = "width: expected no such option for the network DiT, which has size, patch, got 8"
    assert text in refused(*base, "--network", "dit")
    plain = ("train", "--data", digits, "--out", tmp_path / "run", "--patch", "4")
    assert "patch: expected no such option for the network UNet, which has width, dropout, got 4" in refused(*plain)
    assert "resolution: expected a multiple of 4" in refused(*base, "--resolution", "6")
    assert "ema: expected beta in [0, 1), got 1.5" in refused(*base, "--ema", "1.5")
    np.savez(tmp_path / "plain.npz", images=np.zeros((8, 8, 8), np.uint8))
    text = "label_dropout: expected no such option for a network without classes, got 0.2"
    assert text in refused(*base, "--data", tmp_path / "plain.npz", "--label-dropout", "0.2")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    assert "out: expected a folder that can be written to" in refused(*base, "--out", tmp_path / "file")
    call(*base)
    assert "expected the settings of the run to resume" in refused(*base, "-k", "9")


def test_a_run_out_of_time_says_so(digits, tmp_path) -> None:
    base = ("train", "--data", digits, "--out", tmp_path / "run", "--steps", "2", *TRAIN)
    text = "stopped after 0 minutes at step 0 of 2; the same command resumes there"
    assert text in call(*base, "--minutes", "0").output
    assert "stopped" not in call(*base, "--minutes", "5").output


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 9 EiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_to_lower(error, digits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("imm.training.Trainer.update", Mock(side_effect=error))
    line = refused("train", "--data", digits, "--out", tmp_path / "run", *TRAIN)
    assert line.startswith("Error: out of memory; try a smaller --batch-gpu (or --batch), --checkpointing")
    for option in re.findall(r"--[a-z-]+", line):
        assert option in call("train", "--help").output


def test_other_errors_of_torch_stay_what_they_are(digits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("imm.training.Trainer.update", Mock(side_effect=RuntimeError("shapes do not fit")))
    result = call("train", "--data", digits, "--out", tmp_path / "run", *TRAIN, ok=False)
    assert repr(result.exception) == "RuntimeError('shapes do not fit')"


# SIGTERM is in tests/test_training_processes.py too.
@pytest.mark.parametrize(
    "number", [*(pytest.param(n, marks=pytest.mark.full) for n in (signal.SIGTERM, signal.SIGUSR1)), signal.SIGHUP]
)
def test_a_signal_stops_training_and_the_same_command_goes_on(number, digits, tmp_path) -> None:
    arguments = ["train", "--data", str(digits), "--out", str(tmp_path / "run"), *TRAIN]
    process = subprocess.Popen(
        [*IMM, *arguments, "--steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not states_in(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    step = int(re.search(rf"stopped by signal {number.value} at step (\d+)", output)[1])
    assert (tmp_path / "run" / f"snapshot-{step:07d}.safetensors").exists()
    assert f"resuming at step {step}" in call(*arguments, "--steps", step + 1).output


def test_what_nohup_ignores_stays_ignored() -> None:
    class Once:
        step, stop = 0, False

        def run(self, steps: int, **rest) -> None:
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = Once()
        assert progress.run(trainer, 1) is None
        assert not trainer.stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_has_seen_enough_ends_a_command_quietly() -> None:
    process = subprocess.Popen([*IMM, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.wait()


def test_a_second_ctrl_c_does_not_wait() -> None:
    class Endless:
        step, stop = 0, False

        def run(self, steps: int, **rest) -> None:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                self.step += 1

    trainer, before = Endless(), {number: signal.getsignal(number) for number in progress.STOPS}
    with pytest.raises(KeyboardInterrupt):
        progress.run(trainer, 2)
    assert (trainer.step, trainer.stop) == (1, True)
    assert {number: signal.getsignal(number) for number in progress.STOPS} == before


def test_demo_in_small(tmp_path, monkeypatch) -> None:
    """A few steps and samples: everything is written, and the verdict is a failure with its reasons."""
    out = tmp_path / "demo"
    monkeypatch.setattr("imm.cli.demo.SAMPLES", 200)
    result = call("demo", "--steps", "10", "--out", out, ok=False)
    assert result.exit_code == 1
    assert "FAILED: one-step label match" in result.output
    assert "resume: 12 steps and 4 + stop + 8 steps are equal bit for bit" in result.output
    assert result.output.strip().splitlines()[-1].startswith(f"results: {out}/")
    for name in ("samples.png", "metrics.json", "checkpoint.safetensors", "stats.jsonl", "report.html"):
        assert (out / name).stat().st_size > 0
    assert set(json.loads((out / "metrics.json").read_text())["scores"]) == {
        "1 step", "2 steps", "4 steps", "8 steps", "class means", "real",
    }  # fmt: skip
    report = (out / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 3  # samples, curves, the grid of the one save
    assert "http" not in report
    with Image.open(out / "samples.png") as picture:
        assert picture.width > 500
    monkeypatch.setattr("imm.cli.demo.resume_is_exact", lambda *args: True)  # was looked at above
    again = call("demo", "--steps", "10", "--out", tmp_path / "again", ok=False)
    assert (out / "samples.png").read_bytes() == (tmp_path / "again" / "samples.png").read_bytes()
    assert again.exit_code == 1
    resumed = call("demo", "--steps", "11", "--out", out, "--resume", ok=False)
    assert "resuming at step 10" in resumed.output


def test_demo_leaves_other_files_alone(digits, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("imm.cli.demo.SAMPLES", 200)
    monkeypatch.setattr("imm.cli.demo.resume_is_exact", lambda *args: True)
    call("train", "--data", digits, "--out", out, "--steps", "4", *TRAIN)
    call("train", "--data", digits, "--out", tmp_path / "demo" / "training", "--steps", "4", *TRAIN)
    (tmp_path / "demo" / "demo-training").mkdir()
    own = tmp_path / "demo" / "demo-training"
    (own / "training-state-0000001").mkdir()  # what a demo left that was killed
    for name in ("notes.txt", "training-state-0000001/settings.json", "training-state.safetensors"):
        (own / name).write_text("mine")
    read = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = read()
    assert "out: expected a folder without a training run" in refused("demo", "--steps", "1", "--out", out)
    assert read() == before
    call("demo", "--steps", "1", "--out", tmp_path / "demo", ok=False)
    after = read()
    changed = {path.name for path, content in before.items() if after.get(path) != content}
    assert changed == {"settings.json", "training-state.safetensors"}  # the latter of an earlier version


def test_demo_verdict() -> None:
    from imm.cli.demo import verdict
    from imm.evaluation import PixelScores

    blur = PixelScores(1.0, 0.0, 0.08)
    assert verdict(PixelScores(0.9, 0.85, 0.004), blur) == []
    assert len(verdict(blur, blur)) == 2  # a blur of the class means fails by spread and by MMD
    assert len(verdict(PixelScores(float("nan"), float("nan"), float("nan")), blur)) == 3
    assert "below 80%" in verdict(PixelScores(0.79, 0.9, 0.0), blur)[0]


def test_demo_header_comes_at_once(tmp_path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # what else the machine does has no part in it
    start = used()
    process = subprocess.Popen(
        [*IMM, "demo", "--steps", "2000", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    text = ""
    while "plan:" not in text and (line := process.stdout.readline()):
        text += line
    process.kill()
    process.wait()
    seconds = used() - start
    for word in ("demo on", "mmd_loss: ", "5000 digits", "parameters", "plan: 2000 steps"):
        assert word in text
    assert seconds < 10, f"{seconds:.1f} s"  # 2 s
