"""The training step as a benchmark: every form is right, call after call; parts, counts, memory; a wrong loss is refused."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from imm.benchmark import harness, load, memory, rows, steps
from imm.benchmark.memory import peak_bytes
from imm.benchmark.networks import random_convolutions, work_of
from imm.networks import DDPMpp, DiT, UNet
from imm.networks.dit import SIZES
from imm.presets import Preset

CPU = torch.device("cpu")
BRIEF = harness.Effort(0.0, 3, 3)
ACCEPTED = (1e-4, 1e-3, 1e-3)


@functools.cache
def tiny() -> UNet:
    made = UNet(channels=3, resolution=16, num_classes=5, width=4, multipliers=(1,))
    return random_convolutions(made)


def training(particles: int = 2, optimizer: str = "adamw", dtype: torch.dtype = torch.float32) -> steps.Training:
    watched = "conv_in.weight", "conv_out.weight"
    return steps.Training(tiny, Preset("UNet", {}), particles, optimizer, dtype, watched)


def batch(images: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(images, 3, 16, 16) * 0.5, torch.arange(images) % 5


def right(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], accepted: tuple[float, ...] = ACCEPTED) -> bool:
    errors = harness.errors(found, truth)
    return len(errors) == len(accepted) and all(error <= most for error, most in zip(errors, accepted, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
@pytest.mark.parametrize("make", [steps.trainer_step, steps.plain_step])
def test_every_call_gives_the_loss_and_gradients_of_the_first(make: Callable[..., Any], optimizer: str) -> None:
    given, setup = batch(12), training(optimizer=optimizer)
    truth = steps.exact_outputs(setup, *given)  # six groups: in two parts
    step = make(setup, *given)
    outputs = [tuple(value.clone() for value in step()) for _ in range(3)]
    assert right(outputs[0], truth)
    assert all(torch.equal(a, b) for later in outputs[1:] for a, b in zip(outputs[0], later, strict=True))


def test_sixteen_bits_are_worse_and_within_their_tolerance() -> None:
    given, setup = batch(8), training(dtype=torch.bfloat16)
    truth = steps.exact_outputs(setup, *given)
    for make in (steps.trainer_step, steps.plain_step):
        outputs = make(setup, *given)()
        assert right(outputs, truth, (1e-2, 5e-2, 5e-2))
        assert not right(outputs, truth)


def test_a_wrong_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = load("objective").case("UNet", 8, 4, CPU, compiled=False)
    given = declared.inputs()
    truth = declared.truth(*given)
    original = steps.plain_mmd
    monkeypatch.setattr(steps, "plain_mmd", lambda y_t, y_r, scale: original(y_t, y_r, 1.01 * scale))
    found = harness.errors(declared.peers["plain eager step"](*given)(), truth)
    assert "refused: wrong" in str(harness.refusal(declared, "plain eager step", found))
    found = harness.errors(declared.peers["imm.training.Trainer"](*given)(), truth)
    assert harness.refusal(declared, "imm.training.Trainer", found) is None


def test_memory_of_a_step_does_not_grow_with_the_particles() -> None:
    given = batch(32)
    ours = {m: peak_bytes(functools.partial(steps.trainer_step, training(m)), given, CPU) for m in (4, 16)}
    plain = {m: peak_bytes(functools.partial(steps.plain_step, training(m)), given, CPU) for m in (4, 16)}
    assert ours[16] <= 1.01 * ours[4]
    assert plain[16] > 1.1 * plain[4]
    assert ours[16] < plain[16]


def test_parts_do_the_work_of_the_step() -> None:
    given, setup = batch(8), training()
    truth = steps.exact_outputs(setup, *given)
    found = {name: peer(*given) for name, peer in steps.parts(setup).items()}
    assert list(found) == [
        steps.DRAW,
        steps.LEARNS,
        steps.TARGET,
        steps.LOSS,
        steps.BACKWARD,
        steps.OPTIMIZER,
        steps.AVERAGE,
    ]
    for _ in range(2):
        outputs = {name: step() for name, step in found.items()}
        (loss,) = outputs[steps.LOSS]
        assert float(loss) == pytest.approx(float(truth[0]), rel=1e-4)
        x_t, x_r = outputs[steps.DRAW]
        assert not torch.equal(x_t, x_r)
        assert outputs[steps.LEARNS][0].shape == outputs[steps.TARGET][0].shape == given[0].shape


class _Graphs:
    """In the place of CUDA's: what is captured runs at once, from the seed with which it will be replayed."""

    def __init__(self) -> None:
        self.replays = 0
        self.CUDAGraph = lambda: SimpleNamespace(replay=self._replay)
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = lambda side: contextlib.nullcontext()
        self.graph_pool_handle = lambda: (0, 1)

    def _replay(self) -> None:
        self.replays += 1

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: tuple[int, int]) -> Iterator[None]:
        torch.manual_seed(steps.SEED)
        yield


def test_the_captured_step_is_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    given, setup = batch(8), training()
    truth = steps.exact_outputs(setup, *given)
    fake = _Graphs()
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    step = steps.captured_step(setup, *given)
    assert fake.replays == 0
    assert right(step(), truth)
    assert fake.replays == 1


def test_the_captured_step_keeps_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, seen = _Graphs(), []
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    copied = steps.Training.copied

    def watched(self: steps.Training) -> torch.nn.Module:
        made = copied(self)
        seen.extend(weakref.ref(parameter) for parameter in made.parameters())
        return made

    monkeypatch.setattr(steps.Training, "copied", watched)
    step = steps.captured_step(training(), *batch(8))
    gc.collect()
    assert seen
    assert all(parameter() is not None for parameter in seen)
    del step
    gc.collect()
    assert not any(parameter() is not None for parameter in seen)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_step_is_right() -> None:
    cuda = torch.device("cuda")
    setup = training()
    setup = steps.Training(lambda: tiny().to(cuda), *[getattr(setup, n) for n in list(setup.__dataclass_fields__)[1:]])
    given = tuple(value.to(cuda) for value in batch(8))
    truth = steps.exact_outputs(setup, *given)
    step = steps.captured_step(setup, *given)
    for _ in range(2):
        assert right(step(), truth)


def test_declaring_cases_for_a_gpu_makes_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("objective")

    def refuse(device: torch.device) -> None:
        raise AssertionError("a network was made")

    for name, network in module.NETWORKS.items():
        monkeypatch.setitem(module.NETWORKS, name, network._replace(made=refuse))
    declared = list(module.cases(torch.device("cuda"), quick=False))
    assert [(c.mode, c.size) for c in declared[:2]] == [
        ("DiT-S/2, one step", "batch=128 M=4"),
        ("DiT-B/2, one step", "batch=64 M=4"),
    ]
    assert {module.CAPTURED, module.OURS, module.PLAIN} <= set(declared[-1].peers)
    assert module.COMPILED in declared[0].peers
    weights, images = 33_105_424, 128 * 4 * 32 * 32
    assert declared[0].bytes == 4 * (10 * weights + 5 * images)
    assert declared[0].flops == 4 * 128 * 12_108_693_504


def test_counts_of_the_networks() -> None:
    """DDPM++: the published figure; a DiT: products of a block, of the embedders and of the last layer."""
    with torch.device("meta"):
        assert work_of(DDPMpp()).flops == pytest.approx(42.4e9, rel=0.01)
        found = work_of(DiT("S", fused=False))
    features, depth, _ = SIZES["S"]
    tokens = 256
    blocks = depth * (24 * features**2 * tokens + 4 * tokens**2 * features + 12 * features**2)
    ends = 2 * tokens * 16 * features * 2 + 4 * features**2 + 2 * 2 * (256 * features + features**2)
    assert found.flops == blocks + ends
    assert found.image == 4 * 32 * 32
    embedders = 2 * (256 * features + features + features**2 + features) + 1001 * features
    assert found.conditioning == embedders + (6 * depth + 2) * (features**2 + features)
    assert found.parameters == sum(p.numel() for p in DiT("S").parameters())


def test_long_steps_are_timed_one_by_one() -> None:
    calls: list[int] = []

    def double(x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: (calls.append(1), (2 * x,))[1]

    declared = harness.Case(
        op="double",
        mode="forward",
        shape={"N": 10},
        dtype=torch.float32,
        bytes=80,
        flops=10,
        inputs=lambda: (torch.randn(10),),
        truth=lambda x: (2 * x.double(),),
        tolerances=(1e-6,),
        peers={"double": double},
        caches=("warm",),
        rounds=4,
    )
    first = harness.measure(declared, CPU, harness.Effort(9.0, 9, 9, visits=2))
    assert len(calls) == 2 + 1 + 2  # memory, warm-up, half of the rounds
    second = harness.measure(declared, CPU, harness.Effort(9.0, 9, 9, visits=2), first)
    assert len(calls) == 5 + 1 + 2  # warm-up, the other half
    (_, row) = rows.joined(first, second)
    assert (row.rounds, row.method, row.status) == (4, "wall clock over one call", rows.OK)
    (_, row) = harness.measure(declared, CPU, harness.Effort(9.0, 9, 9))
    assert (row.rounds, len(calls)) == (4, 8 + 2 + 1 + 4)


def test_many_bytes_are_copied_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = load("noise").case(3, 1000, CPU)
    monkeypatch.setattr(harness, "_COPIED", 100)
    copied: list[int] = []
    original = Tensor.copy_
    monkeypatch.setattr(Tensor, "copy_", lambda self, source: (copied.append(source.nbytes), original(self, source))[1])
    (target,) = harness.copy_peer(declared, CPU)()()
    assert target.numel() == 100
    assert max(copied) == 400
    assert 2 * sum(copied) == pytest.approx(declared.bytes, abs=8)


@pytest.mark.parametrize("fitting", [0, 3, 4, 100, 997])
def test_the_largest_size_is_found(fitting: int) -> None:
    tried: list[int] = []

    def peak(size: int) -> int | None:
        tried.append(size)
        return 10 * size if size <= fitting else None

    size, taken, above = memory.largest(peak, 4, seconds=60)
    assert size <= fitting < above
    assert above - size <= max(4, size // 8)
    assert taken == 10 * size
    assert len(tried) == len(set(tried)) < 16
    assert memory.largest(peak, 4, seconds=0.0) == (0, 0, None)


def test_a_step_that_does_not_fit_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    fake = SimpleNamespace(
        reset_peak_memory_stats=lambda: None,
        synchronize=lambda: None,
        max_memory_allocated=lambda: 123,
        empty_cache=lambda: emptied.append("emptied"),
    )
    monkeypatch.setattr(torch, "cuda", fake)

    def too_large() -> tuple[Tensor, ...]:
        raise torch.OutOfMemoryError("no memory")

    assert memory.bytes_of_two_steps(lambda: too_large) is None
    assert memory.bytes_of_two_steps(lambda: lambda: ()) == 123
    assert emptied == ["emptied", "emptied"]


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.full)])
def test_rows_about_memory_are_of_the_full_form(measured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("objective")
    if not measured:
        monkeypatch.setattr(module, "peak_bytes", lambda *arguments: 123_000_000)
    monkeypatch.setattr(module, "cases", lambda device, quick: [])
    monkeypatch.setattr(module, "CPU_MEMORY", (("UNet", 16),))
    monkeypatch.setattr(harness, "load", lambda op: module)
    said: list[str] = []
    found = harness.run("objective", CPU, None, quick=False, say=said.append, tests=measured)
    assert [(row.mode, row.shape, row.peer) for row in found] == [
        ("UNet, memory of a step", "batch=16", f"{peer}, M={m}") for peer in (module.OURS, module.PLAIN) for m in (4, 16)
    ]
    for row in found:
        assert row.peak_bytes is not None
        assert row.status == f"ok: {row.peak_bytes / 16e6:.1f} MB an image"
        assert row.median_us is None
    head, columns, first, *_ = said[0].splitlines()
    assert head == f"objective UNet, memory of a step, batch=16, float32, cpu, {torch.get_num_threads()} threads"
    assert columns.split() == ["peer", "memory", "peak"]
    assert first.endswith(f"{found[0].peak_bytes / 1e6:.1f} MB")
    assert " MB an image " in first
    assert harness.run("objective", CPU, None, quick=True, say=said.append, tests=False) == []


def test_the_largest_batch_and_particles_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("objective")
    monkeypatch.setattr(module, "CUDA_MEMORY", ("UNet",))
    monkeypatch.setattr(module, "allocator_limit", lambda most, device: contextlib.nullcontext())

    def bytes_of(name: str, device: torch.device, peer: str, particles: int, images: int) -> int | None:
        needed = 10 * images + (images * particles if peer == module.PLAIN else 0)
        return needed if needed <= 4000 else None

    monkeypatch.setattr(module, "_peak", bytes_of)
    batches, particles = module.limits(torch.device("cuda"))
    assert [(row.shape, row.status) for row in batches] == [
        ("M=4", "ok: 384 images, 416 are too many"),
        ("M=4", "ok: 256 images, 288 are too many"),
    ]
    assert [(row.shape, row.status) for row in particles] == [
        ("batch=128", "ok: M up to 128"),
        ("batch=128", "ok: M up to 16"),
    ]
