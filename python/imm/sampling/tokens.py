"""Sequences of continuous tokens: a backbone over the tokens outside, the steps of a head inside. One sequence is one seed."""

from __future__ import annotations

import contextlib
import math
import numbers
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from imm import functional
from imm.flow_map import FlowMap
from imm.ops import native
from imm.sampling.grid import step_table, time_grid
from imm.sampling.loop import LATENT
from imm.sampling.sampler import as_labels, capture
from imm.schedules import Time, as_time

GUIDES = ("output", "cond")
#: Loops that a sampler keeps, each with its cache; the one that was used longest ago is dropped.
MAX_LOOPS = 8

#: Slots of the cache that a backbone is given at first; doubled as the sequence grows.
LEAST_SLOTS = 64

Stop = Callable[[Tensor], Tensor]


class Backbone(Protocol):
    """What makes z of a prefix and of the tokens before (:class:`imm.networks.CausalTransformer` is one).

    A cache is a list of tensors ``[rows, heads, slots, ...]``, written in place. ``num_classes``, where it has one, is the
    class "none" of a prefix of classes, which guidance needs.
    """

    token_dim: int
    cond_dim: int

    def make_cache(self, rows: int, max_tokens: int) -> list[Tensor]:
        """Memory for ``max_tokens`` slots."""

    def prefill(self, prefix: Tensor, cache: list[Tensor]) -> tuple[Tensor, int]:
        """z of the first token ``[rows, cond_dim]``, and how many slots ``prefix`` ``[rows, ...]`` took."""

    def decode(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
        """z of the next token after ``token`` ``[rows, token_dim]`` float32, which takes slot ``position`` ``[1]`` int64. The
        cache is cut to its first slots, of which ``position`` is one."""


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Neither gradients nor autocast nor inference mode: later calls use what a loop keeps, and a graph would keep addresses of
    autocast's own copies."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


class HeadSteps(nn.Module):
    """All steps of a head for one token, in torch's own operations: what is compiled and captured.

    Args:
        flow_map: of tokens, conditioned on z. steps, kind, mid_eta, method: as in :class:`imm.Sampler`.
        guide: "output" or "cond" for guided calls, None for others.
    """

    t: Tensor
    s: Tensor
    times: Tensor

    def __init__(
        self, flow_map: FlowMap, steps: int, kind: str, mid_eta: Sequence[float], method: str, guide: str | None
    ) -> None:
        super().__init__()
        network: Any = flow_map.network
        self.network = network
        self.table = step_table(flow_map, time_grid(flow_map, steps, kind, mid_eta), method)
        self.guide, self.latent_dim, self.dtype = guide, flow_map.latent_dim, flow_map.network_dtype
        self.token_dim = int(network.token_dim)
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        self.register_buffer("t", torch.tensor(self.table.t, dtype=torch.float64, device=device), persistent=False)
        self.register_buffer("s", torch.tensor(self.table.s, dtype=torch.float64, device=device), persistent=False)
        self.at_once = hasattr(network, "condition") and hasattr(network, "embed_times")
        if self.at_once:
            self.register_buffer("times", network.embed_times(self.t, self.s).detach(), persistent=False)

    def refresh(self) -> None:
        """Embed the times with the weights as they are now."""
        if self.at_once:
            network: Any = self.network
            self.times.copy_(network.embed_times(self.t, self.s))

    @property
    def noises(self) -> list[tuple[int, int]]:
        """(Philox step, numbers a token) of the noise that a call takes, side by side; the initial state, of standard deviation
        sigma_data, the noise of each step that adds some, the latent of each step."""
        noisy = [(i + 1, self.token_dim) for i, c in enumerate(self.table.c_noise) if c != 0.0]
        latents = [(LATENT + i, self.latent_dim) for i in range(len(self.table)) if self.latent_dim]
        return [(0, self.token_dim), *noisy, *latents]

    def draw(self, rows: int, sigma_data: float, generator: torch.Generator | None = None) -> Tensor:
        """Noise for :meth:`forward` of a generator, or of torch's default one, ``[rows, K]``."""
        parts = [torch.randn(rows, width, device=self.t.device, generator=generator) for _, width in self.noises]
        return torch.cat([sigma_data * parts[0], *parts[1:]], 1)

    def forward(self, z: Tensor, noise: Tensor, guidance: Tensor | None = None) -> Tensor:
        """z ``[R, C]``, R = B, or 2 B with guidance, first those of "none"; noise ``[B, K]``, that of :attr:`noises`;
        guidance ``[1]`` or ``[B]`` float64 -> tokens ``[B, D]`` float32."""
        batch, table, D, L = len(noise), self.table, self.token_dim, self.latent_dim
        w = None if guidance is None else guidance.to(torch.float32)[:, None]
        if w is not None and self.guide == "cond":
            z = torch.lerp(z[:batch], z[batch:], w.to(z.dtype))
            w = None
        if noise.shape[1] != sum(width for _, width in self.noises):
            wanted = sum(width for _, width in self.noises)
            raise ValueError(f"noise: expected [B, {wanted}], got {list(noise.shape)}")
        z, network = z.to(self.dtype), cast(Any, self.network)
        rows = network.condition(z, self.times) if self.at_once else None
        column = D
        latents = noise[:, noise.shape[1] - len(table) * L :]
        x, kept, begun = noise[:, :D], None, None
        for i in range(len(table)):
            begun = x
            own = (x * table.c_in[i]).to(self.dtype)
            xi = latents[:, i * L : (i + 1) * L].to(self.dtype)
            if w is not None:
                own, xi = torch.cat([own, own]), torch.cat([xi, xi])
            cond = torch.cat([z, xi], 1) if L else z
            if rows is not None:
                g = network(own, cond=cond, modulation=rows[i])
            else:
                g = network(own, self.t[i].expand(len(own)), self.s[i].expand(len(own)), None, cond=cond)
            g = g.to(x.dtype)
            if w is not None:
                g = torch.lerp(g[:batch], g[batch:], w)
            x = x * table.c_skip[i] + g * table.c_out[i]
            if table.c_noise[i] != 0.0:
                x = x + noise[:, column : column + D] * table.c_noise[i]
                column += D
            if table.c_kept[i] != 0.0 and kept is not None:
                x = x + kept * table.c_kept[i]
            kept = begun
        return x


class PythonTokenLoop:
    """csrc/token_loop.h in Python, for installs without the native library: the same operations in the same order."""

    captured = False

    def __init__(self, *, prefill: Any, decode: Any, head: Any, cache: list[Tensor], **settings: Any) -> None:
        self.prefill, self.decode, self.head, self.cache = prefill, decode, head, cache
        self.rows, self.guided, self.slots = settings["rows"], settings["guided"], settings["slots"]
        self.device = settings["device"]
        self.streams = list(zip(settings["stream_steps"], settings["stream_widths"], strict=True))
        self.noises = len(self.streams)
        narrow = lambda memory, slots: memory[:, :, :slots] if memory.dim() > 2 and memory.shape[2] == self.slots else memory
        self.views = {slots: [narrow(memory, slots) for memory in cache] for slots in settings["buckets"]}
        self.left = 0

    def begin(
        self,
        seeds: Tensor,
        prefix: Tensor,
        tokens: int | None,
        scales: Sequence[float],
        guidance: Tensor | None,
        stop: Stop | None,
    ) -> int:
        """Start sequences: seeds ``[rows]``, prefix a row each of the backbone's, a scale a stream; how many tokens."""
        self.left = 0
        if tokens is not None and tokens > self.slots:
            raise ValueError(f"tokens: expected at most {self.slots}, got {tokens}")
        for memory in self.cache:
            memory.zero_()
        self.z, taken = self.prefill(prefix.to(self.device), self.cache)
        self.taken = taken
        most = self.slots - taken + 1
        self.count = most if tokens is None else tokens
        if not 1 <= self.count <= most:
            raise ValueError(f"tokens: expected at most {most} after a prefix of {taken}, got {self.count}")
        device = self.z.device
        seeds, rows = seeds.to(device), self.rows
        parts = [
            functional.noise(seeds, (self.count, width), step, scale=scale)
            for (step, width), scale in zip(self.streams, scales, strict=True)
        ]
        self.noise = torch.cat(parts, 2).transpose(0, 1).contiguous()  # [T, B, K]
        self.out = torch.zeros(self.count, rows, self.streams[0][1], device=device)
        self.stopped = torch.zeros(self.count, rows, dtype=torch.bool, device=device)
        self.index = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = self.index + (taken - 1)
        self.guidance = None if guidance is None else guidance.to(device).expand(rows)
        self.stop, self.left = stop, self.count
        return self.count

    def next(self, count: int) -> tuple[Tensor, Tensor]:
        """The next tokens ``[rows, count, D]``, fewer at the end, and where the stop function held ``[rows, count]``."""
        first = self.count - self.left
        count = min(count, self.left)
        try:
            for _ in range(count):
                if self.left < self.count:
                    position = self.taken + self.count - self.left - 1
                    slots = next(slots for slots in self.views if slots > position)
                    self.z = self.decode(self.token, self.position, self.views[slots])
                self._head()
                if self.stop is not None:
                    self.stopped[self.count - self.left] = self.stop(self.z)
                self.left -= 1
        except BaseException:
            self.left = 0
            raise
        part = slice(first, first + count)
        return self.out[part].transpose(0, 1).contiguous(), self.stopped[part].transpose(0, 1).contiguous()

    def _head(self) -> None:
        token = self.head(self.z, self.noise.index_select(0, self.index).squeeze(0), self.guidance)
        self.out.index_copy_(0, self.index, token[None])
        self.token = torch.cat([token, token]) if self.guided else token
        self.index += 1
        self.position += 1


class Sequences(ABC):
    """What :class:`TokenSampler` and :class:`imm.package.TokenPackage` have in common: whole sequences and streams of them.

    Attributes:
        rows: sequences at a time, or None for as many as a call has. token_dim: D. num_classes: the class "none" of a prefix,
            or None where prefixes are no classes. guidance: of calls that give none, or None. sigma_data: of the tokens.
    """

    rows: int | None
    token_dim: int
    num_classes: int | None
    guidance: Time | None
    sigma_data: float

    def sample(
        self,
        seeds: Tensor | Sequence[int] | range,
        prefix: Tensor | Sequence[int] | None = None,
        tokens: int | None = None,
        *,
        guidance: Time | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Whole sequences.

        Args:
            seeds: one integer in [0, 2^63) a sequence.
            prefix: what the backbone's ``prefill`` takes, a row a sequence, such as classes ``[B]``; None: all "none".
            tokens: T; None: as many as fit ``max_tokens``.
            guidance: w for all or ``[B]``; None: the sampler's.
            temperature: factor on the noise that each token starts from.

        Returns:
            ``[B, T, D]`` float32, on the backbone's device.

        Raises:
            ValueError, TypeError: arguments other than these; networks in training mode.
        """
        tokens = None if tokens is None else _count("tokens", tokens)
        with _plain():
            checked = self._checked(seeds, prefix, guidance, temperature)
            count = len(checked[0])
            if not count:
                return torch.empty(0, tokens or 0, self.token_dim)
            rows, parts = self.rows or count, []
            loop, release = self._take(rows, checked[2] is not None, wait=True)
            try:
                for start in range(0, count, rows):
                    part = slice(start, start + rows)
                    own = self._begin(loop, rows, checked, part, tokens, temperature, None)
                    parts.append(loop.next(loop.left)[0][:own])
            finally:
                release()
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stream(
        self,
        seeds: Tensor | Sequence[int] | range,
        prefix: Tensor | Sequence[int] | None = None,
        tokens: int | None = None,
        *,
        chunk: int = 1,
        stop: Stop | None = None,
        guidance: Time | None = None,
        temperature: float = 1.0,
    ) -> Iterator[Tensor]:
        """Sequences in parts, as they are made.

        Args:
            seeds, prefix, tokens, guidance, temperature: as in :meth:`sample`; at most ``rows`` sequences where that is set.
            chunk: tokens a part.
            stop: a function of z ``[B, C]`` (with the label) that returns which sequences end with this token, ``[B]`` bool. It
                is called for each token and read once a part.

        Yields:
            ``[B, k, D]``, k = ``chunk`` or fewer at the end: bitwise what :meth:`sample` gives at these tokens. A sequence that
            has stopped is NaN after its last token; the stream ends with the last sequence.

        Raises:
            ValueError, TypeError: as :meth:`sample`; more sequences than rows, a stop function of another result.
        """
        chunk = _count("chunk", chunk)
        tokens = None if tokens is None else _count("tokens", tokens)
        checked = self._checked(seeds, prefix, guidance, temperature)
        if self.rows is not None and len(checked[0]) > self.rows:
            raise ValueError(f"seeds: expected at most rows = {self.rows} for a stream, got {len(checked[0])}")
        return self._parts(checked, tokens, chunk, stop, temperature)

    def _parts(self, checked: Any, tokens: int | None, chunk: int, stop: Stop | None, temperature: float) -> Iterator[Tensor]:
        if not len(checked[0]):
            return
        rows = self.rows or len(checked[0])
        loop, release = self._take(rows, checked[2] is not None, wait=False)
        alive: Tensor | None = None
        try:
            with _plain():
                count = self._begin(loop, rows, checked, slice(None), tokens, temperature, stop)
            while loop.left:
                with _plain():
                    part, stopped = (value[:count] for value in loop.next(chunk))
                if stop is None:
                    yield part
                    continue
                # A token counts where no earlier one of its sequence has stopped.
                before = stopped.long().cumsum(1) - stopped.long()
                keep = before == 0 if alive is None else (before == 0) & alive[:, None]
                alive = keep[:, -1] & ~stopped[:, -1]
                last = int(keep.any(0).sum())
                if last:
                    yield part.masked_fill(~keep[..., None], float("nan"))[:, :last]
                if not bool(alive.any()):
                    return
        finally:
            release()

    def _checked(
        self, seeds: Any, prefix: Any, guidance: Time | None, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Seeds, prefix and guidance of a call, on the host but for the prefix."""
        seeds, none = functional.as_seeds(seeds).cpu(), self.num_classes
        if prefix is None:
            if none is None:
                raise ValueError("prefix: expected one for a backbone without num_classes, got None")
            prefix = torch.full((len(seeds),), none, dtype=torch.int64)
        prefix = as_labels(prefix)
        if prefix.dim() == 0 or len(prefix) != len(seeds):
            raise ValueError(f"prefix: expected a row a sequence, {len(seeds)}, got {list(prefix.shape)}")
        classes = none is not None and prefix.dim() == 1
        if none is not None and classes:
            if prefix.is_floating_point() or prefix.is_complex() or prefix.dtype == torch.bool:
                raise ValueError(f"prefix: expected classes as integers, got {prefix.dtype}")
            prefix = prefix.long()
            if len(prefix) and not 0 <= int(prefix.min()) <= int(prefix.max()) <= none:
                raise ValueError(f"prefix: expected classes 0..{none - 1} or {none} for none, got {prefix.tolist()[:8]}")
        w = self.guidance if guidance is None else guidance
        if w is None:
            scale = None
        else:
            scale = as_time(w).reshape(-1).cpu()
            if len(scale) not in (1, len(seeds)) or not bool(torch.isfinite(scale).all()):
                raise ValueError(f"guidance: expected a finite number or [{len(seeds)}], got {scale.tolist()}")
            if not classes or not none:
                raise ValueError("guidance: expected a prefix of classes and a backbone with num_classes > 0")
        if not 0.0 <= float(temperature) < math.inf:
            raise ValueError(f"temperature: expected a number >= 0, got {temperature}")
        return seeds, prefix, scale

    def _begin(
        self,
        loop: Any,
        rows: int,
        checked: tuple[Tensor, Tensor, Tensor | None],
        part: slice,
        tokens: int | None,
        temperature: float,
        stop: Stop | None,
    ) -> int:
        """Start a loop with some of a call's sequences, padded to its rows; their number."""
        seeds, prefix, w = checked[0][part], checked[1][part], checked[2]
        count = len(seeds)
        pad = lambda value: torch.cat([value, value[:1].expand(rows - count, *value.shape[1:])]) if rows > count else value
        seeds, prefix = pad(seeds), pad(prefix)
        if w is not None:
            prefix = torch.cat([torch.full_like(prefix, self.num_classes or 0), prefix])
            w = w if len(w) == 1 else pad(w[part])

        def stopped(z: Tensor) -> Tensor:
            flags = z.new_ones(rows, dtype=torch.bool)
            flags[:count] = _checked_stop(stop, z[-rows:][:count].clone())
            return flags

        scales = [self.sigma_data * float(temperature), *[1.0] * (loop.noises - 1)]
        loop.begin(seeds, prefix, tokens, scales, w, None if stop is None else stopped)
        return count

    @abstractmethod
    def _take(self, rows: int, guided: bool, wait: bool) -> tuple[Any, Callable[[], None]]:
        """A free loop, and the function that releases it. ``wait``: wait for one instead of refusing."""


class TokenSampler(Sequences):
    """Generates sequences of continuous tokens, each token by a head in a fixed number of steps.

    Token n of a seed's sequence uses elements n D to (n + 1) D of the seed's noise (:func:`imm.noise`). It does not depend on
    the batch, on the number of tokens, or on how a stream is cut. A call reads the weights as they are.

    Args:
        backbone: makes z (:class:`Backbone`), in evaluation mode.
        flow_map: of tokens, conditioned on z; its network has ``token_dim`` and ``cond_dim``
            (:class:`imm.networks.TokenHead`, or any other), in evaluation mode.
        steps, kind, mid_eta, method: of the head, as in :class:`imm.Sampler`; None: "restart" for a head with a latent, else
            "pushforward".
        max_tokens: slots of the backbone's cache: for the prefix and for every token but the last.
        rows: run every batch in this many rows, padded or in parts. A sequence is then bitwise independent of what is generated
            beside it.
        guidance: the scale w of calls that give none; None: no guidance, and one row of the backbone a sequence instead of two.
        guide: "output" guides the head's output (Li et al. 2024); "cond" guides z (Shao et al. 2025), at half the head's work.
        graph: on CUDA, capture a token once and replay it: "auto" runs step by step, with a warning, where the networks cannot
            be captured; True makes that an error; False never captures.

    Raises:
        ValueError, TypeError: values other than these; networks of other widths or in training mode.
    """

    def __init__(
        self,
        backbone: Any,
        flow_map: FlowMap,
        *,
        steps: int = 1,
        kind: str = "uniform",
        mid_eta: Sequence[float] = (),
        method: str | None = None,
        max_tokens: int,
        rows: int | None = None,
        guidance: float | None = None,
        guide: str = "output",
        graph: str | bool = "auto",
    ) -> None:
        if not isinstance(flow_map, FlowMap):
            raise TypeError(f"flow_map: expected an imm.FlowMap, got {type(flow_map).__name__}")
        missing = [n for n in ("token_dim", "cond_dim", "make_cache", "prefill", "decode") if not hasattr(backbone, n)]
        if missing:
            raise TypeError(f"backbone: expected {', '.join(missing)}, got {type(backbone).__name__} without")
        for name in ("token_dim", "cond_dim"):
            if getattr(flow_map.network, name, None) != getattr(backbone, name):
                got = getattr(flow_map.network, name, None)
                raise ValueError(f"flow_map: expected a network with {name} = {getattr(backbone, name)}, got {got}")
        max_tokens, rows = _count("max_tokens", max_tokens), None if rows is None else _count("rows", rows)
        if guidance is not None and not (isinstance(guidance, numbers.Real) and math.isfinite(guidance)):
            raise ValueError(f"guidance: expected a finite number, got {guidance!r}")
        if guide not in GUIDES:
            raise ValueError(f"unknown guide {guide!r}; expected one of {list(GUIDES)}")
        if graph not in ("auto", True, False):
            raise ValueError(f'graph: expected "auto", True or False, got {graph!r}')
        self.backbone, self.flow_map, self.max_tokens, self.rows = backbone, flow_map, max_tokens, rows
        self.guidance, self.guide, self.graph = guidance, guide, graph
        self.token_dim, self.num_classes = backbone.token_dim, getattr(backbone, "num_classes", None)
        self.sigma_data = flow_map.sigma_data
        method = method or ("restart" if flow_map.latent_dim else "pushforward")
        self.check_modes()
        self._grid: dict[str, Any] = {"steps": steps, "kind": kind, "mid_eta": tuple(mid_eta), "method": method}
        self._guides = ((False, None), (True, guide))
        self._lock = threading.RLock()  # a stream may be collected, and give its loop back, while this thread holds it
        self._loops: OrderedDict[tuple[int, bool], list[Any]] = OrderedDict()
        self._start()
        device = self._steps[False].t.device
        module = native.module()
        graphs = graph and module is not None and module.make_graph_pool(device) is not None
        if graph is True and not graphs:
            raise ValueError(f"graph=True: expected a CUDA device and the native library built for it, got {device}")
        self._no_graph = None if graphs else "graph=False" if not graph else f"no graphs on {device} with this install"

    def __reduce__(self) -> tuple[Any, ...]:
        own = {name: getattr(self, name) for name in ("max_tokens", "rows", "guidance", "guide", "graph")}
        return partial(TokenSampler, **self._grid, **own), (self.backbone, self.flow_map)

    def stats(self) -> dict[str, Any]:
        """cached: loops kept, by (rows, guided); captured: how many are graphs; eager: why calls run step by step, or None."""
        with self._lock:
            loops = [(key, loop) for key, some in self._loops.items() for loop in some]
        return {
            "cached": [key for key, _ in loops],
            "captured": sum(loop.captured for _, loop in loops),
            "eager": self._no_graph,
        }

    # One call -----------------------------------------------------------------------------------------------------------------

    def steps(self, guided: bool) -> HeadSteps:
        """The steps of the head, of calls with or without guidance."""
        return self._steps[guided]

    def check_modes(self) -> None:
        """Raises ValueError for a network in training mode."""
        for name, module in (("backbone", self.backbone), ("flow_map", self.flow_map)):
            if getattr(module, "training", False):
                raise ValueError(f"{name}: expected evaluation mode ({name}.eval()), got training mode")

    def _take(self, rows: int, guided: bool, wait: bool) -> tuple[Any, Callable[[], None]]:
        self.check_modes()
        if self._seen() != self._known:  # moved or cast as a whole: graphs would read freed memory
            self._start()
        key, generation = (rows, guided), self._known
        self._steps[guided].refresh()
        with self._lock:
            free = self._loops.get(key, [])
            loop = free.pop() if free else None
            if not free:
                self._loops.pop(key, None)
        if loop is None:
            loop = self._made(rows, guided, self._steps[guided])
        return loop, lambda: self._release(key, loop, generation)

    def _seen(self) -> tuple[Any, ...]:
        """What tells that a network was moved, cast or given other memory as a whole."""
        found: list[Any] = []
        for module in (self.backbone, self.flow_map.network):
            parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
            found += [(p.data_ptr(), p.dtype, p.device) for p in (*parameters[:1], *parameters[-1:])]
        return tuple(found)

    def _start(self) -> None:
        """Take the networks as they are now; no loop that was made before is used again."""
        with _plain():
            steps = {guided: HeadSteps(self.flow_map, guide=guide, **self._grid).eval() for guided, guide in self._guides}
        with self._lock:
            self._steps, self._known = steps, self._seen()
            self._loops.clear()

    def _made(self, rows: int, guided: bool, steps: HeadSteps) -> Any:
        backbone, width = self.backbone, (2 * rows if guided else rows, self.backbone.cond_dim)
        cache = list(backbone.make_cache(width[0], self.max_tokens))
        floating = [p.dtype for p in backbone.parameters() if p.is_floating_point()] if isinstance(backbone, nn.Module) else []
        dtype = next(iter(floating), torch.float32)

        def of(z: Tensor, what: str) -> Tensor:
            if z.shape != width or z.dtype != dtype:
                raise ValueError(f"backbone: expected z {list(width)} of {dtype} of {what}, got {list(z.shape)} of {z.dtype}")
            return z

        def prefill(prefix: Tensor, cache: list[Tensor]) -> tuple[Tensor, int]:
            z, taken = backbone.prefill(prefix, cache)
            if taken < 1:
                raise ValueError(f"backbone: expected a prefill that takes a slot or more, got {taken}")
            return of(z, "prefill"), taken

        decode = lambda token, position, cache: of(backbone.decode(token, position, cache), "decode")
        settings: dict[str, Any] = {
            "rows": rows,
            "guided": guided,
            "token_dim": backbone.token_dim,
            "cond_dim": backbone.cond_dim,
            "slots": self.max_tokens,
            "stream_steps": [step for step, _ in steps.noises],
            "stream_widths": [width for _, width in steps.noises],
            "buckets": buckets(self.max_tokens),
            "cond_dtype": dtype,
            "device": steps.t.device,
            "prefill": prefill,
            "decode": decode,
            "head": steps,
            "cache": cache,
        }
        module = native.module()
        if module is None:
            return PythonTokenLoop(**settings)
        loop = module.TokenLoop(**settings, pool=module.make_graph_pool(steps.t.device))
        if self._no_graph is None:
            self._no_graph = capture(loop, must=self.graph is True)
        return loop

    def _release(self, key: tuple[int, bool], loop: Any, generation: tuple[Any, ...]) -> None:
        with self._lock:
            if generation != self._known:
                return
            self._loops.setdefault(key, []).append(loop)
            self._loops.move_to_end(key)
            while sum(map(len, self._loops.values())) > MAX_LOOPS:
                oldest = next(iter(self._loops.values()))
                oldest.pop()
                if not oldest:
                    self._loops.popitem(last=False)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a count >= 1, got {value!r}")
    return int(value)


def buckets(slots: int) -> list[int]:
    """Numbers of slots that a backbone is given, ascending up to ``slots``."""
    found = [LEAST_SLOTS]
    while found[-1] < slots:
        found.append(2 * found[-1])
    return [*found[:-1], slots]


def _checked_stop(stop: Stop | None, z: Tensor) -> Tensor:
    flags = None if stop is None else stop(z)
    if not isinstance(flags, Tensor) or flags.shape != (len(z),) or flags.dtype != torch.bool:
        got = f"{list(flags.shape)} of {flags.dtype}" if isinstance(flags, Tensor) else type(flags).__name__
        raise ValueError(f"stop: expected [{len(z)}] bool, got {got}")
    return flags
