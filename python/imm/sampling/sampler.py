"""The sampling engine: every step of a run as one call, captured as one CUDA graph where there are any."""

from __future__ import annotations

import copy
import numbers
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imm import functional
from imm.flow_map import FlowMap
from imm.ops import native
from imm.sampling.grid import StepTable, step_table, time_grid
from imm.sampling.loop import Network, Plain, checked_guidance, run, with_none
from imm.schedules import Time

#: A batch runs padded to a captured size of at most this many times its own, rather than being captured anew.
PADDING = 1.25
#: Modulations of all steps are computed at once while they take no more than this.
MODULATION_BYTES = 256 << 20

Prepare = Callable[[Tensor | None], None]


class PythonLoop:
    """csrc/sampling_loop.h in Python, for installs without the native library: the same operations in the same order."""

    captured = False

    def __init__(self, table: StepTable, network: Network, prepare: Prepare | None, **settings: Any) -> None:
        self.table, self.network, self.prepare = table, network, prepare
        self.rows, self.shape, self.guided = settings["rows"], settings["shape"], settings["guided"]
        self.num_classes, self.sigma_data = settings["num_classes"], settings["sigma_data"]
        self.state_dtype, self.input_dtype, self.device = (settings[k] for k in ("state_dtype", "input_dtype", "device"))
        self.latent_dim = settings["latent_dim"]
        self.bytes = 0

    def run(
        self,
        seeds: Tensor,
        labels: Tensor | None,
        guidance: Tensor | None,
        x: Tensor | None,
        cond: Tensor | None = None,
    ) -> Tensor:
        n, pad = len(seeds), self.rows - len(seeds)
        padded = lambda value: torch.cat([value, value.new_zeros(pad, *value.shape[1:])]) if pad else value
        seeds = padded(seeds.to(self.device))
        given = None if x is None else padded(x.to(self.device))
        start = functional.noise(seeds, self.shape, scale=self.sigma_data) if given is None else given
        if labels is not None:
            labels = padded(labels.to(self.device))
            if self.guided:
                labels = with_none(labels, self.num_classes)
        if guidance is not None:
            guidance = guidance.to(self.device)
            guidance = padded(guidance) if len(guidance) == n else guidance
        if self.prepare is not None:
            self.prepare(labels)
        cond = None if cond is None else padded(cond.to(self.device))
        more = {"cond": cond, "latent": self.latent_dim}
        return run(self.table, self.network, start.to(self.state_dtype), labels, guidance, seeds, self.input_dtype, **more)[:n]


def as_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """Labels as a tensor, of int64 where they are integers; the caller checks them."""
    if isinstance(labels, Tensor):
        return labels
    try:
        values = list(labels)
    except TypeError as error:
        raise ValueError(f"labels: expected a list or tensor of integers, one per image, got {labels!r}") from error
    return torch.tensor(values) if values else torch.empty(0, dtype=torch.int64)


class _Conditioned:
    """A DiT as the loop calls it: the modulations of all steps are computed before the first one.

    A row of the modulations for each image and, with guidance, one for "none": nothing looks for equal labels, so the work is
    the same whatever they are.
    """

    def __init__(self, network: Any, conditioner: Any, steps: int, rows: int, guided: bool, device: torch.device) -> None:
        self.network, self.conditioner, self.steps = network, conditioner, steps
        own = torch.arange(rows, device=device)
        self.first = rows - 1 if guided else 0  # of the labels [none, ..., none, label, ..., label]: the last none
        self.index = torch.cat([torch.zeros_like(own), own + 1]) if guided else own
        self.rows: Tensor | None = None

    def prepare(self, labels: Tensor | None) -> None:
        if labels is None:
            self.index = torch.zeros_like(self.index)
        self.rows = self.conditioner(None if labels is None else labels[self.first :])

    def __call__(self, step: int, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, cond: Tensor | None = None) -> Tensor:
        assert self.rows is not None
        modulation = self.rows[step].index_select(0, self.index)
        if step + 1 == self.steps:
            self.rows = None  # as large as a few images' activations, and the next run's are others
        return self.network(x, modulation=modulation)


def capture(loop: Any, must: bool) -> str | None:
    """Record a native loop as a graph. Returns why it cannot be, with a warning, or None.

    Raises:
        RuntimeError: it cannot be, and ``must`` be.
    """
    try:
        loop.capture()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if must:
            raise RuntimeError(f"graph: this network cannot be captured: {reason}") from error
        warnings.warn(f"this network cannot be captured, so it runs step by step: {reason}", RuntimeWarning, stacklevel=7)
        return reason
    return None


class _Mark:
    """A hook that marks a sampler as stale when its network loads weights. It does not keep the sampler alive; in copies of the
    network, pickled ones included, it does nothing."""

    def __init__(self, sampler: Sampler | None) -> None:
        self.sampler = None if sampler is None else weakref.ref(sampler)

    def __call__(self, module: nn.Module, keys: Any) -> None:
        sampler = None if self.sampler is None else self.sampler()
        if sampler is not None:
            sampler._stale = True

    def __reduce__(self) -> tuple[type[_Mark], tuple[None]]:
        return _Mark, (None,)


class Sampler:
    """Generates with a flow map in a fixed number of steps (paper algorithms 2, 4 and 5).

    The network is called as it is at the time of a call. After ``load_state_dict`` on it or a part of it, and where it was
    moved or cast as a whole, the sampler starts anew by itself; after any other change of its weights, call :meth:`refresh`.

    Args:
        flow_map: in evaluation mode, on the device to sample on.
        steps, kind, mid_eta: the time grid (:func:`imm.sampling.time_grid`).
        method: "pushforward" (algorithm 2), "restart" (algorithm 5, with noise from the images' seeds), or, for velocities,
            "ddim" and "heun" (:func:`imm.sampling.step_table`).
        guidance: the scale w of classifier-free guidance, for calls that give none; None: no guidance, and one row of the
            network an image instead of two.
        dtype: run a copy of the network with weights of this dtype, channels-last for convolutions; None, or the network's own:
            the network itself.
        graph: on CUDA, capture each batch size once and replay it: "auto" continues step by step, with a warning, where the
            network cannot be captured; True makes that an error; False never captures.
        rows: run every batch in this many rows, padded or in parts. An image then depends, bitwise, on its seed, label and
            guidance alone, and not on what is generated beside it.
        state_dtype: float32 or float64, of the state between steps.
        shape: of an image; None: what the network says.
        max_graphs: batch sizes that are kept; the least recently used one is dropped.

    Raises:
        ValueError, TypeError: values other than these.
    """

    def __init__(
        self,
        flow_map: FlowMap,
        *,
        steps: int,
        kind: str = "uniform",
        mid_eta: Sequence[float] = (),
        method: str = "pushforward",
        guidance: float | None = None,
        dtype: torch.dtype | None = None,
        graph: str | bool = "auto",
        rows: int | None = None,
        state_dtype: torch.dtype = torch.float32,
        shape: Sequence[int] | None = None,
        max_graphs: int = 8,
    ) -> None:
        if not isinstance(flow_map, FlowMap):
            raise TypeError(f"flow_map: expected an imm.FlowMap, got {type(flow_map).__name__}")
        if graph not in ("auto", True, False):
            raise ValueError(f'graph: expected "auto", True or False, got {graph!r}')
        if state_dtype not in (torch.float32, torch.float64):
            raise TypeError(f"state_dtype: expected torch.float32 or torch.float64, got {state_dtype}")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"dtype: expected None or a floating dtype of 16, 32 or 64 bits, got {dtype}")
        for name, count in (("rows", rows), ("max_graphs", max_graphs)):
            if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
                raise ValueError(f"{name}: expected a count >= 1, got {count!r}")
        self.flow_map, self.times = flow_map, time_grid(flow_map, steps, kind, mid_eta)
        self.table = step_table(flow_map, self.times, method)
        self.shape = tuple(flow_map.image_shape if shape is None else shape)
        self.guidance = checked_guidance(flow_map, guidance, 1)
        self.dtype, self.graph, self.rows, self.state_dtype, self.max_graphs = dtype, graph, rows, state_dtype, max_graphs
        self._begin()
        self._start()

    def _begin(self) -> None:
        """What a sampler has to itself, and a copy has anew."""
        self._lock = threading.RLock()
        self._loops: OrderedDict[tuple[int, bool], PythonLoop] = OrderedDict()  # or the native library's
        self._conditioner: Any = None  # of a DiT, made with the first loop that needs it
        self._captures, self._replays = 0, 0
        self._most_rows: int | None = self.rows
        self._no_graph: str | None = None
        network = self.flow_map.network
        self._stale = True
        self._device = next((p.device for p in network.parameters()), torch.device("cpu"))
        self._last_parameter = next(reversed(list(network.parameters())), None)  # to find it takes a walk
        for module in network.modules():
            weakref.finalize(self, module.register_load_state_dict_post_hook(_Mark(self)).remove)

    def __getstate__(self) -> dict[str, Any]:
        """Settings and flow map: a copy, or what is unpickled, starts at its first call, without loops and graphs."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    # The life of a call -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        seeds: Tensor | Sequence[int] | range,
        labels: Tensor | Sequence[int] | None = None,
        guidance: Time | None = None,
        *,
        x: Tensor | None = None,
        cond: Tensor | None = None,
    ) -> Tensor:
        """Images for seeds.

        Args:
            seeds: one integer in [0, 2^63) an image.
            labels: one class an image, ``num_classes`` meaning "none"; None: all "none".
            guidance: w for all images or ``[B]``; None: the sampler's.
            x: the states to begin with, ``[B, *shape]`` of standard deviation sigma_data; None: the seeds' noise.
            cond: z that the network is conditioned on, ``[B, cond_dim]``; None for a network without.

        Returns:
            ``[B, *shape]`` of ``state_dtype``, on the network's device.

        Raises:
            ValueError, TypeError: arguments other than these, a network in training mode. RuntimeError: within the capture of a
                CUDA graph.
        """
        with self._lock:
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "sample: expected a stream that is not being captured: a call copies from the host, and a first one waits "
                    "for the device; capture imm.sampling.pushforward instead"
                )
            if self._stale or self._seen() != self._known:
                self._start()
            seeds = functional.as_seeds(seeds)
            count = len(seeds)
            if labels is not None:
                labels = as_labels(labels)
            where = self._device if labels is None else labels.device
            labels = self.flow_map.checked_labels(labels, count, where)
            w = self.guidance if guidance is None else checked_guidance(self.flow_map, guidance, count)
            if x is not None and (x.shape != (count, *self.shape) or not x.is_floating_point()):
                raise ValueError(f"x: expected floating {[count, *self.shape]}, got {list(x.shape)} of {x.dtype}")
            self.flow_map.checked_cond(cond, count, latent=False)
            if count == 0:
                return torch.empty(0, *self.shape, dtype=self.state_dtype, device=self._device)
            kind = self._device.type
            if not torch.is_autocast_enabled(kind):
                return self._in_parts(seeds, labels, w, x, cond)
            with torch.autocast(kind, enabled=False):  # a graph would keep addresses of autocast's own copies
                return self._in_parts(seeds, labels, w, x, cond)

    def _in_parts(
        self, seeds: Tensor, labels: Tensor | None, w: Tensor | None, x: Tensor | None, cond: Tensor | None
    ) -> Tensor:
        done: list[Tensor] = []
        start = 0
        while start < len(seeds):
            most = len(seeds) if self._most_rows is None else self._most_rows
            part = slice(start, min(start + most, len(seeds)))
            pick = lambda value, part=part: None if value is None else value[part]
            scale = w if w is None or len(w) == 1 else w[part]
            try:
                loop = self._loop(part.stop - part.start, w is not None)
                done.append(loop.run(seeds[part], pick(labels), scale, pick(x), pick(cond)))
            except torch.OutOfMemoryError:
                self._fewer_rows(part.stop - part.start)
                continue
            self._replays += loop.captured
            start = part.stop
        return done[0] if len(done) == 1 else torch.cat(done)

    def _fewer_rows(self, rows: int) -> None:
        """After running out of memory: smaller parts from now on."""
        if rows == 1 or self.rows is not None:
            raise
        self._loops.clear()
        self._most_rows = (rows + 1) // 2
        text = f"out of memory with {rows} images at a time; continuing with at most {self._most_rows}"
        warnings.warn(text, RuntimeWarning, stacklevel=5)

    def _loop(self, count: int, guided: bool) -> PythonLoop:
        """The loop for a number of images, made and captured where there is none yet."""
        rows = self.rows or self._captured_size(count, guided) or count
        loop = self._loops.get((rows, guided))
        if loop is None:
            loop = self._loops[rows, guided] = self._made(rows, guided)
            while len(self._loops) > self.max_graphs:
                self._loops.popitem(last=False)
        self._loops.move_to_end((rows, guided))
        return loop

    def _captured_size(self, count: int, guided: bool) -> int | None:
        """The smallest captured number of rows that is worth padding to."""
        sizes = [r for (r, g), loop in self._loops.items() if g == guided and loop.captured and count <= r <= PADDING * count]
        return min(sizes, default=None)

    def _made(self, rows: int, guided: bool) -> PythonLoop:
        network = self._callable(rows, guided)
        settings: dict[str, Any] = {
            "rows": rows,
            "shape": list(self.shape),
            "guided": guided,
            "num_classes": self.flow_map.num_classes,
            "sigma_data": self.flow_map.sigma_data,
            "cond_dim": self.flow_map.cond_dim,
            "latent_dim": self.flow_map.latent_dim,
            "state_dtype": self.state_dtype,
            "input_dtype": self._input_dtype,
            "device": self._device,
        }
        module = native.module()
        if module is None:
            return PythonLoop(self.table, network, network.prepare, **settings)
        columns = {name: list(values) for name, values in self.table.columns().items()}
        loop = module.SamplingLoop(**columns, **settings, network=network, prepare=network.prepare, pool=self._pool)
        if self._no_graph is None:
            self._no_graph = capture(loop, must=self.graph is True)
            self._captures += self._no_graph is None
        return loop

    def _callable(self, rows: int, guided: bool) -> Plain | _Conditioned:
        network: Any = self._network
        features = getattr(network, "modulation_features", None)
        numbers = len(self.table) * (rows + 1) * (features or 0)
        too_many = numbers * self._input_dtype.itemsize > MODULATION_BYTES
        if features is None or not hasattr(network, "conditioner") or too_many:
            return Plain(network)
        if self._conditioner is None:
            times = torch.tensor([self.table.t, self.table.s], dtype=torch.float64, device=self._device)
            self._conditioner = network.conditioner(times.T)
        return _Conditioned(network, self._conditioner, len(self.table), rows, guided, self._device)

    # The network --------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Take the network as it is now; nothing that was captured before is used again."""
        source = self.flow_map.network
        if source.training:
            raise ValueError("flow_map: expected evaluation mode (flow_map.eval()), got training mode")
        self._stale = True  # until all of this has happened
        known, network, dtype = self._seen(), source, self.dtype or self.flow_map.network_dtype
        first = next(source.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        if dtype != self.flow_map.network_dtype:
            network = copy.deepcopy(source).to(dtype)
            if getattr(source, "channels_last", False):
                network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # calls may come on other streams
        module = native.module()
        pool = None if module is None else module.make_graph_pool(device)
        reason = f"no graphs on {device} with this install" if pool is None else None
        if self.graph is True and reason is not None:
            raise ValueError(f"graph=True: expected a CUDA device and the native library built for it, got {device}")
        self._loops.clear()
        self._conditioner = None
        self._known, self._network, self._input_dtype, self._device, self._pool = known, network, dtype, device, pool
        self._no_graph = reason if self.graph else "graph=False"
        self._stale = False

    def _seen(self) -> tuple[Any, ...]:
        """What tells, at little cost, that the network was moved, cast or given other memory as a whole."""
        network = self.flow_map.network
        ends = (p for p in (next(network.parameters(), None), self._last_parameter) if p is not None)
        return (network.training, *((p.data_ptr(), p.dtype, p.device) for p in ends))

    # What a server needs ------------------------------------------------------------------------------------------------------

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """Make, and capture, the loops for these numbers of images before the first call; largest first, so that the smaller
        ones use its memory. With the sampler's guidance, and without where it has none."""
        if len(set(batch_sizes)) > self.max_graphs:
            raise ValueError(f"batch_sizes: expected at most max_graphs = {self.max_graphs}, got {len(set(batch_sizes))}")
        for size in sorted(set(batch_sizes), reverse=True):
            self.sample(range(size))

    def refresh(self) -> None:
        """Take the network's weights as they are now; needed after in-place changes other than ``load_state_dict``."""
        with self._lock:
            self._start()

    def stats(self) -> dict[str, Any]:
        """captures and replays so far; cached: loops kept, by (rows, guided); bytes: of their memory, without the graphs' own;
        eager: why runs go step by step, or None."""
        with self._lock:
            return {
                "captures": self._captures,
                "replays": self._replays,
                "cached": list(self._loops),
                "bytes": sum(loop.bytes for loop in self._loops.values()),
                "eager": self._no_graph,
            }
