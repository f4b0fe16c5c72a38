"""References that bring mean and covariance of Inception features: ADM's batches, and files of mu and sigma alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command_line import call, refused

from imm.cli.eval import cautions
from imm.evaluation import evaluate, load_set, networks
from imm.evaluation.evaluate import ReferenceStatistics, load_networks
from imm.evaluation.networks import INCEPTION
from imm.evaluation.statistics import FeatureStatistics, frechet_distance, is_statistics, read_moments

METRICS = ["fid", "kid", "prdc", "is", "fd-efficientnet-lite0", "mmd-pixels"]
SIZE = 6
pytestmark = pytest.mark.usefixtures("stand_in")


def pictures(seed: int, count: int = 40):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


MU, SIGMA = np.linspace(0.1, 0.9, SIZE), np.diag(np.linspace(0.5, 1.0, SIZE)) + 0.05


@pytest.fixture
def files(tmp_path):
    """Images; the same reference as images alone, as ADM's batch, and as mu and sigma alone."""
    images, reference = pictures(0, 64), pictures(1)
    labels = {"arr_1": np.arange(40) % 4}
    moments = {"mu": MU, "sigma": SIGMA}
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "plain.npz", arr_0=reference, **labels)
    np.savez(tmp_path / "adm.npz", arr_0=reference, **labels, **moments, mu_s=np.zeros(9), sigma_s=np.eye(9))
    np.savez(tmp_path / "alone.npz", **moments)
    return tmp_path


def expected(files) -> float:
    own = FeatureStatistics(SIZE)
    own.update(networks.load(INCEPTION)(load_set(str(files / "images.npz")).pixels)[0])
    return frechet_distance(own.mean, own.covariance(), torch.from_numpy(MU), torch.from_numpy(SIGMA))


def test_fid_is_to_mu_and_sigma_and_all_else_to_the_images(files, stand_in) -> None:
    images = load_set(str(files / "images.npz"))
    measure = lambda name, metrics: evaluate(metrics, images, load_set(str(files / name)), load_networks(metrics))
    adm, plain = measure("adm.npz", METRICS), measure("plain.npz", METRICS)
    assert adm["metrics"].pop("fid") == pytest.approx(expected(files), rel=1e-12)
    assert abs(plain["metrics"].pop("fid") - expected(files)) > 0.1
    assert adm["metrics"] == plain["metrics"]
    settings = adm["protocol"]["settings"]
    assert settings["fid"]["reference"]["statistics"] == "mu and sigma of the file"
    assert len(settings["fid"]["reference"]["sha256"]) == 64
    assert "reference" not in settings["fd-efficientnet-lite0"]
    assert "reference" not in plain["protocol"]["settings"]["fid"]
    assert adm["protocol"]["reference"]["count"] == 40
    assert load_set(str(files / "adm.npz")).notes == ("arrays that are not read: mu_s, sigma_s",)
    stand_in.clear()
    measure("adm.npz", ["fid"])
    assert sum(stand_in) == 64  # nothing is asked of the reference's images


@pytest.mark.parametrize("name", ["adm.npz", "alone.npz"])
def test_the_command_takes_both_and_says_it(name, files) -> None:
    out = files / "out.json"
    output = call("eval", "--data", files / "images.npz", "--ref", files / name, "--out", out, "--metrics", "fid,is").output
    result = json.loads(out.read_text())
    assert result["metrics"]["fid"] == pytest.approx(expected(files), rel=1e-12)
    assert "note: fid: biased upwards by 64 images" in output
    assert "note: fid: to mu and sigma of the reference's file" in output
    assert (", not its images" in output) == (name == "adm.npz")
    call("eval", "compare", out, out)
    call("eval", "--data", files / "images.npz", "--ref", files / "plain.npz", "--out", files / "b.json", "--metrics", "fid")
    assert "settings.fid.reference: " in call("eval", "compare", out, files / "b.json", ok=False).output


def test_what_cannot_be_meant_is_refused(files) -> None:
    def said(*arguments) -> str:
        output = refused("eval", "--data", files / "images.npz", "--out", files / "out.json", *arguments)
        assert not (files / "out.json").exists()
        return output

    alone = ("--ref", files / "alone.npz", "--metrics")
    assert "kid: expected images as the reference, got statistics" in said(*alone, "kid")
    assert "expected reference statistics of efficientnet-lite0, got inception" in said(*alone, "fd-efficientnet-lite0")
    np.savez(files / "small.npz", arr_0=pictures(0, 64)[:, :4, :4])
    output = said("--data", files / "small.npz", "--ref", files / "adm.npz", "--metrics", "fid", "--resolution", "4")
    assert "fid: expected the reference as stored, which its mu and sigma are of" in output
    np.savez(files / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    output = said("--ref", files / "wide.npz", "--metrics", "fid")
    assert "reference: expected mu of the 6 features of inception, got 9" in output
    np.savez(files / "half.npz", arr_0=pictures(1), mu=MU)
    output = said("--ref", files / "half.npz", "--metrics", "fid")
    assert "expected floating mu [D] and sigma [D, D], got mu [6] of float64" in output
    output = refused("eval", "stats", "--data", files / "adm.npz", "--out", files / "s.npz", "--features", "inception")
    assert "features: expected none of inception" in output
    call("eval", "stats", "--data", files / "adm.npz", "--out", files / "s.npz")  # of another network's features


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"mu": MU, "sigma": SIGMA[:3]}, r"sigma \[3, 6\] of float64"),
        ({"mu": np.zeros(()), "sigma": SIGMA}, r"mu \[\] of float64"),
        ({"mu": MU, "sigma": SIGMA.astype(int)}, "of int64"),
        ({"mu": MU, "sigma": SIGMA * np.nan}, "expected finite mu and sigma"),
        ({"mu": MU, "sigma": -SIGMA}, "expected a covariance as sigma"),
        ({"mu": MU, "sigma": SIGMA + np.triu(SIGMA, 1)}, "expected a covariance as sigma"),
        ({"mu": MU.astype(object), "sigma": SIGMA}, "expected a whole .npz file of numbers"),
        ({"sigma": SIGMA}, r"got sigma \[6, 6\]"),
    ],
)
def test_moments_that_are_none(arrays, text, tmp_path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=text):
        read_moments(tmp_path / "a.npz")


def test_moments_in_float32_of_few_images(tmp_path) -> None:
    """Of rank 2: rounding to 32 bits makes small negative eigenvalues."""
    few = np.random.default_rng(0).standard_normal((3, 40))
    np.savez(tmp_path / "a.npz", mu=few.mean(0).astype(np.float32), sigma=np.cov(few.T).astype(np.float32))
    assert is_statistics(tmp_path / "a.npz")
    found = ReferenceStatistics.load(tmp_path / "a.npz").statistics[INCEPTION]
    assert found.frechet_distance(found) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(found.covariance(), np.cov(few.T), atol=1e-5)
    np.savez(tmp_path / "b.npz", images=pictures(0))
    assert read_moments(tmp_path / "b.npz") is None
    assert not is_statistics(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("images", "reference", "settings", "notes"),
    [
        (50_000, 10_000, {"fid": {}}, ["fid: biased upwards by 10000 images"]),
        (10_000, 50_000, {"fid": {}}, ["fid: biased upwards by 10000 images", "fid: of 10000 images; published"]),
        (50_000, 49_999, {"fd-efficientnet-lite0": {}}, ["fd-efficientnet-lite0: biased upwards by 49999 images"]),
        (50_000, 50_000, {"fid": {}}, []),
        (50_000, 10_000, {"fid": {"reference": {}}}, ["fid: to mu and sigma of the reference's file, not its images"]),
        (50_000, None, {"fid": {"reference": {}}}, ["fid: to mu and sigma of the reference's file"]),
        (50_000, 10_000, {"kid": {}}, []),
    ],
)
def test_cautions(images, reference, settings, notes) -> None:
    counts = {"images": {"count": images, "digest": "a"}, "reference": {"count": reference, "digest": "b"}}
    found = cautions({"protocol": {**counts, "settings": settings}})
    assert len(found) == len(notes)
    assert all(one.startswith(note) for one, note in zip(found, notes, strict=True))
