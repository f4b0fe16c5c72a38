"""Two axes of inference: how many tokens a head is conditioned on (outside) and how many steps it refines a token by (inside).

Digits as 16 tokens of 16 numbers. Heads: flow matching, energy scores with and without a latent, IMM on flow matching's frozen
z. Orders: raster; the swap, in which a noised copy of the sequence comes first, so that refinement is outside; a masked order,
in which several tokens are drawn at once.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from imm import functional
from imm.data import mnist_5k
from imm.data.images import to_float
from imm.evaluation import PixelReference, covariance_slope, forced_energy_score
from imm.files import replacing
from imm.flow_map import FlowMap
from imm.networks import CausalTransformer, TokenHead
from imm.networks.causal import Block
from imm.objectives import IMM, EnergyScore, FlowMatching, Objective
from imm.pictures import grid, save_picture
from imm.sampling import Sampler, TokenSampler
from imm.sampling.tokens import HeadSteps
from imm.studies.study import Criterion, Result, Study, markdown, plots

SIDE, PATCH, TOKENS, DIM, WIDTH = 16, 4, 16, 16, 96
#: Mean of the pixels, which is taken off the tokens.
MEAN = -0.737
#: t of the noised copy in the swap.
NOISED = 0.3
#: Passes of the backbone in the masked order. SEES: real tokens before the ones that are scored.
ITERATIONS = (1, 4, 16)
SEES = (0, 4, 8, 12)
_COLUMNS = (
    *(
        ("head", "head"),
        ("order", "order"),
        ("steps", "head steps"),
        ("passes", "backbone passes"),
        ("visible", "tokens before"),
    ),
    *(("label_match", "label match"), ("spread", "spread"), ("mmd", "MMD"), ("slope", "slope"), ("forced", "energy score")),
    *(("us", "us a token"), ("seconds", "training CPU seconds")),
)


@dataclass
class _Plan:
    """Training steps of each model, samples, and the head steps that are scored."""

    steps: int
    masked_steps: int
    samples: int
    counts: dict[str, Sequence[int]]


FULL = _Plan(
    1200,
    4800,
    1000,
    {
        "flow matching": (1, 2, 4, 8, 16, 32),
        "energy score at t_max": (1,),
        "energy score, latent": (1, 2, 4),
        "IMM on frozen z": (1, 2, 4),
    },
)
QUICK = _Plan(40, 40, 100, {"flow matching": (1, 2), "energy score, latent": (1,), "IMM on frozen z": (1, 2)})


class Masked(nn.Module):
    """z of every token, given those that are visible: the causal transformer's blocks without its mask."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedder, self.class_embedder = nn.Linear(DIM, WIDTH), nn.Embedding(11, WIDTH)
        self.hidden = nn.Parameter(0.02 * torch.randn(WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(TOKENS + 1, WIDTH))
        self.blocks = nn.ModuleList([Block(WIDTH, 4) for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.class_embedder.weight, std=0.5)

    def forward(self, tokens: Tensor, labels: Tensor, visible: Tensor) -> Tensor:
        """Tokens ``[B, T, D]``, of which ``visible`` ``[B, T]`` are seen -> ``[B, T, C]``."""
        h = torch.where(visible[..., None], self.token_embedder(tokens), self.hidden)
        h = torch.cat([self.class_embedder(labels)[:, None], h], 1) + self.positions
        for block in self.blocks:
            h = block(h, causal=False)
        return self.norm(h)[:, 1:]


@dataclass
class _Model:
    backbone: Any
    head: FlowMap
    seconds: float


class _Digits:
    """The data, its scores, and the models, trained where the folder has none."""

    def __init__(self, folder: Path, plan: _Plan, device: torch.device, say: Callable[[str], None]) -> None:
        data = mnist_5k(SIDE)
        assert data.labels is not None
        self.folder, self.plan, self.device, self.say = folder, plan, device, say
        self.labels = data.labels.to(device)
        self.tokens = to_tokens(to_float(data.images)).to(device)
        self.reference = PixelReference(data.images, data.labels, 10)
        self.classes = torch.arange(plan.samples) % 10

    def model(
        self,
        name: str,
        make: Callable[[], tuple[nn.Module, Objective]],
        z_of: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]],
        steps: int,
        repeat: int,
        frozen: bool = False,
    ) -> _Model:
        """A backbone and a head: AdamW, 32 digits a step, a linear decay over the second half, an average of 0.995.

        ``z_of(backbone, tokens, labels)``: z and the tokens that the head learns, a row each. ``repeat``: head rows a token.
        """
        torch.manual_seed(0)
        backbone, objective = make()
        learned = nn.ModuleList([objective] if frozen else [backbone, objective]).to(self.device)
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            started = time.process_time()
            self._train(name, learned, backbone.to(self.device), objective, z_of, steps, repeat, frozen)
            spent = {"seconds": torch.tensor(time.process_time() - started), "steps": torch.tensor(steps)}
            weights = {key: value.detach().cpu().contiguous() for key, value in learned.state_dict().items()}
            with replacing(file) as part:
                part.write_bytes(save({**weights, **spent}))
        weights = load_file(file)
        seconds, found = float(weights.pop("seconds")), int(weights.pop("steps"))
        if found != steps:
            raise ValueError(f"out: expected {file} of {steps} training steps, got one of {found}")
        learned.load_state_dict(weights)
        return _Model(backbone.to(self.device).eval(), objective.flow_map.eval(), seconds)

    def _train(
        self,
        name: str,
        learned: nn.ModuleList,
        backbone: nn.Module,
        objective: Objective,
        z_of: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]],
        steps: int,
        repeat: int,
        frozen: bool,
    ) -> None:
        weights = list(learned.parameters())
        average = torch.optim.swa_utils.AveragedModel(learned, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
        optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
        decay = lambda step: min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - step / steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
        for step in range(steps):
            rows = torch.randint(0, len(self.tokens), (32,), device=self.device)
            with torch.set_grad_enabled(not frozen):
                z, x = z_of(backbone, self.tokens[rows], self.labels[rows])
            loss, _ = objective(x.repeat(repeat, 1), cond=z.repeat(repeat, 1))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(learned)
            if (step + 1) % max(1, steps // 2) == 0:
                self.say(f"{name}: step {step + 1} of {steps}, loss {loss.item():.4f}")
        learned.load_state_dict(average.module.state_dict())

    def scores(self, made: Tensor) -> dict[str, float]:
        """Label match, spread, MMD and slope of sequences of the classes 0 to 9 in order."""
        made, classes = made.cpu(), self.classes[: len(made)]
        scores = self.reference.score(to_images(made), classes)
        slope = covariance_slope(made, classes, self.tokens.cpu(), self.labels.cpu())
        return {"label_match": scores.label_match, "spread": scores.spread, "mmd": scores.mmd, "slope": slope}


def to_tokens(images: Tensor) -> Tensor:
    """``[N, 1, 16, 16]`` -> ``[N, 16, 16]``, patches in raster order."""
    patches = (images - MEAN).reshape(-1, SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    return patches.transpose(2, 3).reshape(-1, TOKENS, DIM)


def to_images(tokens: Tensor) -> Tensor:
    """The inverse of :func:`to_tokens`, clamped to [-1, 1]."""
    patches = tokens.reshape(-1, SIDE // PATCH, SIDE // PATCH, PATCH, PATCH)
    return (patches.transpose(2, 3).reshape(-1, 1, SIDE, SIDE) + MEAN).clamp(-1, 1)


def run(folder: Path, quick: bool, device: torch.device, say: Callable[[str], None]) -> Result:
    """Train what is missing, sample and score."""
    plan = QUICK if quick else FULL
    digits = _Digits(folder, plan, device, say)
    rows: list[dict[str, Any]] = []
    shown: list[tuple[str, Tensor]] = []
    for name, model in _heads(digits).items():
        for steps in plan.counts[name]:
            row, made = _row(digits, name, model, steps)
            rows.append(row)
            say(f"{name}, {steps} steps: label match {row['label_match']:.1%}, slope {row['slope']:.2f}")
            if steps in (1, 2, max(plan.counts[name])):
                shown.append((f"{name}, {steps}", to_images(made[:10])))
            rows += _visible(digits, name, model, steps)
    rows += _swap(digits, shown)
    rows += _any_order(digits, shown)
    save_picture(grid(shown), folder / "samples.png")
    figures = [
        *_curves(folder, rows),
        (folder / "samples.png", "The same seeds: heads and their steps, the swap, the masked order."),
    ]
    return Result(rows, criteria(rows, plan), _COLUMNS, figures, _TEXT, summary(rows))


def _head(latent: int = 0, second_time: str = "none", parametrization: str = "euler_fm") -> FlowMap:
    network = TokenHead(DIM, WIDTH, WIDTH, 2, latent_dim=latent, frequencies=64)
    return FlowMap(network, second_time=second_time, parametrization=parametrization)


def _backbone(tokens: int = TOKENS) -> CausalTransformer:
    return CausalTransformer(DIM, WIDTH, depth=3, heads=4, max_tokens=tokens, num_classes=10)


def _each(backbone: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return backbone(tokens, labels).flatten(0, 1), tokens.flatten(0, 1)


def _heads(digits: _Digits) -> dict[str, _Model]:
    """The heads in raster order, by name."""
    plan, found = digits.plan, {}
    fm = digits.model("fm", lambda: (_backbone(), FlowMatching(_head())), _each, plan.steps, repeat=2)
    found["flow matching"] = fm
    if "energy score at t_max" in plan.counts:
        make = lambda: (_backbone(), EnergyScore(_head(parametrization="identity"), samples=2))
        found["energy score at t_max"] = digits.model("energy", make, _each, plan.steps, repeat=1)
    make = lambda: (_backbone(), EnergyScore(_head(DIM, parametrization="identity"), samples=2))
    found["energy score, latent"] = digits.model("latent", make, _each, plan.steps, repeat=1)
    make_imm = lambda: (fm.backbone, IMM(_head(second_time="stride"), particles=4, k=12, a=1))
    steps = plan.steps * 5 // 6
    found["IMM on frozen z"] = digits.model("imm", make_imm, _each, steps, repeat=2, frozen=True)
    return found


def _method(head: FlowMap) -> str:
    return "restart" if head.latent_dim else "pushforward"


def _row(digits: _Digits, name: str, model: _Model, steps: int) -> tuple[dict[str, Any], Tensor]:
    """A head in raster order: its samples' scores and the time of a token, one sequence at a time."""
    count = len(digits.classes)
    settings: dict[str, Any] = {"steps": steps, "max_tokens": TOKENS}
    made = TokenSampler(model.backbone, model.head, rows=min(250, count), **settings).sample(range(count), digits.classes)
    sampler = TokenSampler(model.backbone, model.head, **settings)
    best = min(_timed(lambda: sampler.sample([0], [0])) for _ in range(5))
    row = {"head": name, "order": "raster", "steps": steps, "passes": TOKENS, "seconds": round(model.seconds, 1)}
    return {**row, **digits.scores(made), "us": round(1e6 * best / TOKENS, 1)}, made


def _timed(call: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    call().cpu()  # waits for the device
    return time.perf_counter() - started


@torch.no_grad()
def _visible(digits: _Digits, name: str, model: _Model, steps: int) -> list[dict[str, Any]]:
    """The energy score of tokens that have 0, 4, 8 and 12 or more real ones before."""
    count = min(500, len(digits.classes))
    real, labels = digits.tokens[:count], digits.labels[:count]
    z = model.backbone(real, labels)
    sampler = Sampler(model.head, steps=steps, method=_method(model.head), shape=(DIM,))
    rows = []
    for first in SEES:
        part = slice(first, first + 4 if first else 1)
        score = forced_energy_score(sampler, z[:, part].flatten(0, 1), real[:, part].flatten(0, 1))
        rows.append({"head": name, "order": "raster, real tokens", "steps": steps, "visible": first, "forced": score})
    return rows


def _swap(digits: _Digits, shown: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Refinement outside, sequence inside: a noised copy of the tokens comes first, and the clean ones see all of it."""

    def both(backbone: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        noised = (1 - NOISED) * tokens + NOISED * 0.5 * torch.randn_like(tokens)
        return _each(backbone, torch.cat([noised, tokens], 1), labels)

    make = lambda: (_backbone(2 * TOKENS), EnergyScore(_head(DIM, parametrization="identity"), samples=2))
    model = digits.model("swap", make, both, digits.plan.steps * 5 // 6, repeat=1)
    rows = []
    for steps in (1, 2):
        sampler = TokenSampler(model.backbone, model.head, steps=steps, max_tokens=2 * TOKENS)
        made = sampler.sample(range(len(digits.classes)), digits.classes)[:, TOKENS:]
        row = {"head": "energy score, latent", "order": "swap", "steps": steps, "passes": 2 * TOKENS}
        rows.append({**row, **digits.scores(made), "seconds": round(model.seconds, 1)})
        shown.append((f"swap, {steps}", to_images(made[:10])))
    return rows


def _any_order(digits: _Digits, shown: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Several tokens at once, in an order that each seed draws: 1 iteration is tokens that know only the class."""

    def hidden(backbone: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share = 1 - 0.9 * torch.rand(len(tokens), 1, device=tokens.device).square()
        place = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1).argsort(1)
        drawn = place < (share * TOKENS).ceil().clamp(1, TOKENS)
        return backbone(tokens, labels, ~drawn)[drawn], tokens[drawn]

    make = lambda: (Masked(), EnergyScore(_head(DIM, parametrization="identity"), samples=2))
    model = digits.model("masked", make, hidden, digits.plan.masked_steps, repeat=1)
    rows = []
    for iterations in ITERATIONS:
        made = sample_masked(model.backbone, model.head, len(digits.classes), digits.classes.to(digits.device), iterations)
        row = {"head": "energy score, latent", "order": "masked", "steps": 1, "passes": iterations}
        rows.append({**row, **digits.scores(made), "seconds": round(model.seconds, 1)})
        shown.append((f"masked, {iterations}", to_images(made[:10].cpu())))
    return rows


def cosine(tokens: int, iterations: int) -> list[int]:
    """Tokens that are visible before each iteration i = 0, 1, ... and at the end: T - T cos(pi/2 i/N), one more each time."""
    counts = [0]
    for i in range(1, iterations):
        counts.append(min(tokens, max(counts[-1] + 1, tokens - int(tokens * math.cos(math.pi / 2 * i / iterations)))))
    return [*counts, tokens]


@torch.no_grad()
def sample_masked(backbone: Masked, head: FlowMap, count: int, labels: Tensor, iterations: int) -> Tensor:
    """Sequences of seeds 0 .. ``count`` - 1 in ``iterations`` passes of the backbone, one head step a token, by :func:`cosine`.

    A seed draws its order.
    """
    device, seeds = labels.device, torch.arange(count, device=labels.device)
    steps = HeadSteps(head, 1, "uniform", (), "restart", None).eval()
    noise = [functional.noise(seeds, (TOKENS, width), step) for step, width in steps.noises]
    noise[0] = noise[0] * head.sigma_data
    order = functional.noise(seeds, (TOKENS,), 1 << 62).argsort(1)
    tokens = torch.zeros(count, TOKENS, DIM, device=device)
    visible = torch.zeros(count, TOKENS, dtype=torch.bool, device=device)
    for done, until in itertools.pairwise(cosine(TOKENS, iterations)):
        now = order[:, done:until]
        take = lambda value, now=now: value.gather(1, now[..., None].expand(*now.shape, value.shape[2])).flatten(0, 1)
        z = take(backbone(tokens, labels, visible))
        drawn = steps(z, torch.cat([take(one) for one in noise], 1)).reshape(*now.shape, DIM)
        tokens.scatter_(1, now[..., None].expand_as(drawn), drawn)
        visible.scatter_(1, now, True)
    return tokens


_TEXT = (
    "Label match: share of samples whose nearest real digit has the class asked for. Spread: pixel deviation inside a class "
    "over the real one. MMD: squared, on raw pixels. Slope: covariance between different tokens over the real one; real digits "
    "have .97, digits whose tokens are shuffled within their class -.02, and the other three scores hardly tell them apart. "
    "Energy score: of a token, given the real tokens before; lower is better.",
    "One training seed a model: another one moves label match by 6 points. Passes of the backbone and head steps are what a "
    "sequence costs; the time of a token is one sequence at a time, of the machine that ran this.",
)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Two tables in Markdown: scores, and the energy score over tokens before and head steps."""
    cells = lambda row: [
        *(f"{row['head']}, {row['order']}", str(row["passes"]), str(row["steps"])),
        *(f"{row['label_match']:.0%}", f"{row['spread']:.0%}", f"{row['mmd'] * 1000:.1f}", f"{row['slope']:.2f}"),
    ]
    header = ["", "backbone passes", "head steps", "label match", "spread", "MMD x 1000", "slope"]
    first = markdown(header, [cells(row) for row in rows if "slope" in row])
    seen: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        if "forced" in row:
            seen.setdefault((row["head"], row["steps"]), []).append(f"{row['forced']:.3f}")
    lines = [[f"{head}, {steps}", *values] for (head, steps), values in seen.items()]
    return first + "\n" + markdown(["energy score with real tokens before:", *map(str, SEES)], lines)


def criteria(rows: Sequence[dict[str, Any]], plan: _Plan) -> list[Criterion]:
    """What must hold; nothing of a quick run."""
    if plan is not FULL:
        return []
    found = {(row["head"], row["order"], row["steps"], row["passes"]): row for row in rows if "slope" in row}
    one = found["energy score, latent", "raster", 1, TOKENS]
    two = found["IMM on frozen z", "raster", 2, TOKENS]
    blur = found["flow matching", "raster", 1, TOKENS]
    alone = found["energy score, latent", "masked", 1, 1]
    return [
        Criterion("energy score with a latent, one step: label match", one["label_match"], low=0.6),
        Criterion("energy score with a latent, one step: spread", one["spread"], low=0.85),
        Criterion("energy score with a latent, one step: slope", one["slope"], low=0.6),
        Criterion("IMM on frozen z, two steps: label match", two["label_match"], low=0.65),
        Criterion("IMM on frozen z, two steps: slope", two["slope"], low=0.65),
        Criterion("flow matching, one step, is a blur: spread", blur["spread"], high=0.6),
        Criterion("tokens that know only the class do not fit together: slope", alone["slope"], high=0.2),
    ]


def _curves(folder: Path, rows: Sequence[dict[str, Any]]) -> list[tuple[Path, str]]:
    pyplot = plots()
    if pyplot is None:
        return []
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    names = dict.fromkeys(row["head"] for row in rows if row["order"] == "raster")
    for name in names:
        own = [row for row in rows if row["head"] == name and row["order"] == "raster"]
        axes[0].plot([row["us"] for row in own], [row["slope"] for row in own], marker="o", label=name)
        seen = [row for row in rows if row["head"] == name and "forced" in row]
        most = max(row["steps"] for row in seen)
        for steps, style in ((1, ":"), (most, "-")):
            part = [row for row in seen if row["steps"] == steps]
            line = [row["visible"] for row in part], [row["forced"] for row in part]
            axes[1].plot(*line, style, marker="o", label=f"{name}, {steps}", color=f"C{list(names).index(name)}")
    axes[0].set(xlabel="us a token, one sequence at a time", ylabel="slope (1: real)", xscale="log", title="inside: head steps")
    axes[1].set(xlabel="real tokens before", ylabel="energy score (lower is better)", title="outside: tokens")
    for axis in axes:
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=7)
    target = folder / "curves.png"
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    return [(target, "How well tokens fit together over the time of a token; the energy score over the tokens before.")]


STUDY = Study("Two axes: tokens outside, refinement inside", run)
