"""Steps of training on several processes, for test_training_shards.py; under torchrun: ``shards.py OUT SHARD [CASE ...]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from small import spread
from torch import Tensor, nn

from imm import FlowMap
from imm.data import ImageData
from imm.distributed import Processes, processes
from imm.networks import DDPMpp, DiT, TokenModel, UNet, dit
from imm.objectives import OBJECTIVES, AnyObjective, SequenceObjective
from imm.training import TrainConfig, Trainer, sharding

BATCH = 24


class Own(nn.Module):
    """A user's network, whose blocks are units by their class; half of it learns nothing."""

    channels, resolution, num_classes = 3, 8, 3

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.affine = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x: Tensor, condition: Tensor) -> Tensor:
            return x + torch.tanh(self.conv(x) + self.affine(condition)[:, :, None, None])

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.classes = nn.ModuleList([self.Block() for _ in range(2)]), nn.Embedding(4, 2)
        self.unused, self.fixed = nn.Linear(2, 2), nn.Parameter(torch.ones(5), requires_grad=False)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.unused.weight

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        condition = torch.cat([torch.stack([t, s], 1).to(x.dtype) / 1000, self.classes(labels)], 1)
        for block in self.blocks:
            x = block(x, condition)
        return x * self.fixed[0]


def transformer(**settings) -> nn.Module:
    with patch.dict(dit.SIZES, T=(32, 2, 2)):
        return DiT("T", patch=4, channels=3, resolution=8, num_classes=3, **settings)


def token_model(latent: int = 4) -> nn.Module:
    backbone = {"token_dim": 4, "features": 16, "depth": 2, "heads": 2, "max_tokens": 6, "num_classes": 3}
    return TokenModel(backbone, {"width": 16, "depth": 1, "latent_dim": latent, "frequencies": 8})


def _loss(name: str, network: nn.Module, **settings) -> AnyObjective:
    arguments = {"particles": 2} if name == "imm" else {"samples": 2} if name == "energy" else {}
    time_scale = 1.0 if name == "meanflow" else 1000.0
    made = OBJECTIVES[name](FlowMap(spread(network, 0.2), time_scale=time_scale), label_dropout=0.3, **arguments, **settings)
    return SequenceObjective(made) if isinstance(network, TokenModel) else made


#: Name -> what makes the objective; more settings of the run.
CASES: dict[str, tuple[Callable[[], AnyObjective], dict]] = {
    **{name: (lambda name=name: _loss(name, transformer()), {}) for name in OBJECTIVES},
    "checkpointing": (lambda: _loss("imm", transformer(checkpointing=True)), {}),
    "parts": (lambda: _loss("imm", transformer()), {"batch_gpu": 2}),
    "unet": (lambda: _loss("imm", UNet(3, 8, 3, width=8, multipliers=(1, 2))), {}),
    "ddpmpp": (lambda: _loss("fm", DDPMpp(3, 8, 3, width=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0)), {}),
    "own": (lambda: _loss("fm", Own()), {}),
    "tokens": (lambda: _loss("energy", token_model()), {}),
    "frozen tokens": (lambda: _loss("imm", token_model(latent=0)), {}),
    "half": (lambda: _loss("imm", transformer()), {"precision": "fp16"}),
    "averages": (lambda: _loss("imm", transformer()), {"ema_lengths": (0.1,), "clip": 0.5, "optimizer": "radam"}),
}


def data_of(name: str) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    shape = (40, 6, 4) if "tokens" in name else (40, 3, 8, 8)
    return ImageData(0.5 * torch.randn(shape, generator=generator), torch.arange(40) % 3, 3, "made up")


def trainer(name: str, folder: Path, where: Processes, shard: int = 1) -> Trainer:
    make, settings = CASES[name]
    torch.manual_seed(where.rank)  # rank 0's weights are all that counts
    config = TrainConfig(batch=BATCH, lr=1e-3, ema=0.9, log_every=1, snapshot_every=100, shard=shard, **settings)
    return Trainer(make(), data_of(name), folder / name, config, where=where, units=(Own.Block,) if name == "own" else ())


def overflows(made: Trainer, where: Processes) -> bool:
    """Whether no process makes a step in which one gradient of the last shard alone is infinite."""
    kept, gradients = [p.detach().clone() for p in made._shards.parameters], made._shards.gradients

    def poisoned() -> list[Tensor]:
        found = gradients()
        if where.rank % made.config.shard == made.config.shard - 1:  # replicas are alike
            next(g for g in reversed(found) if g.numel()).fill_(torch.inf)
        return found

    made._shards.gradients = poisoned  # type: ignore[method-assign]
    made._step()
    same = all(torch.equal(a, b) for a, b in zip(kept, made._shards.parameters, strict=True))
    return where.total(int(same)) == where.world


def run(names: list[str], folder: Path, where: Processes, shard: int = 1) -> dict[str, Tensor]:
    """Of each case the gradients of the first step, the losses of six, the average, and the share of the numbers that this
    process keeps."""
    found: dict[str, Tensor] = {}
    for name in names:
        made = trainer(name, folder, where, shard)
        network, losses = made.objective.flow_map.network, []
        for step in range(6):
            stats, norm = made._step()
            made.step += 1
            losses.append(where.sums(stats["loss"].double().cpu()) / where.world)
            if step == 0:
                found[f"{name}/norm"] = norm
                for key, parameter in network.named_parameters():
                    if parameter.grad is not None:
                        found[f"{name}/grad/{key}"] = sharding.whole(parameter.grad)
        found[f"{name}/losses"] = torch.stack(losses)
        if name == "half":
            found["half/skips"] = torch.tensor(overflows(made, where))
        for key, value in made.ema_flow_map.network.state_dict().items():
            found[f"{name}/ema/{key}"] = value.clone()
        tensors = made._state._tensors().values()
        kept, all_of = (sum(part(t).numel() for t in tensors if t.dim()) for part in (sharding.local, lambda t: t))
        found[f"{name}/share"] = torch.tensor(kept / all_of)
        made.save()
        made.close()
    return found


if __name__ == "__main__":
    sharding.SMALL = 0  # every unit, however small
    target, size = Path(sys.argv[1]), int(sys.argv[2])
    with processes() as where:
        result = run(sys.argv[3:] or list(CASES), target, where, size)
        if where.first:
            torch.save(result, target / "found.pt")
