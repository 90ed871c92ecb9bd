"""The first rank of a tensor-parallel group, whose decisions all ranks follow.

Runs in the scheduler process. It holds no state: the groups are SGLang's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def is_first() -> bool:
    """Return whether this process is the first rank."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().tp_group.is_first_rank)


def _ranks() -> Any:
    """Return SGLang's group of tensor-parallel ranks; None for a single rank."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    return None if group.world_size == 1 else group


def exchange() -> Callable[[int], int] | None:
    """Return a function from this rank's number to the first rank's; None for a single rank.

    Every rank has to call that function as often as the others.
    """
    import torch

    group = _ranks()
    if group is None:
        return None

    def broadcast(own: int) -> int:
        number = torch.tensor([own])
        torch.distributed.broadcast(number, src=group.ranks[0], group=group.cpu_group)
        return int(number)

    return broadcast


def agreement() -> Callable[[int], bool] | None:
    """Return a function that says whether all ranks pass the same number; None for a single rank.

    Every rank has to call that function as often as the others.
    """
    import torch

    group = _ranks()
    if group is None:
        return None

    def agree(own: int) -> bool:
        least = torch.tensor([own, -own])
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
        return least.tolist() == [own, -own]

    return agree


def gather(part: torch.Tensor) -> torch.Tensor | None:
    """Return on the first rank the rows of all ranks' `part` [V / ranks, N] on CPU; None elsewhere.

    Every rank has to call it.
    """
    import torch

    group = _ranks()
    if group is None:
        return part
    own = part.contiguous().view(torch.uint8)  # gloo does not send every dtype
    rows = [torch.empty_like(own) for _ in group.ranks] if is_first() else None
    torch.distributed.gather(own, rows, dst=group.ranks[0], group=group.cpu_group)
    return None if rows is None else torch.cat(rows).view(part.dtype)
