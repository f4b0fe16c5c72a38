"""CPU benchmarks with pytest-benchmark: make bench."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _settings() -> None:
    torch.manual_seed(0)
