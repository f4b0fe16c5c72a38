"""The weights of a network over the processes of a run: torch's FSDP2 on a mesh of replicas and shards."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from imm.distributed import Processes

#: Bytes of weights below which a network is gathered and its gradients exchanged at once: a unit costs a fraction of a
#: millisecond each time it is called.
SMALL = 16 * 2**20


class Shards:
    """This process's shards of a network's weights and gradients.

    Attributes:
        units: FSDP modules, each gathered and resharded as a whole; empty for a single process.
        parameters: the local shard of each parameter, in the network's order and the same memory; what the optimizer updates.
    """

    def __init__(self, network: nn.Module, units: Sequence[Any] = (), mesh: Any = None) -> None:
        self.units = list(units)
        self._group = None if mesh is None or mesh["shard"].size() == 1 else mesh["shard"].get_group()
        self._whole = self.parameters = list(network.parameters())
        if self.units:  # plain tensors: an optimizer of DTensors takes 50 us more for each
            self.parameters = [nn.Parameter(local(p.detach()), requires_grad=p.requires_grad) for p in self._whole]

    def exchanges(self, flag: bool) -> None:
        """Set whether the next backward reduces gradients over the processes, or only accumulates them locally."""
        for unit in self.units:
            unit.set_requires_gradient_sync(flag, recurse=False)

    def forget_gradients(self) -> None:
        """Free all gradients."""
        for parameter in (*self._whole, *self.parameters):
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The local shards of all gradients, which become those of :attr:`parameters`."""
        for unit in self.units:
            unit.reshard()  # one without a gradient, such as a frozen backbone, is still as its forward gathered it
        if self.units:
            for own, parameter in zip(self.parameters, self._whole, strict=True):
                own.grad = None if parameter.grad is None else local(parameter.grad)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of the whole gradient. Collective."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._group is None:
            return norm
        square = norm.square()
        distributed.all_reduce(square, group=self._group)
        return square.sqrt()

    def share_nonfinite(self, gradients: Sequence[Tensor]) -> None:
        """Make every process's gradient non-finite if one shard's is: the loss scale then skips the step in all. Collective."""
        if self._group is not None:
            zero = 0.0 * self.norm(gradients)  # NaN where the norm is not finite
            for gradient in gradients:
                if gradient.numel():  # a parameter of few rows leaves some processes none
                    gradient.add_(zero)
                    break

    def like(self, index: int, value: Tensor) -> Tensor:
        """A moment of the optimizer as a DTensor sharded like its parameter; a scalar as it is."""
        parameter: Any = self._whole[index]
        if not self.units or not value.dim():
            return value
        from torch.distributed.tensor import DTensor

        placed = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(value, parameter.device_mesh, parameter.placements, **placed)


def shard(
    network: nn.Module, device: torch.device, where: Processes, size: int, classes: Collection[type[nn.Module]] = ()
) -> Shards:
    """Shard a network in place over ``size`` processes a replica, with the weights of rank 0; the backward averages gradients
    over all processes. One process wraps nothing. Collective.

    Args:
        classes: modules of these are units, gathered one at a time, for a network that does not say what its units are.
    """
    if where.world == 1:
        return Shards(network)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL allocates
    where.take_first([*network.parameters(), *network.buffers()])
    mesh = init_device_mesh(device.type, (where.world // size, size), mesh_dim_names=("replicate", "shard"))
    if getattr(network, "channels_last", False):  # FSDP takes contiguous weights only; what lies between layers stays fast
        network.register_forward_pre_hook(_channels_last)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    units = units_of(network, classes)
    if sum(parameter.nbytes for parameter in network.parameters()) < SMALL:
        units = outermost(units)
    for unit in units:
        # With one process a replica nothing is gathered anew for the target branch and the backward.
        fully_shard(unit, mesh=mesh, reshard_after_forward=None if size > 1 else False)
    return Shards(network, units, mesh)


def units_of(network: nn.Module, classes: Collection[type[nn.Module]] = ()) -> list[nn.Module]:
    """The modules to shard, inner ones first, each called as a module in the network's forward.

    Args:
        network: with a method ``units``; else all its modules of these classes are units, and itself.

    Raises:
        ValueError: classes of which the network has no module.
    """
    own: Any = network
    if not classes and hasattr(network, "units"):
        return list(own.units())
    found = [module for module in network.modules() if isinstance(module, tuple(classes))]
    for one in classes:
        if not any(isinstance(module, one) for module in found):
            raise ValueError(f"units: expected classes of the network's modules, got {one.__name__}")
    return [*reversed([module for module in found if module is not network]), network]


def outermost(units: Sequence[nn.Module]) -> list[nn.Module]:
    """Those of the units that are in no other."""
    return [unit for unit in units if not any(unit in other.modules() for other in units if other is not unit)]


def _channels_last(network: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].contiguous(memory_format=torch.channels_last), *args[1:]


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor as it is."""
    return getattr(tensor, "to_local", lambda: tensor)()


def whole(tensor: Tensor) -> Tensor:
    """A DTensor, gathered; any other tensor as it is. Collective."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def whole_network(network: nn.Module) -> nn.Module:
    """A network, or an unsharded copy where its parameters are sharded. Collective."""
    if not any(hasattr(parameter, "full_tensor") for parameter in network.parameters()):
        return network
    memo: dict[int, Any] = {id(p): nn.Parameter(whole(p.detach()), requires_grad=False) for p in network.parameters()}
    copied = copy.deepcopy(network, memo)
    if getattr(copied, "channels_last", False):
        copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return copied


def shard_alike(network: nn.Module, sharded: nn.Module, shards: Shards) -> None:
    """Replace the parameters of a network by copies of another's shards."""
    if not shards.units:
        return
    made: dict[int, nn.Parameter] = {}
    for name, parameter in list(sharded.named_parameters(remove_duplicate=False)):
        if id(parameter) not in made:
            made[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        module, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(module), leaf, made[id(parameter)])


def takes_tangents() -> bool:
    """Whether FSDP's hooks have forward-mode tangents: those of torch 2.13 have, those of 2.11 do not."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    return "jvp" in vars(_fsdp_param_group.RegisterPostBackwardFunction)
