"""Networks compiled ahead of time for the C++ sampling loop: ``imm export``, and running what it wrote.

A package is AOTInductor's file of a network for one number of rows, with the step table and the settings of the loop as its
metadata. ``imm_generate`` runs it without Python; :class:`Package` runs it from Python, with none between the steps.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imm import functional
from imm.flow_map import FlowMap
from imm.ops import native
from imm.ops.dtypes import DTYPES
from imm.sampling.grid import step_table, time_grid
from imm.sampling.sampler import as_labels
from imm.sampling.tokens import Sequences, TokenSampler
from imm.schedules import Time, as_time


class _Network(nn.Module):
    """The call that is exported: labels and cond only where the network takes them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, s: Tensor, *more: Tensor) -> Tensor:
        labels = more[0] if self.network.num_classes else None
        return self.network(x, t, s, labels, **({"cond": more[-1]} if getattr(self.network, "cond_dim", 0) else {}))


def _words(values: Sequence[float] | Sequence[int]) -> str:
    return " ".join(repr(value) for value in values)


def export(
    flow_map: FlowMap,
    path: str | Path,
    *,
    rows: int,
    steps: int,
    kind: str = "uniform",
    mid_eta: Sequence[float] = (),
    method: str = "pushforward",
    guided: bool = False,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype = torch.float32,
    shape: Sequence[int] | None = None,
) -> None:
    """Compile a flow map's network ahead of time for a sampling run, into the file ``path`` (``.pt2``).

    A DiT is compiled in its plain form, whose operations the compiler sees and fuses itself. Needs a C++ compiler.

    Args:
        flow_map: in evaluation mode, on the device to generate on.
        rows: images at a time; a run of fewer is padded, one of more is cut.
        steps, kind, mid_eta, method, state_dtype, shape: as in :class:`imm.Sampler`.
        guided: whether runs give a guidance scale, which may differ from run to run.
        dtype: of the weights; None: as they are.

    Raises:
        ValueError, TypeError: settings other than these; a path that does not end in .pt2.
    """
    path = _checked_path(path)
    dtype = dtype or flow_map.network_dtype
    for name, value, accepted in (("dtype", dtype, DTYPES), ("state_dtype", state_dtype, (torch.float32, torch.float64))):
        if value not in accepted:
            raise TypeError(f"{name}: expected one of {[str(d) for d in accepted]}, got {value}")
    if rows < 1:
        raise ValueError(f"rows: expected a count >= 1, got {rows}")
    if guided and flow_map.num_classes == 0:
        raise ValueError("guidance: expected a class-conditional network, got one with num_classes = 0")
    if flow_map.network.training:
        raise ValueError("flow_map: expected evaluation mode (flow_map.eval()), got training mode")
    table = step_table(flow_map, time_grid(flow_map, steps, kind, mid_eta), method)
    shape = tuple(flow_map.image_shape if shape is None else shape)
    network: Any = copy.deepcopy(flow_map.network).to(dtype).requires_grad_(False)
    if hasattr(network, "fused"):
        network.fused = False
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    both = rows * (2 if guided else 1)
    times = torch.zeros(both, dtype=torch.float64, device=device)
    inputs = [torch.zeros(both, *shape, dtype=dtype, device=device), times, times.clone()]
    if flow_map.num_classes:
        inputs.append(torch.zeros(both, dtype=torch.int64, device=device))
    if flow_map.cond_dim:
        inputs.append(torch.zeros(both, flow_map.cond_dim + flow_map.latent_dim, dtype=dtype, device=device))
    metadata = {
        **{name: _words(column) for name, column in table.columns().items()},
        "rows": str(rows),
        "shape": _words(shape),
        "guided": str(int(guided)),
        "num_classes": str(flow_map.num_classes),
        "sigma_data": repr(flow_map.sigma_data),
        "cond_dim": str(flow_map.cond_dim),
        "latent_dim": str(flow_map.latent_dim),
        "state_dtype": str(state_dtype).removeprefix("torch."),
        "input_dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
    }
    _write(path, {"model": (_Network(network), tuple(inputs))}, metadata)


def export_tokens(sampler: TokenSampler, path: str | Path, *, rows: int, guided: bool = False) -> None:
    """Compile a token sampler ahead of time into the file ``path`` (``.pt2``): its backbone's prefill and decode, and the steps
    of its head. Needs a C++ compiler.

    Args:
        sampler: whose backbone is an ``nn.Module`` with ``num_classes`` and a prefix of classes.
        rows: sequences at a time; a call with fewer is padded, one with more is cut.
        guided: whether calls give a guidance scale, which may differ from call to call.

    Raises:
        ValueError, TypeError: settings other than these; a path that does not end in .pt2.
    """
    path = _checked_path(path)
    sampler.check_modes()
    if type(rows) is not int or rows < 1:
        raise ValueError(f"rows: expected a count >= 1, got {rows!r}")
    if not isinstance(sampler.backbone, nn.Module) or sampler.num_classes is None:
        raise TypeError(f"backbone: expected an nn.Module with num_classes, got {type(sampler.backbone).__name__}")
    if guided and not sampler.num_classes:
        raise ValueError("guidance: expected a backbone with num_classes > 0")
    backbone: Any = copy.deepcopy(sampler.backbone).requires_grad_(False)
    steps = copy.deepcopy(sampler.steps(guided)).requires_grad_(False)
    steps.refresh()
    device, both = steps.t.device, rows * (2 if guided else 1)
    cache = list(backbone.make_cache(both, sampler.max_tokens))
    if len({memory.dtype for memory in cache}) != 1:
        raise TypeError(f"backbone: expected a cache of one dtype, got {[memory.dtype for memory in cache]}")
    prefix = torch.zeros(both, dtype=torch.int64, device=device)
    with torch.no_grad():
        z, taken = backbone.prefill(prefix, cache)
    zeros = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=device)
    widths = [width for _, width in steps.noises]
    metadata = {
        "rows": str(rows),
        "guided": str(int(guided)),
        "token_dim": str(sampler.token_dim),
        "cond_dim": str(z.shape[1]),
        "slots": str(sampler.max_tokens),
        "stream_steps": _words([step for step, _ in steps.noises]),
        "stream_widths": _words(widths),
        "cond_dtype": str(cache[0].dtype).removeprefix("torch."),
        "device": device.type,
        "prefix_slots": str(taken),
        "cache": _words([size for memory in cache for size in (memory.dim(), *memory.shape)]),
        "num_classes": str(sampler.num_classes),
        "sigma_data": repr(sampler.sigma_data),
    }
    guidance = (zeros(rows, dtype=torch.float64),) if guided else ()
    models: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "prefill": (_Prefill(backbone), (prefix, *cache)),
        "decode": (
            _Decode(backbone),
            (zeros(both, sampler.token_dim), zeros(1, dtype=torch.int64), *(memory.clone() for memory in cache)),
        ),
        "head": (steps, (zeros(*z.shape, dtype=cache[0].dtype), zeros(rows, sum(widths)), *guidance)),
    }
    _write(path, models, metadata)


class _Prefill(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, prefix: Tensor, *cache: Tensor) -> Tensor:
        return self.backbone.prefill(prefix, list(cache))[0]


class _Decode(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    def forward(self, token: Tensor, position: Tensor, *cache: Tensor) -> Tensor:
        return self.backbone.decode(token, position, list(cache))


def _checked_path(path: str | Path) -> Path:
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"out: expected a file in a folder that is there, got {path}")
    if path.suffix != ".pt2":
        raise ValueError(f"out: expected a file name that ends in .pt2, got {path}")
    return path


def _write(path: Path, models: dict[str, tuple[nn.Module, tuple[Tensor, ...]]], metadata: dict[str, str]) -> None:
    """Compile models with example inputs into one package, each with the metadata."""
    from torch._inductor import aot_compile  # slow to import
    from torch._inductor.package import package_aoti

    options = {"aot_inductor.package": True, "aot_inductor.metadata": {f"imm_{name}": text for name, text in metadata.items()}}
    files: dict[str, Any] = {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch's, about torch
        for name, (model, inputs) in models.items():
            module = torch.export.export(model, inputs).module(check_guards=False)
            files[name] = aot_compile(module, inputs, options=dict(options))
        part = path.with_name(f".{path.stem}-{os.getpid()}.pt2")
        try:
            package_aoti(str(part), files)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class Package:
    """Runs a package that :func:`export` wrote: on CUDA as one captured graph.

    Args:
        path: the file.
        graph: capture where the device has graphs; else the C++ loop calls the compiled network step by step.

    Raises:
        RuntimeError: an install without the native library; a file that is no package, or was not written by :func:`export`.
    """

    def __init__(self, path: str | Path, *, graph: bool = True) -> None:
        module: Any = native.module()
        if module is None:
            raise RuntimeError(f"a package needs the native library: {native.status()}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"package: expected a file that imm export wrote, got {path}")
        self._from = Path(path).resolve(), graph
        self._loop = module.load_package(str(path), graph)
        self._lock = threading.Lock()
        self.rows, self.num_classes, self.guided = self._loop.rows, self._loop.num_classes, self._loop.guided

    def __reduce__(self) -> tuple[Any, ...]:
        path, graph = self._from  # a copy, or what is unpickled, loads the file again
        return partial(Package, graph=graph), (path,)

    def sample(
        self,
        seeds: Tensor | Sequence[int] | range,
        labels: Tensor | Sequence[int] | None = None,
        guidance: Time | None = None,
        *,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Images ``[B, ...]`` for seeds, as :meth:`imm.Sampler.sample` gives them to rounding.

        Raises:
            ValueError: labels, guidance or cond that do not fit the package.
        """
        keys = functional.as_seeds(seeds).cpu()
        if labels is None and self.num_classes:
            labels = [self.num_classes] * len(keys)
        classes = None if labels is None else as_labels(labels).cpu()
        if classes is not None:
            if classes.shape != keys.shape or classes.dtype != torch.int64:
                raise ValueError(f"labels: expected [{len(keys)}] int64, got {list(classes.shape)} of {classes.dtype}")
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) <= self.num_classes:
                raise ValueError(f"labels: expected classes 0..{self.num_classes - 1} or {self.num_classes} for none")
        w = None if guidance is None else as_time(guidance).reshape(-1).cpu()
        if w is not None and (len(w) not in (1, len(keys)) or not bool(torch.isfinite(w).all())):
            raise ValueError(f"guidance: expected a finite number or [{len(keys)}], got {w.tolist()}")
        width = self._loop.cond_dim
        if (cond is None) != (width == 0) or (cond is not None and cond.shape != (len(keys), width)):
            got = None if cond is None else list(cond.shape)
            raise ValueError(f"cond: expected {[len(keys), width] if width else None}, got {got}")
        parts = []
        with self._lock:
            for start in range(0, max(1, len(keys)), self.rows):
                part = slice(start, start + self.rows)
                scale = w if w is None or len(w) == 1 else w[part]
                pick = lambda value, part=part: None if value is None else value[part]
                parts.append(self._loop.run(keys[part], pick(classes), scale, None, pick(cond)))
        return torch.cat(parts)


class TokenPackage(Sequences):
    """Runs a package that :func:`export_tokens` wrote, without Python between the tokens; on CUDA one captured graph a token.

    Args:
        path: the file.
        graph: capture where the device has graphs.
        guidance: w for calls that give none, for a package that was exported with guidance.

    Raises:
        RuntimeError: an install without the native library; a file that is no package, or was not written by
            :func:`export_tokens`. ValueError: guidance for a package without, or none for one with.
    """

    def __init__(self, path: str | Path, *, graph: bool = True, guidance: float | None = None) -> None:
        module: Any = native.module()
        if module is None:
            raise RuntimeError(f"a package needs the native library: {native.status()}")
        if not Path(path).is_file():
            raise FileNotFoundError(f"package: expected a file that imm.package.export_tokens wrote, got {path}")
        loaded = module.load_token_package(str(path), graph)
        self._from = Path(path).resolve(), graph
        self._loop, self.num_classes, self.token_dim, self.sigma_data = loaded
        self.rows, self.guidance = self._loop.rows, guidance
        self._guidance = guidance
        self._lock = threading.Lock()
        self._streaming: Any = None  # a stream holds the loop for as long as its caller likes
        if guidance is not None and not (self._loop.guided and math.isfinite(guidance)):
            wanted = "a finite number" if self._loop.guided else "None for a package without guidance"
            raise ValueError(f"guidance: expected {wanted}, got {guidance}")

    def __reduce__(self) -> tuple[Any, ...]:
        path, graph = self._from  # a copy, or what is unpickled, loads the file again
        return partial(TokenPackage, graph=graph, guidance=self._guidance), (path,)

    def _take(self, rows: int, guided: bool, wait: bool) -> tuple[Any, Callable[[], None]]:
        if guided != self._loop.guided:
            wanted = "a scale for a package with" if self._loop.guided else "none for a package without"
            raise ValueError(f"guidance: expected {wanted} guidance, got {'one' if guided else 'none'}")
        if wait and self._streaming is None:
            self._lock.acquire()
        elif not self._lock.acquire(blocking=False):
            raise RuntimeError("a package runs one call or stream at a time: end or close the other one first")
        self._streaming = None if wait else self._loop
        return self._loop, self._give_back

    def _give_back(self) -> None:
        self._streaming = None
        self._lock.release()
