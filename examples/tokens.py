"""Digits as sequences of 16 continuous tokens: a causal transformer outside, a head of one or two steps inside.

A digit of 16x16 is cut into 4x4 patches, 16 tokens of 16 numbers; the class is the prefix. Backbone and head learn together by
the energy score at every time, from a head with a latent. With --imm the backbone learns by flow matching, and a second head
learns on its frozen z by IMM. Real digits whose tokens are shuffled among the images of their class pass the first three
scores; the slope of the covariance between tokens tells them apart.
"""

import argparse
import time

import torch
from torch import Tensor, nn

from imm import FlowMap, Sampler, TokenSampler
from imm.data import mnist_5k
from imm.data.images import to_float
from imm.evaluation import PixelReference, covariance_slope, forced_energy_score
from imm.networks import CausalTransformer, TokenHead
from imm.objectives import IMM, EnergyScore, FlowMatching, Objective
from imm.studies.axes import DIM, SIDE, TOKENS, WIDTH, to_images, to_tokens


def train(
    backbone: CausalTransformer, objective: Objective, tokens: Tensor, labels: Tensor, steps: int, *, frozen: bool, repeat: int
) -> None:
    """AdamW, a linear decay over the second half, an average of 0.995 that replaces the weights at the end.

    ``repeat``: head rows a token; where the loss has groups, they are of different tokens.
    """
    learned = nn.ModuleList([objective] if frozen else [backbone, objective])
    weights = list(learned.parameters())
    average = torch.optim.swa_utils.AveragedModel(learned, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100) * min(1, 2 * (1 - i / steps)))
    for step in range(steps):
        rows = torch.randint(0, len(tokens), (32,))
        with torch.set_grad_enabled(not frozen):
            z = backbone(tokens[rows], labels[rows]).reshape(-1, WIDTH)
        loss, _ = objective(tokens[rows].reshape(-1, DIM).repeat(repeat, 1), cond=z.repeat(repeat, 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(learned)
        if step == 0 or (step + 1) % max(1, steps // 4) == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    learned.load_state_dict(average.module.state_dict())


def score(name: str, backbone: CausalTransformer, head: FlowMap, steps: int, real: Tensor, labels: Tensor, count: int) -> None:
    """Sample, one seed a sequence, and print what it scores."""
    backbone.eval(), head.eval()
    sampler = TokenSampler(backbone, head, steps=steps, max_tokens=TOKENS, rows=250)
    classes = torch.arange(count) % 10
    started = time.perf_counter()
    made = sampler.sample(range(count), classes)
    spent = (time.perf_counter() - started) / (count * TOKENS)
    scores = PixelReference(to_images(real), labels, 10).score(to_images(made), classes)
    slope = covariance_slope(made, classes, real, labels)
    with torch.no_grad():
        z = backbone(real[:500], labels[:500]).reshape(-1, WIDTH)
    method = "restart" if head.latent_dim else "pushforward"
    forced = forced_energy_score(Sampler(head, steps=steps, method=method, shape=(DIM,)), z, real[:500].reshape(-1, DIM))
    print(
        f"{name}, {steps} step{'s' if steps > 1 else ''}: label match {scores.label_match:.1%}, spread {scores.spread:.1%}, "
        f"MMD {scores.mmd:.4f}, slope {slope:.2f}, energy score with real tokens before {forced:.3f}, "
        f"{spent * 1e6:.0f} us a token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--imm", action="store_true", help="flow matching, then a head by IMM on its z")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data = mnist_5k(SIDE)
    real, labels = to_tokens(to_float(data.images)), data.labels
    backbone = CausalTransformer(DIM, WIDTH, depth=3, heads=4, max_tokens=TOKENS, num_classes=10)
    scored = {"real": real, "labels": labels, "count": options.samples}
    if not options.imm:
        network = TokenHead(DIM, WIDTH, WIDTH, 2, latent_dim=DIM, frequencies=64)
        head = FlowMap(network, parametrization="identity", second_time="none")  # whose output is the token itself
        train(backbone, EnergyScore(head, samples=2), real, labels, options.steps, frozen=False, repeat=1)
        for steps in (1, 2):
            score("energy score", backbone, head, steps, **scored)
        return
    head = FlowMap(TokenHead(DIM, WIDTH, WIDTH, 2, frequencies=64), second_time="none")
    train(backbone, FlowMatching(head), real, labels, options.steps, frozen=False, repeat=2)
    for steps in (1, 32):
        score("flow matching", backbone, head, steps, **scored)
    head = FlowMap(TokenHead(DIM, WIDTH, WIDTH, 2, frequencies=64))
    train(backbone, IMM(head, particles=4, k=12, a=1), real, labels, options.steps * 5 // 6, frozen=True, repeat=2)
    for steps in (1, 2):
        score("IMM on frozen z", backbone, head, steps, **scored)


if __name__ == "__main__":
    main()
