"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from imm.flow_map import FlowMap
from imm.networks import UNet

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


@pytest.hookimpl(tryfirst=True)  # before those that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked ``every(n)`` the parametrizations but the first of every n are "full". Choose n without a factor in
    common with the numbers of values, so that each value of each parameter stays. On a GPU, which is fast, and before figures
    of a benchmark all of them run."""
    if torch.cuda.is_available() or "IMM_GATE_TESTS" in os.environ:
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
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" and, where there is one, "cuda"."""
    return request.param


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
