"""The processes of a run: who we are among them, and what they say to each other.

Parallelism is torch's own and is applied from outside the model. One process is the default and needs no process
group; under `torchrun` the group is joined from the environment.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from cairn.errors import CairnError, InputError


@dataclass(frozen=True)
class World:
    """This process among those of the run: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def share(self, count: int) -> tuple[int, int]:
        """Begin and end of this process's contiguous share of `count` items."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module whose forward and backward are shared with the other processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


@contextlib.contextmanager
def joined(processes: int) -> Iterator[World]:
    """The world of a run that asks for `processes`; the process group, where one is needed, lives as long as the context.

    Raises `InputError` when the number of processes that were started is another one.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != processes:
        raise InputError(
            f"The recipe asks for {processes} process(es) (parallel.data) and {started} were started; "
            f"start it with `torchrun --nproc-per-node {processes} -m cairn ...` or set parallel.data={started}."
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if started == 1:
        yield World(0, 1, device)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if ours:
            dist.destroy_process_group()


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run `cairn ARGUMENTS` in `processes` workers on this machine, as `torchrun` does, and wait for them."""
    from torch.distributed.run import parse_args, run

    settings = parse_args(["--standalone", "--nproc-per-node", str(processes), "-m", "cairn"])
    settings.training_script_args = list(arguments)  # given here, since torchrun would read some of them as its own options
    run(settings)


def launched_instead(processes: int) -> bool:
    """Where a recipe wants several processes and this one was not started by `torchrun`: let workers do this command line.

    Whether they did, in which case nothing is left to do here. Raises `CairnError` if a worker failed.
    """
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch(processes, sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise CairnError(f"Process {rank} of {processes} ended with status {failure.exitcode}; it says why above.") from None
    return True
