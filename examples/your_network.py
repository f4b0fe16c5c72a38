"""Your own network in a FlowMap: anything called network(x, t, s, labels) with an attribute num_classes will do.

Here: an MLP learns a ring of eight Gaussians, unconditionally, and samples it in a few steps.
"""

import argparse
import math

import torch
from torch import nn

import imm


class MLP(nn.Module):
    """Points in the plane; both times, scaled to 0..1000, enter as sines and cosines."""

    num_classes = 0

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 + 4 * 8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x, t, s, labels):
        phases = [time[:, None] / 1000 * math.pi * 2.0 ** torch.arange(-1, 7) for time in (t, s)]  # [B, 8] each
        waves = [wave.to(x.dtype) for phase in phases for wave in (phase.sin(), phase.cos())]
        return self.layers(torch.cat([x, *waves], dim=1))


def ring(count: int) -> torch.Tensor:
    """Eight tight Gaussians on a circle; standard deviation near 0.5 per axis."""
    angle = torch.randint(0, 8, (count,)) * (2 * math.pi / 8)
    return 0.7 * torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    flow_map = imm.FlowMap(MLP())
    objective = imm.IMMObjective(flow_map, k=8, a=1)
    optimizer = torch.optim.AdamW(flow_map.parameters(), lr=2e-3)
    for step in range(steps):
        loss, stats = objective(ring(512))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        if (step + 1) % max(1, steps // 5) == 0:
            print(f"step {step + 1}: loss {float(stats['loss']):.5f}")

    flow_map.eval()
    for jumps in (1, 2, 4):
        samples = imm.Sampler(flow_map, steps=jumps, shape=(2,)).sample(range(2000))
        radius = samples.norm(dim=1)
        print(f"{jumps} steps: radius {radius.mean():.3f} +- {radius.std():.3f} (data: 0.70 +- 0.05)")


if __name__ == "__main__":
    main()
