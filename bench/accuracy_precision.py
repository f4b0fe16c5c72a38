"""The error of a training gradient by precision: of the demo's network half way through training, against float64.

    python bench/accuracy_precision.py [--net tests/data/half_trained.safetensors]      prints the table of docs/training.md

Each cell is |g - g64| / |g64| over all parameters, and their cosine, for the same images, times and noise. Half precision is
autocast, on the CPU; TF32 is emulated by rounding the operands of matmuls and convolutions to 10 bits of mantissa. Random
weights would show nothing: their two branches differ by much more than rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imm import checkpoints
from imm.data import mnist_5k, to_float
from imm.flow_map import FlowMap
from imm.objective import Draws, IMMObjective

ROOT = Path(__file__).resolve().parents[1]
NET = ROOT / "tests" / "data" / "half_trained.safetensors"
BATCH = 256
#: Column -> k, and the paper's settings for half precision (section I.6) or those of the demo.
SETTINGS: dict[str, dict[str, Any]] = {
    "k = 10": {"k": 10, "a": 1},
    "k = 12": {"k": 12, "a": 1},
    "k = 12, gap 1e-4, a = 2": {"k": 12, "a": 2, "min_gap": 1e-4},
    "k = 15": {"k": 15, "a": 1},
}
#: fp16's loss scale here; a GradScaler finds one of its size.
LOSS_SCALE = 2.0**16
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
#: The operands among an op's arguments; biases are added in float32.
_OPERANDS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "convolution": (0, 1), "convolution_backward": (0, 1, 2)}


class TF32(TorchDispatchMode):
    """Within, float32 operands of products are rounded to TF32's 10 bits of mantissa; sums stay float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = _OPERANDS.get(func.overloadpacket.__name__, ())
        args = tuple(_rounded(value) if i in operands else value for i, value in enumerate(args))
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return x
    bits = x.clone().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def problem(flow_map: FlowMap, settings: dict[str, Any]) -> tuple[IMMObjective, Tensor, Tensor, Draws]:
    """The objective, images ``[256, 1, 16, 16]``, labels and draws that every precision shares."""
    data = mnist_5k(flow_map.image_shape[1])
    assert data.labels is not None
    picked = torch.arange(0, len(data.images), len(data.images) // BATCH)[:BATCH]
    x = to_float(data.images[picked])
    objective = IMMObjective(flow_map, particles=4, **settings)
    draws = objective.draw(x, data.labels[picked], torch.Generator().manual_seed(1))
    return objective, x, data.labels[picked], draws


def gradient(objective: IMMObjective, x: Tensor, labels: Tensor, draws: Draws, precision: str) -> Tensor:
    """The gradient to all parameters in a precision, or in float64 ("fp64"), as one float64 vector."""
    if precision == "fp64":
        wide = copy.deepcopy(objective).double()
        exact = Draws(draws.t, draws.s, draws.r, draws.noise.double(), draws.labels)
        loss, _ = wide(x.double(), labels, draws=exact)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(wide.parameters()))])
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scale = LOSS_SCALE if precision == "fp16" else 1.0
    cast = torch.autocast("cpu", half) if half else contextlib.nullcontext()
    with TF32() if precision == "tf32" else contextlib.nullcontext():
        with cast:
            loss, _ = objective(x, labels, draws=draws, grad_scale=torch.tensor(scale))
        found = torch.autograd.grad(loss, list(objective.parameters()))
    return torch.cat([g.double().flatten() for g in found]) / scale


def errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """|g - g64| / |g64|, and the cosine between them."""
    return float((found - exact).norm() / exact.norm()), float(torch.cosine_similarity(found, exact, dim=0))


def table(net: Path) -> str:
    """The rows as Markdown."""
    flow_map = checkpoints.load(net).train()
    lines = [["", *SETTINGS], ["---"] * (1 + len(SETTINGS)), *([precision] for precision in PRECISIONS)]
    for settings in SETTINGS.values():
        given = problem(flow_map, settings)
        exact = gradient(*given, "fp64")
        for line, precision in zip(lines[2:], PRECISIONS, strict=True):
            error, cosine = errors(gradient(*given, precision), exact)
            line.append(f"{error:.2g} ({cosine:.4f})")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", type=Path, default=NET, help="a checkpoint of 16x16 digits")
    print(table(parser.parse_args().net))


if __name__ == "__main__":
    main()
