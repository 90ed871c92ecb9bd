"""The first process of a tensor-parallel group: what it decides, all ranks do.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_first() -> bool:
    """Whether this process is it."""
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().tp_group.is_first_rank)


def exchange() -> Callable[[int], int] | None:
    """What takes this rank's number and gives back the first one's; None where there is one rank.

    Every rank has to call it as often as the others.
    """
    import torch
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return None

    def exchanged(own: int) -> int:
        told = torch.tensor([own])
        torch.distributed.broadcast(told, src=group.ranks[0], group=group.cpu_group)
        return int(told)

    return exchanged


def gathered(part: torch.Tensor) -> torch.Tensor | None:
    """On the first rank, the rows of all ranks' `part` [V / ranks, N] on CPU; None on the others.

    Every rank has to call it.
    """
    import torch
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return part
    own = part.contiguous().view(torch.uint8)  # gloo does not send every dtype
    rows = [torch.empty_like(own) for _ in group.ranks] if is_first() else None
    torch.distributed.gather(own, rows, dst=group.ranks[0], group=group.cpu_group)
    return None if rows is None else torch.cat(rows).view(part.dtype)
