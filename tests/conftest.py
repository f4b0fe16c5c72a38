"""Fixtures shared by all tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from published_files import read_here
from small import spread

from imm import pickles
from imm.evaluation import networks
from imm.flow_map import FlowMap
from imm.networks import DDPMpp, DiT, UNet, dit

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``every(n)`` the parametrizations but the first of every n are "full". Choose n without a factor in
    common with the numbers of values, so that each value of each parameter stays. On a GPU, which is fast, all of them run."""
    if torch.cuda.is_available():
        return
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is not None and item.get_closest_marker("full") is None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % mark.args[0]:
                item.add_marker(pytest.mark.full)
            seen[name] += 1


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """Convolutions on CUDA without TF32, which torch has on for them alone: 1e-3, and another error with each algorithm."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" and, where there is one, "cuda"."""
    return request.param


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles are read in this process: quicker, but nothing limits what they ask for."""
    monkeypatch.setattr(pickles, "_read", read_here)


@pytest.fixture
def vae() -> Any:
    """An autoencoder as small as they come, with the settings that tell an sd-vae-ft."""
    pytest.importorskip("diffusers")
    from test_latents import tiny_vae

    return tiny_vae()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Mean colours, of the left and the right half, in the place of the feature networks, which are not installed everywhere.

    Lists how many pictures each call was of.
    """
    seen: list[int] = []

    def load(name: str, weights: Any = None, device: str = "cpu") -> networks.FeatureNetwork:
        def forward(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            seen.append(len(images))
            features = images.float().unflatten(3, (2, -1)).mean((2, 4)).flatten(1) / 255
            return features, features if name == networks.INCEPTION else None

        classes = 6 if name == networks.INCEPTION else 0
        return networks.FeatureNetwork(name, "0" * 64, "none", "mean colours", 6, classes, forward)

    monkeypatch.setattr(networks, "load", load)
    return seen


@pytest.fixture
def small_unet() -> UNet:
    """A conditional U-Net on 8x8 images whose output is not 0."""
    return spread(UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2)))


@pytest.fixture
def small_flow_map(small_unet: UNet) -> FlowMap:
    """A flow map around :func:`small_unet`, in evaluation mode."""
    return FlowMap(small_unet).eval()


@pytest.fixture
def size_t(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT has a size T, below all that are published."""
    monkeypatch.setitem(dit.SIZES, "T", (32, 2, 2))


@pytest.fixture
def small_dit(size_t: None) -> FlowMap:
    """A DiT of the published kind, small, with an output that is not 0."""
    return FlowMap(spread(DiT("T", 4, channels=4, resolution=8, num_classes=5)), t_max=0.98).eval()


@pytest.fixture
def small_ddpmpp() -> FlowMap:
    """A small DDPM++ with an output that is not 0."""
    network = DDPMpp(channels=3, resolution=8, width=32, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.1)
    return FlowMap(spread(network, 0.05), parametrization="simple_edm").eval()
