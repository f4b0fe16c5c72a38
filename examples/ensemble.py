"""A probabilistic forecaster trained by the energy score: an ensemble whose spread is right, as its rank histogram shows.

The forecast is of two correlated numbers, whose spread depends on the input. A network turns the input and noise into a member;
the score compares eight members with the one outcome that was observed. If the ensemble is right, the outcome is as likely to
fall below all members as between any two of them: the histogram of its ranks is flat. Without pairs of members in the score,
they collapse to the median, and the outcome falls outside.
"""

import argparse

import torch
from torch import Tensor, nn

from imm.functional import crps, energy_score

MEMBERS = 8


def outcome(state: Tensor) -> Tensor:
    """What happens, [B, 2], given the state [B, 2]: once, at random."""
    noise = torch.randn(len(state), 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    mean = torch.stack([torch.sin(3 * state[:, 0]), state[:, 0] * state[:, 1]], 1)
    return mean + (0.1 + 0.4 * state[:, :1].abs()) * noise


def forecast(network: nn.Module, state: Tensor) -> Tensor:
    """An ensemble, [B, N, 2]."""
    state = state[:, None].expand(-1, MEMBERS, -1)
    return network(torch.cat([state, torch.randn_like(state)], 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        state = 2 * torch.rand(1024, 2) - 1
        loss = energy_score(forecast(network, state), outcome(state)[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 0 or (step + 1) % max(1, steps // 4) == 0:
            print(f"step {step + 1}: energy score {loss.item():.4f}")
    state = 2 * torch.rand(20000, 2) - 1
    with torch.no_grad():
        members, observed = forecast(network, state), outcome(state)
    print(f"CRPS {crps(members.transpose(0, 1), observed).mean():.4f}")
    ranks = (members < observed[:, None]).sum(1).flatten()
    shares = torch.bincount(ranks, minlength=MEMBERS + 1) / len(ranks)
    print("rank histogram:", " ".join(f"{share:.3f}" for share in shares))
    print(f"largest distance from flat: {(shares * (MEMBERS + 1) - 1).abs().max():.2f}")


if __name__ == "__main__":
    main()
