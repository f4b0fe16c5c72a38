"""Forward-mode derivatives: right through the networks and their ops, and an error with the remedy through every other op."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import SAMPLES
from small import spread
from tolerance import distance
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from imm.networks import DDPMpp, DiT, UNet
from imm.networks.layers import linear
from imm.ops import adaln, attention, timestep_embedding

#: Ops with a forward derivative, and the plain torch function that they compute.
TANGENTS: dict[str, Callable[..., Any]] = {
    "adaln_modulate": adaln.adaln_modulate,
    "gated_residual_adaln": adaln.gated_residual_adaln,
    "timestep_attention": attention.timestep_attention,
    "timestep_embedding": timestep_embedding.timestep_embedding,
}
#: The others; noise takes integers only.
OPS = [name for name in SAMPLES if not name.startswith("noise") and name not in TANGENTS]
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


def given(name: str, dtype: torch.dtype, variant: str = "contiguous") -> tuple[list[Any], list[int], list[Tensor]]:
    """An op's arguments, the places of its tensors, and a tangent for each."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in SAMPLES[name](variant, dtype, "cpu")]
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    return args, places, [torch.randn_like(args[i]) for i in places]


def as_function(
    name: str, args: list[Any], places: list[int], function: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The op, or the function in its place, of its tensors."""
    run = function or getattr(torch.ops.imm, name)

    def call(*tensors: Tensor) -> Any:
        at = dict(zip(places, tensors, strict=True))
        return run(*(at.get(i, a) for i, a in enumerate(args)))

    return call


def flat(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("variant", ["contiguous", "permuted"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)], ids=str)
@pytest.mark.parametrize("name", TANGENTS)
def test_the_tangent_of_an_op_is_that_of_its_definition(name: str, dtype: torch.dtype, bound: float, variant: str) -> None:
    """In float64 by torch's own forward mode."""
    args, places, tangents = given(name, dtype, variant)
    wide = [a.double() if isinstance(a, Tensor) else torch.float64 if isinstance(a, torch.dtype) else a for a in args]
    exact = as_function(name, wide, places, TANGENTS[name])
    expected = torch.func.jvp(exact, tuple(wide[i] for i in places), tuple(t.double() for t in tangents))
    found = torch.func.jvp(as_function(name, args, places), tuple(args[i] for i in places), tuple(tangents))
    for a, b in zip((*flat(found[0]), *flat(found[1])), (*flat(expected[0]), *flat(expected[1])), strict=True):
        assert distance(a, b) < bound


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TANGENTS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_tangent_in_one_argument(name: str, mode: str) -> None:
    """In whatever argument it comes, as a dual number, by torch.func.jvp and by vmap of it."""
    args, places, tangents = given(name, torch.float64)
    exact, run = (as_function(name, args, places, function) for function in (TANGENTS[name], None))
    for i, place in enumerate(places):
        along = [t if j == i else torch.zeros_like(t) for j, t in enumerate(tangents)]
        _, expected = torch.func.jvp(exact, tuple(args[p] for p in places), tuple(along))
        here = lambda value, i=i: run(*(value if j == i else args[p] for j, p in enumerate(places)))
        with MODES[mode]():
            _, found = torch.func.jvp(here, (args[place],), (tangents[i],))
            several = torch.vmap(lambda t, here=here, place=place: torch.func.jvp(here, (args[place],), (t,))[1])(
                torch.stack([tangents[i], 2 * tangents[i]])
            )
            with forward_ad.dual_level():
                duals = flat(here(forward_ad.make_dual(args[place], tangents[i])))
                by_hand = [forward_ad.unpack_dual(dual).tangent for dual in duals]
        for a, b, c, d in zip(flat(expected), flat(found), by_hand, flat(several), strict=True):
            for other in (b, c, d[0], d[1] / 2):
                torch.testing.assert_close(other, a)


@pytest.mark.parametrize("name", TANGENTS)
def test_gradients_through_the_result_and_none_through_the_tangent(name: str) -> None:
    args, places, tangents = given(name, torch.float64)
    inputs = [args[i].requires_grad_() for i in places]
    run = as_function(name, args, places)
    up = [torch.randn_like(v) for v in flat(run(*inputs))]
    learns = [v.requires_grad for v in flat(run(*inputs))]  # lse does not
    loss = lambda results: sum((u * v).sum() for u, v, yes in zip(up, results, learns, strict=True) if yes)
    expected = torch.autograd.grad(loss(flat(run(*inputs))), inputs)
    results, dots = torch.func.jvp(run, tuple(inputs), tuple(tangents))
    found = torch.autograd.grad(loss(flat(results)), inputs, retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="second derivatives are not supported"):
        torch.autograd.grad(flat(dots)[0].sum(), inputs)


def test_a_tangent_of_another_shape_or_dtype_is_refused() -> None:
    args, _, (dx, dshift, dscale) = given("adaln_modulate", torch.float32)
    run = torch.ops.imm.adaln_modulate_jvp
    with pytest.raises(ValueError, match=r"dshift: expected \[\d+, \d+\] of torch.float32 on cpu as shift is, got \[1, \d+\]"):
        run(*args, dx, dshift[:1], dscale)
    with pytest.raises(ValueError, match=r"dx: expected .* of torch.float32 .*, got .* of torch.float64"):
        run(*args, dx.double(), dshift, dscale)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_fused_linear_has_its_tangent(mode: str, gelu: bool) -> None:
    """By torch.func.jvp, vmap of it, dual numbers and make_fx; without gradients GELU would be in the matmul's epilogue."""
    layer, x, v = nn.Linear(8, 16), torch.randn(4, 8), torch.randn(4, 8)
    plain = lambda x: nn.functional.gelu(layer(x), approximate="tanh") if gelu else layer(x)
    expected = torch.func.jvp(plain, (x,), (v,))
    run = lambda x: linear(layer, x, gelu=gelu)
    both = lambda x, v: torch.func.jvp(run, (x,), (v,))
    with MODES[mode]():
        several = torch.vmap(both, in_dims=(None, 0))(x, torch.stack([v, 2 * v]))[1]
        with forward_ad.dual_level():
            dual = tuple(forward_ad.unpack_dual(run(forward_ad.make_dual(x, v))))
        for found in (both(x, v), dual, make_fx(both)(x, v)(x, v)):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
    torch.testing.assert_close(several, torch.stack([expected[1], 2 * expected[1]]))
    assert float(expected[1].detach().norm()) > 0


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
def test_a_fused_dit_has_the_tangent_and_gradients_of_its_plain_form(mode: str, size_t: None) -> None:
    """As a MeanFlow step takes them: du/dt, and the parameters' gradients through u."""
    network = spread(DiT("T", patch=4, channels=1, resolution=8, num_classes=3).eval())
    x, v, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([300.0, 700.0]).double()
    call = lambda x, t, s: network(x, t, s, torch.tensor([0, 3]))
    found = {}
    for network.fused, network.checkpointing in ((False, False), (True, True)):
        with MODES[mode]():
            u, dudt = torch.func.jvp(call, (x, t, t / 2), (v, torch.ones_like(t), torch.zeros_like(t)))
        loss = (u - (v - 0.5 * dudt.detach())).square().mean()
        parameters = [p for p in network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters) if u.requires_grad else ()
        found[network.fused] = u.detach(), dudt.detach(), *gradients
    assert float(found[True][1].norm()) > 0
    assert (len(found[True]) > 2) == (mode == "with gradients")
    for a, b in zip(found[True], found[False], strict=True):
        assert distance(a, b) < 1e-5


def test_a_tangent_in_bfloat16_is_no_worse_than_through_torchs_own_operations(size_t: None) -> None:
    network = spread(DiT("T", patch=4, channels=1, resolution=8, num_classes=3).eval())
    x, v, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([300.0, 700.0]).double()
    dudt = {}
    for dtype, fused in ((torch.float64, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        made = copy.deepcopy(network).to(dtype)
        made.fused = fused
        call = lambda x, t, made=made: made(x, t, t / 2, torch.tensor([0, 3]))
        dudt[dtype, fused] = torch.func.jvp(call, (x.to(dtype), t), (v.to(dtype), torch.ones_like(t)))[1].detach()
    plain, fused = (distance(dudt[torch.bfloat16, form], dudt[torch.float64, False]) for form in (False, True))
    assert fused < 1.5 * plain < 0.1


def test_a_tangent_is_traced_by_make_fx(size_t: None) -> None:
    network = spread(DiT("T", patch=4, channels=1, resolution=8, num_classes=3).eval())
    x, v, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([300.0, 700.0]).double()
    call = lambda x, t, s: network(x, t, s, torch.tensor([0, 3]))
    step = lambda x, t, s, v, dt, ds: torch.func.jvp(call, (x, t, s), (v, dt, ds))
    inputs = x, t, t / 2, v, torch.ones_like(t), torch.zeros_like(t)
    with torch.no_grad():
        traced = make_fx(step)(*inputs)
        for a, b in zip(traced(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert "timestep_attention_jvp" in traced.code


def test_an_op_within_torch_func_grad_says_what_it_cannot() -> None:
    args, places, _ = given("adaln_modulate", torch.float32)
    run = as_function("adaln_modulate", args, places)
    with pytest.raises(RuntimeError, match=r"imm::adaln_modulate: expected a gradient by torch\.autograd, got torch\.func"):
        torch.func.grad(lambda x: run(x, *args[1:3]).sum())(args[0])
