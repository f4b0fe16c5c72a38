"""imm.Sampler on a GPU: a graph's replay beside the same steps, captures that fail, streams, and the user's own graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imm import FlowMap, Sampler, sampling
from imm.networks import DiT

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Waits(nn.Module):
    """A network that asks the device for a number."""

    num_classes, channels, resolution = 0, 1, 8

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return x * float(x.sum().item() > 0) * self.one


@pytest.fixture
def dit() -> FlowMap:
    torch.manual_seed(0)
    net = DiT("S", patch=4, resolution=16, num_classes=5)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    return FlowMap(net).eval().to("cuda")


@pytest.mark.parametrize("guidance", [None, 1.5])
@pytest.mark.parametrize("method", sampling.METHODS)
def test_replay_has_the_bits_of_step_by_step(method, guidance, small_flow_map) -> None:
    flow_map = small_flow_map.to("cuda").eval()
    by_graph = Sampler(flow_map, steps=3, method=method, guidance=guidance, graph=True)
    by_step = Sampler(flow_map, steps=3, method=method, guidance=guidance, graph=False)
    for seeds, labels in (([0, 1, 2], [0, 1, 2]), ([7, 8, 9], [2, 2, 3])):
        for w in (None, 2.0, [0.0, 1.0, 2.0]):
            assert torch.equal(by_graph.sample(seeds, labels, w), by_step.sample(seeds, labels, w))
    stats = by_graph.stats()
    assert stats["captures"] == (1 if guidance else 2)
    assert stats["replays"] == 6


def test_a_network_that_waits_for_the_device_is_not_captured() -> None:
    flow_map = FlowMap(Waits()).to("cuda").eval()
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        out = Sampler(flow_map, steps=2).sample([0, 1])
    assert torch.equal(out, Sampler(flow_map, steps=2, graph=False).sample([0, 1]))


def test_a_capture_that_fails_leaves_the_pool_and_the_allocators_as_they_were(small_flow_map) -> None:
    flow_map = small_flow_map.to("cuda").eval()
    made = Sampler(flow_map, steps=2, guidance=1.5, graph=True)
    expected = made.sample([0])
    # What a hook returns would be the network's input: the second value, None.
    waits = flow_map.network.register_forward_pre_hook(lambda module, args: (args[0].sum().item(), None)[1])
    with pytest.raises(RuntimeError, match="cannot be captured"):
        made.sample([0, 1])
    waits.remove()
    assert torch.isfinite(torch.randn(8, device="cuda")).all()  # the generator is in no capture any more
    replays = made.stats()["replays"]
    assert torch.equal(made.sample([0]), expected)
    assert made.stats()["replays"] == replays + 1
    for size in (2, 3, 9):  # the next captures in the same pool
        assert torch.equal(made.sample(range(size)), Sampler(flow_map, steps=2, guidance=1.5, graph=False).sample(range(size)))
    torch.empty(1 << 20, pin_memory=True)
    torch.cuda.empty_cache()
    made.refresh()  # the last graph of the pool goes
    assert torch.equal(made.sample([0]), expected)


def test_weights_that_move_under_a_graph(small_flow_map) -> None:
    flow_map = small_flow_map.to("cuda").eval()
    made = Sampler(flow_map, steps=2, graph=True)
    expected = made.sample([0])
    flow_map.cpu()
    flow_map.to("cuda")
    torch.empty(1 << 22, device="cuda").fill_(float("nan"))
    assert torch.equal(made.sample([0]), expected)


def test_pinned_inputs_may_be_rewritten_at_once(small_flow_map) -> None:
    made = Sampler(small_flow_map.to("cuda").eval(), steps=2, graph=True)
    expected = made.sample([5, 6])
    seeds = torch.tensor([5, 6]).pin_memory()
    torch.cuda._sleep(100_000_000)
    out = made.sample(seeds)
    seeds.zero_()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("graph", [True, False])
def test_seeds_labels_and_guidance_of_either_device(graph, small_flow_map) -> None:
    made = Sampler(small_flow_map.to("cuda").eval(), steps=2, guidance=1.5, graph=graph)
    seeds, labels, w = torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    expected = made.sample(seeds, labels, w)
    for place in range(8):
        given = [v.cuda() if place >> i & 1 else v for i, v in enumerate((seeds, labels, w))]
        made.sample([1, 2, 3], [1, 1, 1], [3.0, 3.0, 3.0])
        assert torch.equal(made.sample(*given), expected)


def test_a_dit_with_graphs(dit) -> None:
    for dtype in (None, torch.bfloat16):
        by_graph, by_step = (Sampler(dit, steps=3, guidance=1.5, dtype=dtype, graph=g) for g in (True, False))
        for labels in ([0, 1, 2], [3, 3, 5]):
            assert torch.equal(by_graph.sample(range(3), labels), by_step.sample(range(3), labels))


def test_no_python_runs_between_the_steps_of_a_replay(small_flow_map) -> None:
    made = Sampler(small_flow_map.to("cuda").eval(), steps=4, graph=True)
    made.warmup([2])
    calls: list[int] = []
    small_flow_map.network.register_forward_hook(lambda *args: calls.append(1))
    made.sample([0, 1])
    assert not calls


@pytest.mark.parametrize("graph", [True, False])
def test_streams_wait_for_each_other(graph, small_flow_map) -> None:
    made = Sampler(small_flow_map.to("cuda").eval(), steps=2, graph=graph)
    expected = [made.sample([i]) for i in range(8)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for i in range(8):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep((1 + i % 2) * 1_000_000)
            found.append(made.sample([i]))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_within_a_capture_a_call_is_refused(small_flow_map) -> None:
    made = Sampler(small_flow_map.to("cuda").eval(), steps=2)
    expected = made.sample([0])
    with pytest.raises(RuntimeError, match="a stream that is not being captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        made.sample([0])
    assert torch.equal(made.sample([0]), expected)


def test_a_users_own_graph_survives_a_capture(small_flow_map) -> None:
    """Its cuBLAS workspace is the stream's, and a capture of ours clears none but that of its own stream."""
    x, side = torch.randn(64, 1 << 16, device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = x @ x.T  # a sum that long is split, and its parts are in the workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        y = x @ x.T
    Sampler(small_flow_map.to("cuda").eval(), steps=2, graph=True).sample([0])
    torch.cuda.empty_cache()
    others = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]  # whatever was freed
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, expected)
    assert all(bool(other.isnan().all()) for other in others)
