"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from published_files import read_here

from imm import pickles
from imm.flow_map import FlowMap
from imm.networks import UNet

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


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
def small_unet() -> UNet:
    """A conditional U-Net on 8x8 images whose output is not 0."""
    network = UNet(channels=1, resolution=8, num_classes=3, width=8, multipliers=(1, 2))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.fixture
def small_flow_map(small_unet: UNet) -> FlowMap:
    """A flow map around :func:`small_unet`, in evaluation mode."""
    return FlowMap(small_unet).eval()
