"""The processes that write or read one checkpoint together, as far as the checkpoint room needs to know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from cairn.errors import CairnError, WorkerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Peers:
    """One process on its own; `Group` are several."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, item: T) -> list[T]:
        """Everyone's item, in the order of ranks, for everyone."""
        return [item]

    def together(self, action: Callable[[], T]) -> list[T]:
        """Do something everywhere and have everyone's result; an error that one process meets, whatever it is, is raised in all of them."""
        mine: Any = None
        met: Exception | None = None
        try:
            mine = action()
        except Exception as error:
            met = error
        told = self.gather(_sentence(met, self.rank))
        if met is not None:
            raise met
        for other in told:
            if other is not None:
                raise other
        return self.gather(mine)


def _sentence(error: Exception | None, rank: int) -> CairnError | None:
    """An error as the other processes are told of it."""
    if error is None or isinstance(error, CairnError):
        return error
    return WorkerError(f"Process {rank} has failed: {type(error).__name__}: {' '.join(str(error).split())}")


class Group(Peers):
    """The processes of a torch process group. Its backend must carry host tensors (gloo)."""

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        self._group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, item: T) -> list[T]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item, group=self._group)
        return found
