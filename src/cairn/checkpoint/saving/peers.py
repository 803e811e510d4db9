"""The processes that write or read one checkpoint together, as far as the checkpoint room needs to know them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from cairn.errors import CairnError

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
        """Do something everywhere and have everyone's result; an error that one process meets is raised in all of them."""
        mine: Any = None
        error: CairnError | None = None
        try:
            mine = action()
        except CairnError as met:
            error = met
        for other in self.gather(error):
            if other is not None:
                raise other
        return self.gather(mine)


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
