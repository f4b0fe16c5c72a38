"""Forward-mode derivatives: right through the networks in their plain form, and an error with the remedy through every op."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from small import spread
from tolerance import distance
from torch import Tensor, nn
from torch.autograd import forward_ad

from imm.networks import DDPMpp, DiT, UNet
from imm.networks.layers import linear

#: noise takes integers only.
OPS = [name for name in SAMPLES if not name.startswith("noise")]
REMEDY = "has no forward-mode derivative .*: use torch's own operations"
MODES = {"with gradients": contextlib.nullcontext, "no_grad": torch.no_grad}


def calls(name: str) -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """By name, the op as a function of each of its floating arguments, and that argument."""
    form, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.imm, form), overload or "default")
    given = SAMPLES[name]("contiguous", torch.float32, "cpu")
    args, kwargs = (list(given[:-1]), given[-1]) if overload else (list(given), {})
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    place = lambda i: lambda value: op(*args[:i], value, *args[i + 1 :], **kwargs)
    found = {f"argument {i}": (place(i), a) for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()}
    for key in kwargs:
        found[key] = (lambda value, key=key: op(*args, **{**kwargs, key: value})), kwargs[key]
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPS)
def test_a_tangent_through_an_op_raises_and_names_the_remedy(name: str, mode: str) -> None:
    """In whatever argument it comes, as a dual number, by torch.func.jvp and by vmap of it; and not when there is none."""
    with MODES[mode]():
        for run, value in calls(name).values():
            run(value)
            with forward_ad.dual_level():
                run(value)  # forward mode, but no tangent
                with pytest.raises(NotImplementedError, match=REMEDY):
                    run(forward_ad.make_dual(value, torch.ones_like(value)))
        run, value = calls(name)["argument 0"]
        jvp = lambda tangent: torch.func.jvp(run, (value,), (tangent,))
        with pytest.raises(NotImplementedError, match=REMEDY):
            jvp(torch.ones_like(value))
        with pytest.raises(NotImplementedError, match=REMEDY):
            torch.vmap(jvp)(torch.ones(2, *value.shape))


def test_a_tangent_through_an_argument_that_requires_a_gradient_raises() -> None:
    for name in OPS:
        if name.endswith(".out"):
            continue
        run, value = calls(name)["argument 0"]
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REMEDY):
            run(forward_ad.make_dual(value.clone().requires_grad_(), torch.ones_like(value)))
        assert run(value) is not None  # the op works as before


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_fused_linear_has_its_tangent(mode: str, gelu: bool) -> None:
    layer, x, v = nn.Linear(8, 16), torch.randn(4, 8), torch.randn(4, 8)
    plain = lambda x: nn.functional.gelu(layer(x), approximate="tanh") if gelu else layer(x)
    expected = torch.func.jvp(plain, (x,), (v,))
    with MODES[mode]():
        found = torch.func.jvp(lambda x: linear(layer, x, gelu=gelu), (x,), (v,))
        several = torch.vmap(lambda v: torch.func.jvp(lambda x: linear(layer, x, gelu=gelu), (x,), (v,))[1])(
            torch.stack([v, 2 * v])
        )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(several, torch.stack([expected[1], 2 * expected[1]]))
    assert float(found[1].detach().norm()) > 0


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "UNet": lambda: UNet(1, 8, 3, width=8, multipliers=(1, 2)),
    "DDPMpp": lambda: DDPMpp(1, 8, 3, width=8, multipliers=(1, 2), blocks=1, attention=(4,)),
    "DiT": lambda: DiT("T", patch=4, channels=1, resolution=8, num_classes=3, fused=False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_network_has_the_tangent_of_a_difference(name: str, mode: str, size_t: None) -> None:
    network = spread(NETWORKS[name]().double().eval())
    x, v, t = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 1, 8, 8).double(), torch.tensor([300.0, 700.0]).double()
    call = lambda x, t, s: network(x, t, s, torch.tensor([0, 3]))
    along = lambda h: call(x + h * v, t + h, t / 2)
    expected = (along(1e-6) - along(-1e-6)) / 2e-6
    with MODES[mode]():
        _, found = torch.func.jvp(call, (x, t, t / 2), (v, torch.ones_like(t), torch.zeros_like(t)))
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_fused_dit_raises_and_names_its_plain_form(mode: str) -> None:
    network = DiT("S", patch=4, channels=1, resolution=8, num_classes=3).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([300.0, 700.0]).double()
    run = lambda t: network(x, t, t / 2, torch.tensor([0, 3]))
    with MODES[mode](), pytest.raises(NotImplementedError, match="fused=False"):
        torch.func.jvp(run, (t,), (torch.ones_like(t),))
