"""imm.Sampler: the bits of the eager loop, images that depend on their own seed, what is captured and kept, and failures."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import time
import types
import warnings
import weakref
from typing import Any, ClassVar

import numpy as np
import parity
import pytest
import torch
from torch import Tensor, nn

import imm
from imm import FlowMap, Sampler, sampling
from imm.checkpoints import from_published
from imm.networks import DiT, UNet
from imm.networks.dit import Conditioner
from imm.ops import native
from imm.sampling import sampler

CASES = ["dit_s_2_stride_1step", "dit_s_2_stride_4step", "dit_s_4_identity_2step_nocfg"]
SHAPE = (1, 8, 8)
LABELS = torch.tensor([0, 2, 1, 3, 0])


@pytest.fixture(params=["native", "python"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which loop runs."""
    if request.param == "python":
        monkeypatch.setattr(native, "module", lambda: None)
    elif native.module() is None:
        pytest.skip(str(native.status()))
    return request.param


@pytest.fixture
def flow_map(small_flow_map: FlowMap, device: str) -> FlowMap:
    return small_flow_map.to(device).eval()


def eager(flow_map: FlowMap, made: Sampler, method: str, labels: Tensor | None, w: Any, **options: Any) -> Tensor:
    device = next(flow_map.parameters()).device
    x = sampling.initial_state(flow_map, range(len(LABELS)), SHAPE, device)
    labels = None if labels is None else labels.to(device)
    if method == "restart":
        return sampling.restart(flow_map, x, made.times, labels, w, seeds=range(len(LABELS)), **options)
    return sampling.pushforward(flow_map, x, made.times, labels, w, method=method, **options)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("guidance", [None, 1.5, "each"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", sampling.METHODS)
def test_it_has_the_bits_of_the_eager_loop(method, steps, guidance, labelled, flow_map, loop) -> None:
    w = torch.linspace(0.5, 2.0, 5, dtype=torch.float64) if guidance == "each" else guidance
    labels = LABELS if labelled else None
    for state_dtype in (torch.float32, torch.float64):
        made = Sampler(flow_map, steps=steps, method=method, state_dtype=state_dtype)
        out = made.sample(range(5), labels, w)
        assert out.dtype == state_dtype
        expected = eager(flow_map, made, method, labels, w, dtype=state_dtype)
        assert torch.equal(out, expected)
        assert torch.equal(made.sample(range(5), labels, w), out)


def test_defaults_and_initial_states(flow_map, loop, device) -> None:
    made = Sampler(flow_map, steps=2, guidance=1.5, kind="eta", mid_eta=(1.4,))
    assert made.times[1] == pytest.approx(0.58333333)
    out = made.sample(range(5), LABELS.tolist())
    assert torch.equal(out, eager(flow_map, made, "pushforward", LABELS, 1.5))
    x = torch.randn(5, *SHAPE)
    own = sampling.pushforward(flow_map, x.to(device), made.times, LABELS.to(device), 0.5)
    for given in (x, x.to(device)):
        assert torch.equal(made.sample(range(5), LABELS, 0.5, x=given), own)
    assert made.sample([], []).shape == (0, *SHAPE)


def test_a_network_without_classes(loop) -> None:
    torch.manual_seed(0)
    net = UNet(1, 8, 0, width=8, multipliers=(1, 2))
    nn.init.normal_(net.conv_out.weight, std=0.1)
    made = Sampler(FlowMap(net).eval(), steps=2)
    x = sampling.initial_state(made.flow_map, [3, 4], SHAPE)
    assert torch.equal(made.sample([3, 4]), sampling.pushforward(made.flow_map, x, made.times))
    with pytest.raises(ValueError, match="class-conditional"):
        made.sample([3, 4], guidance=1.5)


class Odd(nn.Module):
    """A network that returns its input, or its input in another dtype."""

    num_classes, channels, resolution = 0, 1, 8

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        return x if self.dtype is None else x.to(self.dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_outputs_that_alias_the_input_or_have_another_dtype(dtype, loop) -> None:
    flow_map = FlowMap(Odd(dtype)).eval()
    made = Sampler(flow_map, steps=3)
    x = sampling.initial_state(flow_map, range(3), SHAPE)
    assert torch.equal(made.sample(range(3)), sampling.pushforward(flow_map, x, made.times))


def published(name: str) -> tuple[FlowMap, Any, Any]:
    arrays, meta = parity.case(name)
    with torch.device("meta"):
        shapes = {f"model.{k}": tuple(v.shape) for k, v in DiT("S", int(meta["network"][-1])).state_dict().items()}
    state = {k: parity.weight(k, shape) for k, shape in shapes.items() if "pos_embed" not in k}
    return from_published(state, parity.published_settings(meta)).eval(), arrays, meta


@pytest.mark.parametrize("name", CASES)
def test_parity_with_recorded_samples(name, loop) -> None:
    flow_map, arrays, meta = published(name)
    made = Sampler(flow_map, steps=meta["num_steps"], kind=meta["discretization"], guidance=meta["cfg_scale"])
    out = made.sample(range(len(meta["labels"])), meta["labels"], x=torch.from_numpy(arrays["x_T"]).float())
    assert parity.relative(out, arrays["samples"]) < 1e-4


@pytest.fixture(scope="module")
def dit() -> FlowMap:
    torch.manual_seed(0)
    net = DiT("S", patch=4, resolution=16, num_classes=5)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    return FlowMap(net).eval()


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_a_dit_is_conditioned_once_a_run(guidance, dit, loop, monkeypatch) -> None:
    made = Sampler(dit, steps=3, guidance=guidance)
    labels, x = torch.tensor([4, 0, 4]), sampling.initial_state(dit, range(3), (4, 16, 16))
    expected = sampling.pushforward(dit, x, made.times, labels, guidance)
    made_for, calls = [], []
    start, call = Conditioner.__init__, Conditioner.__call__
    monkeypatch.setattr(Conditioner, "__init__", lambda *args: made_for.append(1) or start(*args))
    monkeypatch.setattr(Conditioner, "__call__", lambda *args: calls.append(1) or call(*args))
    out = made.sample(range(3), labels)
    assert torch.equal(made.sample(range(3), labels), out)
    made.sample(range(2), labels[:2])  # another loop
    assert (len(made_for), len(calls)) == (1, 3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(sampler, "MODULATION_BYTES", 0)
    made.refresh()
    assert torch.equal(made.sample(range(3), labels), expected)  # in every step, as the eager loop
    assert len(calls) == 3


def test_a_dit_whose_weights_changed_is_conditioned_anew(dit, loop) -> None:
    changed = copy.deepcopy(dit)
    made = Sampler(changed, steps=2)
    labels = torch.tensor([4, 0, 4])
    first = made.sample(range(3), labels)
    state = {name: value * (1.5 if "adaLN" in name else 1.0) for name, value in changed.network.state_dict().items()}
    changed.network.load_state_dict(state)
    second = made.sample(range(3), labels)
    assert not torch.allclose(first, second, rtol=1e-2)
    torch.testing.assert_close(second, Sampler(changed, steps=2).sample(range(3), labels), rtol=0, atol=0)
    with torch.no_grad():
        changed.network.blocks[0].adaLN_modulation[1].weight.mul_(0.5)
    made.refresh()
    torch.testing.assert_close(
        made.sample(range(3), labels), Sampler(changed, steps=2).sample(range(3), labels), rtol=0, atol=0
    )


def test_an_unconditional_dit(loop) -> None:
    torch.manual_seed(0)
    flow_map = FlowMap(DiT("S", patch=4, resolution=16, num_classes=0)).eval()
    for parameter in flow_map.parameters():
        nn.init.normal_(parameter, std=0.02)
    made = Sampler(flow_map, steps=2)
    expected = sampling.pushforward(flow_map, sampling.initial_state(flow_map, range(3), (4, 16, 16)), made.times)
    torch.testing.assert_close(made.sample(range(3)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sampling.METHODS)
def test_an_image_is_the_same_in_any_batch(method, flow_map) -> None:
    made = Sampler(flow_map, steps=3, method=method, guidance=1.5)
    labels = torch.arange(64) % 3
    whole = made.sample(range(64), labels)
    for size in (1, 7):
        parts = [made.sample(range(i, min(i + size, 64)), labels[i : i + size]) for i in range(0, 64, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_with_fixed_rows_neighbours_change_no_bit(network, flow_map, dit, loop) -> None:
    made = Sampler(flow_map if network == "unet" else dit, steps=2, method="restart", guidance=1.5, rows=6)
    whole = made.sample(range(10), [0, 1, 2, 1, 0, 2, 1, 1, 0, 2])  # two parts, the second one padded
    assert torch.equal(made.sample(range(6), [0, 1, 2, 1, 0, 2]), whole[:6])
    assert torch.equal(made.sample([3], [1]), whole[3:4])
    assert torch.equal(made.sample([9, 4], [2, 0], torch.tensor([1.5, 1.5])), whole[[9, 4]])
    assert made.stats()["cached"] == [(6, True)]


def test_results_are_copies(flow_map, loop) -> None:
    made = Sampler(flow_map, steps=1)
    first = made.sample([0])
    kept = first.clone()
    made.sample([1])
    assert torch.equal(first, kept)


def test_weights_that_change(flow_map) -> None:
    copied, live = Sampler(flow_map, steps=1, dtype=torch.float64), Sampler(flow_map, steps=1)
    before = copied.sample([0])
    state = {k: v + 0.1 for k, v in flow_map.state_dict().items()}
    with torch.no_grad():
        flow_map.network.conv_out.bias.add_(0.5)
    assert torch.equal(copied.sample([0]), before)  # a copy, until it is refreshed
    copied.refresh()
    torch.testing.assert_close(copied.sample([0]), live.sample([0]))
    assert not torch.equal(copied.sample([0]), before)
    flow_map.load_state_dict(state)
    torch.testing.assert_close(copied.sample([0]), Sampler(flow_map, steps=1, dtype=torch.float64).sample([0]), rtol=0, atol=0)
    with torch.no_grad():
        flow_map.network.middle.norm1.weight.add_(1.0)
    part = {k: v + 0.1 for k, v in flow_map.network.middle.state_dict().items()}
    flow_map.network.middle.load_state_dict(part)
    torch.testing.assert_close(copied.sample([0]), live.sample([0]))


def test_a_network_that_is_cast(flow_map, loop) -> None:
    live = Sampler(flow_map, steps=1)
    live.sample([0])
    flow_map.double()
    assert torch.equal(live.sample([0]), Sampler(flow_map, steps=1).sample([0]))


def test_nothing_is_kept_alive_and_the_network_can_be_saved(small_flow_map, loop, tmp_path) -> None:
    made = Sampler(small_flow_map, steps=1, dtype=torch.bfloat16)
    made.sample([0])
    torch.save(small_flow_map, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    again.load_state_dict(small_flow_map.state_dict())
    assert not made._stale
    hooks = lambda: len(small_flow_map.network._load_state_dict_post_hooks)
    kept, network = weakref.ref(made), weakref.ref(again)
    assert hooks() == 1
    del made, again
    gc.collect()
    assert kept() is None
    assert network() is None
    assert hooks() == 0


def test_autocast_and_inference_mode_change_nothing(flow_map, loop) -> None:
    made = Sampler(flow_map, steps=2, guidance=1.5)
    expected = made.sample(range(3))
    with torch.autocast(made._device.type, torch.bfloat16):
        assert torch.equal(made.sample(range(3)), expected)
    with torch.inference_mode():
        inside = Sampler(flow_map, steps=2, guidance=1.5)
        assert torch.equal(inside.sample(range(3)), expected)
        assert torch.equal(made.sample(range(3)), expected)
    assert torch.equal(inside.sample(range(3)), expected)


def test_a_copy_in_16_bits_is_close_and_leaves_the_network_alone(flow_map, loop) -> None:
    exact = Sampler(flow_map, steps=2).sample(range(4))
    half = Sampler(flow_map, steps=2, dtype=torch.bfloat16)
    assert parity.relative(half.sample(range(4)).cpu(), exact.cpu().numpy()) < 0.05
    assert half._network.down[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert {p.dtype for p in flow_map.parameters()} == {torch.float32}


def test_two_threads_may_share_a_sampler(flow_map, loop) -> None:
    made = Sampler(flow_map, steps=2)
    expected = {n: made.sample(range(n)) for n in (1, 2, 5)}
    wrong: list[int] = []

    def work(sizes: list[int]) -> None:
        for n in sizes * 5:
            if not torch.equal(made.sample(range(n)), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(sizes,)) for sizes in ([1, 2, 5], [5, 1, 2])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no more")], ids=["interrupt", "error"])
def test_a_run_that_breaks_off_leaves_it_usable(error, flow_map, loop, monkeypatch) -> None:
    made = Sampler(flow_map, steps=3, guidance=1.5, graph=False)  # a replay calls no Python
    expected = made.sample(range(3))
    whole, calls = UNet.forward, []

    def forward(self: UNet, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return whole(self, *args)

    monkeypatch.setattr(UNet, "forward", forward)
    with pytest.raises(type(error)):
        made.sample(range(3))
    assert torch.equal(made.sample(range(3)), expected)


def test_running_out_of_memory_gives_smaller_parts_and_one_warning(flow_map, loop, monkeypatch) -> None:
    expected = Sampler(flow_map, steps=1).sample(range(9))
    whole = UNet.forward

    def forward(self: UNet, x: Tensor, *args: Any) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        return whole(self, x, *args)

    monkeypatch.setattr(UNet, "forward", forward)
    made = Sampler(flow_map, steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = made.sample(range(9))
    assert [str(w.message) for w in caught] == [
        f"out of memory with {n} images at a time; continuing with at most {(n + 1) // 2}" for n in (9, 5)
    ]
    torch.testing.assert_close(out, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.sample(range(9))
    with pytest.raises(torch.OutOfMemoryError):
        Sampler(flow_map, steps=1, rows=4).sample(range(2))


# What is captured, on a loop that can be told to be: a GPU's own is tested below. -------------------------------------------


class Recorder(sampler.PythonLoop):
    """A loop that says it is captured."""

    made: ClassVar[list[Recorder]] = []
    refuses: Exception | None = None

    def __init__(self, *, network: Any, prepare: Any, pool: object, **settings: Any) -> None:
        columns = {name: tuple(settings.pop(name)) for name in ("t", "s", "c_in", "c_skip", "c_out", "c_noise", "c_kept")}
        super().__init__(sampling.StepTable(**columns), network, prepare, **settings)
        Recorder.made.append(self)

    def capture(self) -> None:
        if Recorder.refuses is not None:
            raise Recorder.refuses
        self.captured = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    fake = types.SimpleNamespace(SamplingLoop=Recorder, make_graph_pool=lambda device: object())
    monkeypatch.setattr(native, "module", lambda: fake)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


def test_sizes_are_captured_once_largest_first_and_padded_to(flow_map, recorded) -> None:
    made = Sampler(flow_map, steps=2, max_graphs=3)
    with pytest.raises(ValueError, match="expected at most max_graphs = 3, got 4"):
        made.warmup([1, 2, 3, 4])
    made.warmup([1, 8, 4])
    assert [loop.rows for loop in recorded.made] == [8, 4, 1]
    expected = Sampler(flow_map, steps=2, graph=False).sample(range(7))
    torch.testing.assert_close(made.sample(range(7)), expected)  # in the 8
    assert made.sample(range(7), guidance=1.5).shape == (7, *SHAPE)  # another graph, and the 4 goes
    assert made.stats()["cached"] == [(1, False), (8, False), (7, True)]
    assert made.stats()["captures"] == 4
    assert made.stats()["replays"] == 5
    made.sample(range(5))  # 8 rows are too many
    assert [loop.rows for loop in recorded.made if loop.captured] == [8, 4, 1, 7, 5]


def test_a_network_that_cannot_be_captured_runs_step_by_step(flow_map, recorded, monkeypatch) -> None:
    monkeypatch.setattr(recorded, "refuses", RuntimeError("operation not permitted when stream is capturing\nmore"))
    made = Sampler(flow_map, steps=2)
    with pytest.warns(RuntimeWarning, match="cannot be captured, so it runs step by step: operation not permitted") as caught:
        out = made.sample(range(3))
    made.sample(range(2))
    assert len(caught) == 1
    assert torch.equal(out, Sampler(flow_map, steps=2, graph=False).sample(range(3)))
    assert made.stats()["captures"] == 0
    assert made.stats()["eager"] == "operation not permitted when stream is capturing"
    with pytest.raises(RuntimeError, match="cannot be captured: operation not permitted"):
        Sampler(flow_map, steps=2, graph=True).sample(range(3))


def test_out_of_memory_while_capturing_gives_smaller_graphs(flow_map, recorded, monkeypatch) -> None:
    whole = recorded.capture

    def capture(self: Recorder) -> None:
        if self.rows > 2:
            raise torch.OutOfMemoryError
        whole(self)

    monkeypatch.setattr(recorded, "capture", capture)
    made = Sampler(flow_map, steps=1)
    with pytest.warns(RuntimeWarning, match="continuing with at most 2"):
        assert made.sample(range(4)).shape == (4, *SHAPE)
    assert made.stats()["cached"] == [(2, False)]


def test_integers_of_numpy_are_integers(small_flow_map) -> None:
    made = Sampler(small_flow_map.eval(), steps=np.int64(2), rows=np.int64(4), graph=False)
    assert torch.equal(made.sample([1, 2]), Sampler(small_flow_map, steps=2, rows=4).sample([1, 2]))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
        ({"steps": 1.0}, TypeError, "steps: expected an integer, got 1.0"),
        (
            {"method": "dance"},
            ValueError,
            r"unknown method 'dance'; expected one of \['pushforward', 'restart', 'ddim', 'heun'\]",
        ),
        ({"kind": "edmm"}, ValueError, "unknown kind 'edmm'"),
        ({"graph": "never"}, ValueError, "graph: expected \"auto\", True or False, got 'never'"),
        ({"graph": True}, ValueError, "graph=True: expected a CUDA device"),
        ({"rows": 0}, ValueError, "rows: expected a count >= 1, got 0"),
        ({"rows": 1.5}, ValueError, "rows: expected a count >= 1, got 1.5"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected None or a floating dtype"),
        ({"state_dtype": torch.float16}, TypeError, "state_dtype: expected torch.float32 or torch.float64"),
        ({"max_graphs": 0}, ValueError, "max_graphs: expected a count >= 1, got 0"),
        ({"guidance": float("nan")}, ValueError, "guidance: expected finite numbers"),
    ],
)
def test_bad_settings_are_refused(options, error, text, small_flow_map) -> None:
    with pytest.raises(error, match=text):
        Sampler(small_flow_map.eval(), **{"steps": 2, **options})


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (([-1],), {}, r"seeds: expected integers in \[0, 2\^63\)"),
        ((4,), {}, "seeds: expected a list or tensor of integers, one per image, got 4"),
        (([4], 3), {}, "labels: expected a list or tensor of integers, one per image, got 3"),
        (([0, 1], [0]), {}, r"labels: expected \[2\] int64"),
        (([0], [4]), {}, "labels: expected classes 0..2 or 3 for none"),
        (([0], [1.5]), {}, r"labels: expected \[1\] int64 on cpu, got \[1\] of torch.float32"),
        (([0, 1], None, [1.0, 2.0, 3.0]), {}, r"guidance: expected a number or \[2\]"),
        (([0],), {"x": torch.zeros(1, 1, 4, 4)}, r"x: expected floating \[1, 1, 8, 8\], got \[1, 1, 4, 4\]"),
        (([0],), {"x": torch.zeros(1, 1, 8, 8).long()}, r"x: expected floating .* of torch.int64"),
    ],
)
def test_bad_calls_are_refused(arguments, options, text, small_flow_map) -> None:
    made = Sampler(small_flow_map.eval(), steps=2)
    with pytest.raises(ValueError, match=text):
        made.sample(*arguments, **options)


def test_a_wrong_network_is_refused(loop) -> None:
    class Wrong(Odd):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return x[:, :, :4]

    with pytest.raises(ValueError, match=r"network: expected an output of its input's shape \[2, 1, 8, 8\]"):
        Sampler(FlowMap(Wrong()).eval(), steps=2).sample([0, 1])

    class Pair(Odd):
        def forward(self, x: Tensor, *args: Any) -> Any:
            return x, x

    with pytest.raises(ValueError, match=r"network: expected an output of its input's shape \[2, 1, 8, 8\], got tuple"):
        Sampler(FlowMap(Pair()).eval(), steps=2).sample([0, 1])
    with pytest.raises(TypeError, match=r"flow_map: expected an imm\.FlowMap, got Wrong"):
        Sampler(Wrong(), steps=2)
    with pytest.raises(ValueError, match="expected evaluation mode"):
        Sampler(FlowMap(Odd()).train(), steps=2)


def soak(flow_map: FlowMap, calls: int) -> None:
    """Random calls from two threads, some results against the eager loop, and memory that does not grow."""
    made = Sampler(flow_map, steps=2)
    device, wrong, done = made.flow_map.network.conv_out.weight.device, [], []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda most: int(torch.randint(most, (), generator=generator))
        for call in range(calls // 2):
            n, w = 1 + draw(6), [None, 0.5, 2.0][draw(3)]
            seeds, labels = [draw(1000) for _ in range(n)], torch.randint(4, (n,), generator=generator)
            out = made.sample(seeds, labels, w)
            if call % 25 == 0:
                x = sampling.initial_state(flow_map, seeds, SHAPE, device)
                expected = sampling.pushforward(flow_map, x, made.times, labels.to(device), w)
                # On CUDA a call may run padded to a captured size, where convolutions may take another algorithm.
                same = torch.allclose(out, expected, 1.3e-6, 1e-5) if device.type == "cuda" else torch.equal(out, expected)
                if not same:
                    wrong.append(f"thread {seed}, call {call}")
            if call == calls // 4:
                memory.append(resident())
        done.append(seed)

    memory: list[int] = []
    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1]
    assert not wrong
    # Each capture costs CUDA's driver some of the host's memory.
    assert resident() - max(memory) < (200e6 if device.type == "cuda" else 20e6)
    assert len(made.stats()["cached"]) <= 8


def resident() -> int:
    """Bytes of this process's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_short_soak(flow_map, device) -> None:
    soak(flow_map, 100 if device == "cuda" else 400)  # sizes come and go there, and are captured again


@pytest.mark.full
def test_a_soak(flow_map, device) -> None:
    soak(flow_map, 1_000 if device == "cuda" else 10_000)


def test_a_call_costs_little_beside_the_network(flow_map, device) -> None:
    """One step against the bare network, in this thread's processor time: what else a busy machine does is not in it.
    bench_sampler.py asks 1.2 of the wall clock of an idle one."""
    made = Sampler(flow_map, steps=1)
    x, time_ = torch.randn(1, *SHAPE, device=device), torch.full((1,), 994.0, dtype=torch.float64, device=device)
    label = torch.tensor([1], device=device)

    def seconds(call: Any) -> float:
        start = time.thread_time()
        call()
        return time.thread_time() - start

    with torch.no_grad():
        pairs = [
            (seconds(lambda: made.sample([7], label)), seconds(lambda: flow_map.network(x, time_, time_, label)))
            for _ in range(60)
        ]
    ours, bare = (sorted(column)[len(pairs) // 4] for column in zip(*pairs, strict=True))
    assert ours < 2.5 * bare + 2e-4, (ours, bare)


DIGEST = """
import hashlib, torch, imm
torch.manual_seed(3)
net = imm.networks.UNet(1, 8, 3, width=8, multipliers=(1, 2))
torch.nn.init.normal_(net.conv_out.weight, std=0.1)
made = imm.Sampler(imm.FlowMap(net).eval(), steps=3, method="restart", guidance=1.5)
print(hashlib.sha256(made.sample([7, 2**40], [0, 2]).numpy().tobytes()).hexdigest())
"""


def test_restart_gives_the_same_bits_in_another_process(capsys) -> None:
    first = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout
    exec(DIGEST)
    second = capsys.readouterr().out
    assert len(first.strip()) == 64
    assert first == second


def test_it_is_public() -> None:
    assert imm.Sampler is Sampler
