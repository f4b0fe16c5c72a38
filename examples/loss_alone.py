"""The loss alone, in somebody's training loop: a generator matched to data by MMD, no flow map and no times.

mmd_loss compares sets of particles group by group; the gradient goes to the first argument.
"""

import argparse

import torch
from torch import nn

from imm.functional import mmd_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    groups, particles, features = 4, 64, 8
    mixing = torch.randn(features, features) / features**0.5
    generator = nn.Sequential(nn.Linear(features, 64), nn.SiLU(), nn.Linear(64, features))
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)
    scale = torch.full((groups,), float(features))  # kernel exp(-scale ||x - y|| / D)
    for step in range(steps):
        data = torch.randn(groups, particles, features) @ mixing + 1.0
        samples = generator(torch.randn(groups, particles, features))
        loss = mmd_loss(samples, data, scale).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0 or (step + 1) % max(1, steps // 4) == 0:
            print(f"step {step + 1}: squared MMD {loss.item():.5f}")
    with torch.no_grad():
        samples = generator(torch.randn(10000, features))
    data = torch.randn(10000, features) @ mixing + 1.0
    error = (torch.cov(samples.T) - torch.cov(data.T)).norm() / torch.cov(data.T).norm()
    print(f"mean: {samples.mean():.3f} (data {data.mean():.3f}); relative error of the covariance: {error:.3f}")


if __name__ == "__main__":
    main()
