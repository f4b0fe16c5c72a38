"""The processes of one run: those that torchrun started, or one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


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
        count = torch.tensor(number)
        if self.world > 1:
            distributed.all_reduce(count)
        return int(count)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes, when every process is here."""
        return self.total(int(flag)) > 0

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

    def parallel(self, module: nn.Module, **options: Any) -> DistributedDataParallel:
        """``module`` with gradients that are the mean of the processes'; weights become those of process 0. Collective."""
        device = next(module.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL puts what is its own
        group = distributed.new_group(backend="nccl" if device.type == "cuda" else "gloo")
        return DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True, **options)


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (its environment variables say so), over gloo: they wait for each other and
    exchange small sums; gradients have a group of their own. Without torchrun: this process alone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes()
        return
    # A process may wait for the others as long as these have images to make.
    distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield Processes(distributed.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        distributed.destroy_process_group()


def device_of(local_rank: int) -> torch.device:
    """A device for a process of a machine: CUDA devices in turn where there are any."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device("cpu")
