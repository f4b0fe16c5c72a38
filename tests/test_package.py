"""Packages: compiled ahead of time, run by the C++ loop from Python and by imm_generate without it."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import imm
from imm import FlowMap, Sampler, checkpoints, package
from imm.cli import main
from imm.networks import DiT, UNet
from imm.ops import native

pytestmark = pytest.mark.skipif(native.module() is None, reason=f"no native library: {native.status()}")
LABELS = [0, 1, 2, 3, 0, 1]


def flow_map(num_classes: int = 3) -> FlowMap:
    torch.manual_seed(0)
    network = UNet(1, 8, num_classes, width=8, multipliers=(1, 2))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return FlowMap(network).eval()


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of four rows, exported by the command."""
    folder = tmp_path_factory.mktemp("package")
    checkpoints.save(folder / "net.safetensors", flow_map())
    command = ["export", f"--net={folder / 'net.safetensors'}", f"--out={folder / 'net.pt2'}", "--batch=4", "--guided"]
    result = CliRunner().invoke(main, [*command, "--steps=2", "--method=restart"])
    assert result.exit_code == 0, result.output
    assert "2 steps of 4 images at a time" in result.output
    assert "imm_generate --package=" in result.output
    assert {path.name for path in folder.iterdir()} == {"net.safetensors", "net.pt2"}
    return folder / "net.pt2"


def expected(w: float) -> torch.Tensor:
    return Sampler(flow_map(), steps=2, method="restart").sample(range(6), LABELS, w)


def test_it_gives_the_images_of_the_sampler(guided) -> None:
    packed = package.Package(guided)
    assert (packed.rows, packed.num_classes, packed.guided) == (4, 3, True)
    for w in (0.5, 2.0):
        torch.testing.assert_close(packed.sample(range(6), LABELS, w), expected(w), rtol=1e-5, atol=1e-5)
    none = packed.sample([0], guidance=[1.0])
    torch.testing.assert_close(none, packed.sample([0], [3], 1.0), rtol=0, atol=0)
    assert packed.sample([], [], 1.0).shape == (0, 1, 8, 8)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.sample([0], guidance=[1.0]), none)


def test_lengths_and_threads(guided) -> None:
    packed = package.Package(guided)
    for arguments, text in (
        (([0, 1], [0, 1, 2], 1.0), r"labels: expected \[2\] int64, got \[3\]"),
        (([0, 1], [0, 4], 1.0), r"labels: expected classes 0\.\.2 or 3 for none"),
        (([0, 1], [0, 1], [1.0, 2.0, 3.0]), r"guidance: expected a finite number or \[2\]"),
        (([0, 1], [0, 1], float("nan")), "guidance: expected a finite number"),
        (([0, 1], [0, 1]), "guidance: expected a scale, got None"),
    ):
        with pytest.raises(ValueError, match=text):
            packed.sample(*arguments)
    right = [packed.sample([i], [0], 1.0) for i in range(4)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: packed.sample([i % 4], [0], 1.0), range(40)))
    assert all(torch.equal(value, right[i % 4]) for i, value in enumerate(found))


def test_no_python_runs_between_the_steps(guided) -> None:
    packed = package.Package(guided)
    seeds, labels, w = torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    events: list[str] = []

    def trace(frame, event, argument) -> None:
        events.append(f"{event} {getattr(argument, '__name__', frame.f_code.co_name)}")

    sys.setprofile(trace)
    try:
        packed._loop.run(seeds, labels, w, None)
    finally:
        sys.setprofile(None)
    assert [event for event in events if "setprofile" not in event] == ["c_call run", "c_return run"]


def generate(*options: str) -> subprocess.CompletedProcess[str]:
    program = native.program("imm_generate")
    assert program is not None
    return subprocess.run([program, *options], capture_output=True, text=True, check=False)


def test_imm_generate_gives_the_images_of_the_sampler(guided, tmp_path) -> None:
    out = tmp_path / "images.npy"
    done = generate(f"--package={guided}", "--seeds=0-3,4,5", "--labels=0-3,0,1", "--cfg=2", f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"6 images of [1, 8, 8]: {out}\n"
    images = np.load(out)
    assert images.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(images), expected(2.0), rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--seeds=0",), "guidance: expected a scale"),
        (("--seeds=0", "--cfg=x"), "guidance: expected a number, got 'x'"),
        (("--seeds=3-0", "--cfg=1"), "seeds: expected numbers and ranges such as 0-63,70, got '3-0'"),
        (("--seeds=-1", "--cfg=1"), "seeds: expected numbers and ranges"),
        (("--seeds=", "--cfg=1"), "seeds: expected numbers and ranges"),
        (("--seeds=0", "--cfg=1", "--labels=4"), "labels: expected classes up to 3, which is none, got 4"),
        (("--seeds=0", "--cfg=1", "--steps=3"), "unknown option --steps"),
        (("--cfg=1",), "--seeds is missing"),
    ],
)
def test_imm_generate_refuses(options, text, guided, tmp_path) -> None:
    done = generate(f"--package={guided}", f"--out={tmp_path / 'images.npy'}", *options)
    assert done.returncode == 2
    assert f"imm_generate: {text}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_files_that_export_did_not_write(guided, tmp_path) -> None:
    other = tmp_path / "other.pt2"  # a package as torch writes it, without what export adds
    with zipfile.ZipFile(guided) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("_metadata.json"):
                kept = {key: value for key, value in json.loads(content).items() if not key.startswith("imm_")}
                content = json.dumps(kept).encode()
            target.writestr(name, content)
    with pytest.raises(ValueError, match="expected one that `imm export` wrote, got one without imm_t"):
        package.Package(other)
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(other.read_bytes()[:1000])
    done = generate(f"--package={broken}", "--seeds=0", f"--out={tmp_path / 'images.npy'}")
    assert done.returncode == 1
    assert done.stderr.startswith("imm_generate: ")
    with pytest.raises(FileNotFoundError, match="package: expected a file that imm export wrote"):
        package.Package(tmp_path / "none.pt2")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"path": "net.zip"}, ValueError, r"out: expected a file name that ends in \.pt2, got net\.zip"),
        ({"rows": 0}, ValueError, "rows: expected a count >= 1, got 0"),
        ({"steps": 0}, ValueError, "steps: expected at least 1"),
        ({"path": "nowhere/net.pt2"}, ValueError, "out: expected a file in a folder that is there"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected one of"),
        ({"state_dtype": torch.float16}, TypeError, "state_dtype: expected one of"),
        ({"guided": True, "num_classes": 0}, ValueError, "guidance: expected a class-conditional network"),
    ],
)
def test_export_refuses_before_it_compiles(options, error, text) -> None:
    options = {"path": "net.pt2", "rows": 1, "steps": 1, "num_classes": 3} | options
    with pytest.raises(error, match=text):
        package.export(flow_map(options.pop("num_classes")), options.pop("path"), **options)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dit_without_classes_and_in_16_bits(dtype, tmp_path) -> None:
    torch.manual_seed(0)
    exact = FlowMap(DiT("S", patch=4, resolution=16, num_classes=0)).eval()
    for parameter in exact.parameters():
        nn.init.normal_(parameter, std=0.02)
    package.export(exact, tmp_path / "net.pt2", rows=2, steps=3, dtype=dtype)
    out = package.Package(tmp_path / "net.pt2").sample(range(3))
    bound = 1e-5 if dtype == torch.float32 else 0.05
    want = imm.Sampler(exact, steps=3).sample(range(3))
    assert float((out - want).abs().max() / want.abs().max()) < bound


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_as_one_graph_and_without_python(tmp_path) -> None:
    path, out = tmp_path / "net.pt2", tmp_path / "images.npy"
    on_gpu = flow_map().to("cuda")
    package.export(on_gpu, path, rows=4, steps=2, method="restart", guided=True)
    right = Sampler(on_gpu, steps=2, method="restart").sample(range(6), LABELS, 2.0)
    captured, by_step = (package.Package(path, graph=graph) for graph in (True, False))
    assert (captured._loop.captured, by_step._loop.captured) == (True, False)
    for packed in (captured, by_step, captured):
        torch.testing.assert_close(packed.sample(range(6), LABELS, 2.0), right, rtol=1e-4, atol=1e-4)
    for more in ((), ("--no-graph",)):
        done = generate(f"--package={path}", "--seeds=0-3,4,5", "--labels=0-3,0,1", "--cfg=2", f"--out={out}", *more)
        assert (done.returncode, done.stderr) == (0, "")
        # A process of its own has torch's defaults: convolutions in TF32.
        torch.testing.assert_close(torch.from_numpy(np.load(out)), right.cpu(), rtol=1e-2, atol=1e-2)
