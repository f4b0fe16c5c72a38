"""Published settings by name: network, flow map, objective, training and sampler. Most are the paper's (tables 5 and 1,
sections I.2 and I.6); of two other papers there is what trains without guidance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from imm.flow_map import FlowMap
from imm.networks import NETWORKS
from imm.networks.dit import SIZES


@dataclass(frozen=True)
class Preset:
    """Keyword arguments, by what takes them; what is not named keeps its default.

    network: a name in :data:`imm.networks.NETWORKS`, made with ``arguments``. flow_map: of :class:`imm.FlowMap`. loss: a name
    in :data:`imm.objectives.OBJECTIVES`, made with ``objective``. sampling: of :class:`imm.Sampler`. training: of
    :class:`imm.training.TrainConfig`. steps: in all, or None.
    """

    network: str
    arguments: dict[str, Any]
    flow_map: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    loss: str = "imm"

    def build(self) -> FlowMap:
        """The flow map with fresh weights, on the CPU in training mode."""
        return FlowMap(NETWORKS[self.network](**self.arguments), **self.flow_map)


#: What the paper's settings have alike.
_FLOW_MAP: dict[str, Any] = {"schedule": "fm", "t_max": 0.994}
_OBJECTIVE: dict[str, Any] = {"particles": 4, "kernel": "laplace", "mapping_kind": "eta"}
_TRAINING: dict[str, Any] = {"batch": 4096, "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0, "ema": 0.9999}


def _dit(
    size: str, patch: int, second_time: str = "identity", a: int = 1, min_gap: float | None = None, precision: str = "tf32"
) -> Preset:
    """A DiT on ImageNet-256 latents (4x32x32, 1000 classes) with the paper's settings for it."""
    return Preset(
        network="DiT",
        arguments={"size": size, "patch": patch, "channels": 4, "resolution": 32, "num_classes": 1000},
        flow_map={**_FLOW_MAP, "parametrization": "euler_fm", "second_time": second_time, "t_min": 0.0},
        objective={**_OBJECTIVE, "k": 12, "a": a, "b": 4.0, "min_gap": min_gap, "label_dropout": 0.1},
        sampling={"steps": 8, "kind": "uniform", "guidance": 1.5},
        training={**_TRAINING, "optimizer": "adamw", "precision": precision, "xflip": False, "augment": 0.0},
        steps=1_200_000,
    )


#: Latents of the other papers' networks, and times up to pure noise: their losses need no eta, which is infinite there.
_LATENTS: dict[str, Any] = {"channels": 4, "resolution": 32}
_TO_NOISE: dict[str, Any] = {"parametrization": "euler_fm", "second_time": "stride", "t_min": 0.0, "t_max": 1.0}

#: Shortcut models (Frans et al. 2025, arXiv 2410.12557, table 3), CelebA-HQ. The quarter of the batch that bootstraps is the
#: paper's; its code has an eighth unless told otherwise. The targets are the learning network's here, and its average's there.
#: That network sees t and log2 of the step; this one sees t and the step.
_SHORTCUT = Preset(
    network="DiT",
    arguments={"size": "B", "patch": 2, **_LATENTS, "num_classes": 0},
    flow_map=_TO_NOISE,
    objective={"bootstrap": 0.25, "depth": 7},
    sampling={"steps": 1, "kind": "uniform"},
    training={"batch": 64, "optimizer": "adamw", "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.1, "ema": 0.999},
    steps=400_000,
    loss="shortcut",
)

#: MeanFlow (Geng et al. 2025, arXiv 2505.13447, table 1): the ablation without guidance, FID 61.06 in one step after 80 epochs.
#: The paper's best figures are of training with guidance, which is out of scope here. Its code does not scale the times that a
#: network sees, which keeps the tangent small. Its c = 1e-3 is beside a sum of 4096 squares, here beside their mean.
_MEANFLOW = Preset(
    network="DiT",
    arguments={"size": "B", "patch": 4, **_LATENTS, "num_classes": 1000},
    flow_map={**_TO_NOISE, "time_scale": 1.0},
    objective={"fm_share": 0.75, "times": "logit_normal", "power": 1.0, "floor": 1e-3 / 4096, "label_dropout": 0.1},
    sampling={"steps": 1, "kind": "uniform"},
    training={"batch": 256, "optimizer": "adamw", "lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0, "ema": 0.9999},
    steps=400_000,
    loss="meanflow",
)

#: "cifar10", "imagenet256-ts-a2" and "-s-a1" are the published checkpoints' (for CIFAR-10 the paper has b = 5, a public
#: training tree 4). "dit-SIZE-PATCH" has the settings of the paper's DiT-S, B and L, which differ in size alone.
PRESETS: dict[str, Preset] = {
    "cifar10": Preset(
        network="DDPMpp",
        arguments={"channels": 3, "resolution": 32, "num_classes": 0, "width": 128, "dropout": 0.2},
        flow_map={**_FLOW_MAP, "parametrization": "simple_edm", "second_time": "identity", "t_min": 0.006},
        objective={**_OBJECTIVE, "k": 15, "a": 1, "b": 5.0},
        sampling={"steps": 2, "kind": "eta", "mid_eta": (1.4,)},
        training={**_TRAINING, "optimizer": "radam", "precision": "tf32", "xflip": True, "augment": 0.12},
        steps=400_000,
    ),
    "imagenet256-ts-a2": _dit("XL", 2, second_time="stride", a=2, min_gap=1e-4, precision="fp16"),
    "imagenet256-s-a1": _dit("XL", 2),
    "imagenet256-meanflow-b-4": _MEANFLOW,
    "celebahq256-shortcut": _SHORTCUT,
    **{f"dit-{size.lower()}-{patch}": _dit(size, patch) for size in SIZES for patch in (2, 4, 8)},
}


def get(name: str) -> Preset:
    """The preset called ``name``, one of :data:`PRESETS`. Raises ValueError for any other name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; expected one of {list(PRESETS)}")
    return PRESETS[name]


def flow_map(name: str) -> FlowMap:
    """The preset's flow map with fresh weights, on the CPU in training mode. Raises ValueError for an unknown name."""
    return get(name).build()
