"""The processes of one run: those that torchrun started, or one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed


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


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (its environment variables say so), over gloo: they only wait for each other and
    exchange small sums. Without torchrun: this process alone."""
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
