"""The processes of one run: those that torchrun started, or one."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

_T = TypeVar("_T")

#: A process may wait for the others as long as these have images to make.
_PATIENCE = datetime.timedelta(days=7)
_BUNDLE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Processes:
    """This process's ``rank`` of ``world``, and its number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes what there is one of."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process is here."""
        if self.world > 1:
            distributed.barrier()

    def total(self, number: int) -> int:
        """The sum of the processes' numbers, when every process is here."""
        return int(self.sums(torch.tensor(number)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, when every process is here."""
        found = torch.tensor(number)
        if self.world > 1:
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes, when every process is here."""
        return self.largest(int(flag)) > 0

    def alike(self, text: str) -> bool:
        """Whether all processes have this text, when every process is here."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return self.largest(number) == -self.largest(-number)

    def in_first(self, act: Callable[[], _T], refusal: str) -> _T | None:
        """What ``act`` returns in the first process, None in the others; when every process is here.

        Raises:
            ValueError: ``act`` raised one, in the first process; with ``refusal`` in the others.
        """
        found, errors = None, []
        if self.first:
            try:
                found = act()
            except ValueError as error:
                errors.append(error)
        if self.any(len(errors) > 0):
            raise errors.pop() if errors else ValueError(refusal)  # a name here would keep it in memory
        return found

    def sums(self, numbers: Tensor) -> Tensor:
        """Elementwise sums of the processes' tensors of one shape, on the CPU, when every process is here."""
        if self.world > 1:
            numbers = numbers.clone()
            distributed.all_reduce(numbers)
        return numbers

    def share(self, count: int) -> slice:
        """This process's part of ``count`` things, which ``world`` divides."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def exchange(self, device: torch.device) -> Exchange:
        """For tensors on a device, which is this process's own if it is a GPU; when every process is here."""
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL puts what is its own
            return Exchange(self, distributed.new_group(backend="nccl"))
        return Exchange(self, distributed.new_group(backend="gloo", timeout=_PATIENCE))


class Exchange:
    """Tensors that the processes of a run make alike, all in one order.

    Not torch's DistributedDataParallel, which bundles gradients anew after the first step of every start and then adds those of
    three processes or more in another order: a resumed run would not repeat an unbroken one. It hides the exchange behind the
    backward; here it comes after it.
    """

    def __init__(self, where: Processes, group: distributed.ProcessGroup) -> None:
        self._where, self._group = where, group

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Each process's tensors become those of the first. When every process is here."""
        for tensor in tensors:
            dense = tensor.contiguous()
            distributed.broadcast(dense, 0, group=self._group)
            tensor.copy_(dense)

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Each process's tensors become the means of all processes'. When every process is here."""
        for bundle in _bundles(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bundle])
            distributed.all_reduce(flat, group=self._group)
            flat /= self._where.world
            for tensor, mean in zip(bundle, flat.split([tensor.numel() for tensor in bundle]), strict=True):
                tensor.copy_(mean.view(tensor.shape))


def _bundles(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, some megabytes together, which cost one message."""
    bundle: list[Tensor] = []
    for tensor in tensors:
        if bundle and (tensor.dtype != bundle[0].dtype or sum(t.nbytes for t in bundle) + tensor.nbytes > _BUNDLE_BYTES):
            yield bundle
            bundle = []
        bundle.append(tensor)
    if bundle:
        yield bundle


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (its environment variables say so), over gloo: they wait for each other and
    exchange small sums; gradients have a group of their own. Without torchrun: this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    yield Processes(distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    # Not after an error: NCCL would wait for the others, which wait for this one; its end is what ends them.
    distributed.destroy_process_group()
