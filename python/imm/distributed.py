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
        """A barrier, of the CPU."""
        self.largest(0)

    def total(self, number: int) -> int:
        """The sum of the processes' numbers. Collective."""
        return int(self.sums(torch.tensor(number)))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. Collective."""
        found = torch.tensor(number)
        if self.world > 1:
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes. Collective."""
        return self.largest(int(flag)) > 0

    def alike(self, text: str) -> bool:
        """Whether all processes have this text. Collective."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return self.largest(number) == -self.largest(-number)

    def in_first(self, act: Callable[[], _T], refusal: str) -> _T | None:
        """What ``act`` returns in the first process, None in the others. Collective.

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
        """Elementwise sums of the processes' tensors of one shape, on the CPU. Collective."""
        if self.world > 1:
            numbers = numbers.clone()
            distributed.all_reduce(numbers)
        return numbers

    def share(self, count: int) -> slice:
        """This process's part of ``count`` things, which ``world`` divides."""
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def take_first(self, tensors: Iterable[Tensor]) -> None:
        """Give each process's tensors the values of rank 0's. Collective."""
        for tensor in tensors:
            dense = tensor.detach().contiguous()
            distributed.broadcast(dense, 0)
            tensor.detach().copy_(dense)


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (its environment variables say so), over gloo for the CPU's tensors and NCCL for
    those of GPUs. Without torchrun: this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
    yield Processes(distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    # Not after an error: NCCL would wait for the others, which wait for this one; its end is what ends them.
    distributed.destroy_process_group()
