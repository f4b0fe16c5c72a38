"""Others' two-time networks as flow maps: any diffusers transformer that takes a second time, with the settings of diffusers'
``FlowMapEulerDiscreteScheduler``.

Such a network u(x_t, t, r) predicts the average velocity over [r, t]; the scheduler steps ``x_r = x_t - (sigma_t - sigma_r)
u``. With sigma = t this is a flow map: ``parametrization="euler_fm"``, ``sigma_data=1``, and the second time is r itself.
Time runs the same way (1 is noise), times are scaled by ``num_train_timesteps``, and guidance is the same: ``u_none + w (u -
u_none)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imm.flow_map import FlowMap

#: How transformers call the second time.
SECOND_TIME_NAMES = ("timestep_r", "r_timestep")


class TwoTimeTransformer(nn.Module):
    """A diffusers transformer with a second time, as the network of a flow map.

    A class is a row of the conditions (an encoded prompt, say); the last row is "none", what guidance starts from.

    Args:
        transformer: takes ``hidden_states``, ``timestep`` and ``timestep_r`` or ``r_timestep``, and returns a tuple.
        shape: of one sample, without the batch.
        conditions: keyword -> ``[K + 1, ...]``, a row for each class and one for "none".
        constants: further keywords, given as they are.

    Raises:
        ValueError: a transformer without a second time, conditions of unlike lengths.
    """

    def __init__(
        self, transformer: nn.Module, shape: Sequence[int], conditions: Mapping[str, Tensor], constants: Mapping[str, Any]
    ) -> None:
        super().__init__()
        parameters = inspect.signature(transformer.forward).parameters
        found = [name for name in SECOND_TIME_NAMES if name in parameters]
        if not found:
            raise ValueError(
                f"transformer: expected one that takes {' or '.join(SECOND_TIME_NAMES)}, got {type(transformer).__name__}"
            )
        counts = {name: len(rows) for name, rows in conditions.items()}
        if not counts or len(set(counts.values())) > 1:
            raise ValueError(f'conditions: expected as many rows of each, one a class and one for "none", got {counts}')
        self.transformer, self.shape, self.second_time = transformer, tuple(shape), found[0]
        self.num_classes = next(iter(counts.values())) - 1
        self.conditions = nn.ParameterDict({name: nn.Parameter(rows, requires_grad=False) for name, rows in conditions.items()})
        self.constants = dict(constants)
        # Of videos, each frame has its times.
        self.frames = self.shape[0] if self.second_time == "r_timestep" else None

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        none = torch.full((len(x),), self.num_classes, device=x.device)
        rows = none if labels is None else labels
        given = {name: condition[rows] for name, condition in self.conditions.items()}
        times = [time.to(x.dtype) for time in (t, s)]
        if self.frames is not None:
            times = [time[:, None].expand(-1, self.frames) for time in times]
        given |= {"timestep": times[0], self.second_time: times[1]}
        return self.transformer(hidden_states=x, return_dict=False, **given, **self.constants)[0]


class _Unscaled(nn.Module):
    """Undoes c_in: these networks take the state as it is."""

    def __init__(self, network: TwoTimeTransformer, time_scale: float) -> None:
        super().__init__()
        self.network, self.time_scale, self.num_classes = network, time_scale, network.num_classes

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        time = t / self.time_scale
        norm = (time.square() + (1 - time).square()).sqrt().to(x.dtype)
        return self.network(x * norm.view(-1, *[1] * (x.dim() - 1)), t, s, labels)


def flow_map(
    transformer: nn.Module, scheduler: Any, shape: Sequence[int], conditions: Mapping[str, Tensor], **constants: Any
) -> FlowMap:
    """The flow map of a two-time transformer of diffusers.

    Sample it with ``imm.Sampler(flow_map, steps=N, shape=shape, **grid(scheduler, N))``. Arguments as of
    :class:`TwoTimeTransformer`.

    Args:
        scheduler: a ``FlowMapEulerDiscreteScheduler``, or its config.

    Raises:
        ValueError: another scheduler, and as for :class:`TwoTimeTransformer`.
    """
    scale = float(_config(scheduler)["num_train_timesteps"])
    network = _Unscaled(TwoTimeTransformer(transformer, shape, conditions, constants), scale).eval()
    settings: dict[str, Any] = {"sigma_data": 1.0, "time_scale": scale, "t_min": 0.0, "t_max": 1.0}
    return FlowMap(network, parametrization="euler_fm", second_time="identity", **settings).eval()


def grid(scheduler: Any, steps: int) -> dict[str, Any]:
    """The arguments of :class:`imm.Sampler` for the scheduler's times: uniform, moved by its ``shift``."""
    shift = float(_config(scheduler)["shift"])
    times = [1 - index / steps for index in range(1, steps)]
    moved = [shift * time / (1 + (shift - 1) * time) for time in times]
    return {"kind": "eta", "mid_eta": [time / (1 - time) for time in moved]}


def _config(scheduler: Any) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", scheduler)
    name = config.get("_class_name", type(scheduler).__name__)
    if name != "FlowMapEulerDiscreteScheduler":
        raise ValueError(f"scheduler: expected a FlowMapEulerDiscreteScheduler or its config, got {name}")
    return config
