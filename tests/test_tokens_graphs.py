"""imm.TokenSampler on a GPU: the replay of a token's graph beside the same token step by step, captures that fail, packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imm import FlowMap, TokenSampler, package
from imm.networks import CausalTransformer, TokenHead

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

D, C, T = 16, 64, 24
SEEDS, LABELS = [7, 0, 2**40, 5], [0, 3, 2, 1]
GUIDED = ({}, None), ({"guide": "output"}, 1.7), ({"guide": "cond"}, [0.5, 2.0, 1.0, 0.0])


class Waits(CausalTransformer):
    """A backbone that asks the device for a number."""

    def decode(self, token: Tensor, position: Tensor, cache: list[Tensor]) -> Tensor:
        return super().decode(token, position, cache) * float(position.item() >= 0)


def sampler(latent: int = 0, kind: Any = CausalTransformer, dtype: Any = torch.float32, **settings: Any) -> TokenSampler:
    torch.manual_seed(0)
    backbone = kind(D, C, depth=3, heads=4, max_tokens=T, num_classes=3).eval().to("cuda", dtype)
    head = TokenHead(D, C, width=64, depth=2, latent_dim=latent)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.1)
    return TokenSampler(backbone, FlowMap(head.to("cuda", dtype)).eval(), **{"steps": 2, "max_tokens": T, **settings})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("settings", "guidance"), GUIDED)
@pytest.mark.parametrize("latent", [0, 3])
def test_replay_has_the_bits_of_step_by_step(latent, settings, guidance, dtype) -> None:
    by_graph = sampler(latent, dtype=dtype, graph=True, **settings)
    by_step = sampler(latent, dtype=dtype, graph=False, **settings)
    for seeds, tokens in ((SEEDS, None), ([1, 2, 3, 4], 5), (SEEDS, T)):  # a graph serves every call of its rows
        made = by_graph.sample(seeds, LABELS, tokens, guidance=guidance)
        assert torch.isfinite(made).all()
        assert torch.equal(made, by_step.sample(seeds, LABELS, tokens, guidance=guidance))
    assert by_graph.stats() == {"cached": [(4, guidance is not None)], "captured": 1, "eager": None}
    assert by_step.stats()["captured"] == 0


def test_a_stream_replays_what_a_call_does_and_the_processor_gives_the_same_to_rounding() -> None:
    by_graph = sampler(graph=True, rows=4)
    whole = by_graph.sample(SEEDS, LABELS)
    for chunk in (1, 5, T):
        assert torch.equal(torch.cat(list(by_graph.stream(SEEDS, LABELS, chunk=chunk)), 1), whole)
    streams = [by_graph.stream(SEEDS, LABELS, chunk=3), by_graph.stream(SEEDS, LABELS, chunk=3)]
    pairs = list(zip(*streams, strict=True))  # interleaved, each with a cache of its own
    assert all(torch.equal(a, b) for a, b in pairs)
    on_cpu = TokenSampler(by_graph.backbone.cpu(), by_graph.flow_map.cpu(), steps=2, max_tokens=T)
    torch.testing.assert_close(on_cpu.sample(SEEDS, LABELS), whole.cpu(), rtol=1e-2, atol=1e-2)


def test_weights_that_change_in_place_are_read_by_the_graph() -> None:
    made = sampler(graph=True)
    before = made.sample(SEEDS, LABELS)
    with torch.no_grad():
        for parameter in made.flow_map.network.parameters():
            parameter.mul_(0.9)
    after = made.sample(SEEDS, LABELS)
    assert not torch.equal(before, after)
    by_step = TokenSampler(made.backbone, made.flow_map, steps=2, max_tokens=T, graph=False)
    assert torch.equal(after, by_step.sample(SEEDS, LABELS))


def test_a_backbone_that_waits_for_the_device_is_not_captured() -> None:
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        made = (waiting := sampler(kind=Waits)).sample(SEEDS, LABELS)
    assert torch.equal(made, sampler(graph=False).sample(SEEDS, LABELS))
    assert waiting.stats()["captured"] == 0
    with pytest.raises(RuntimeError, match="cannot be captured"):
        sampler(kind=Waits, graph=True).sample(SEEDS, LABELS)
    assert torch.isfinite(torch.randn(8, device="cuda")).all()  # the generator is in no capture any more
    assert torch.equal(sampler(graph=True).sample(SEEDS, LABELS), made)


def test_a_package_is_captured_and_is_the_sampler_to_rounding(tmp_path: Path) -> None:
    made = sampler(3)
    package.export_tokens(made, path := tmp_path / "tokens.pt2", rows=4)
    by_graph, by_step = (package.TokenPackage(path, graph=graph).sample(SEEDS, LABELS) for graph in (True, False))
    assert torch.equal(by_graph, by_step)
    torch.testing.assert_close(by_graph, made.sample(SEEDS, LABELS), rtol=1e-3, atol=1e-3)
