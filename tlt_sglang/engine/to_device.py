"""Tensors between the host and the engine's device, by way of pinned memory.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def to_device(values: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `values` as a tensor on `device`; integers become int64.

    On CUDA they go through pinned memory, so that the copy takes its turn on the current stream.
    """
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class LateCounts:
    """Integers [B] on their way to the host, which waits for them only when they are read."""

    def __init__(self, counts: torch.Tensor) -> None:
        """Launch the copy of `counts` [B]."""
        self._host = counts.to("cpu", non_blocking=True)
        cuda: Any = torch.cuda
        self._copied = cuda.Event() if counts.device.type == "cuda" else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[int]:
        """Return the integers; wait for the device if it has not come to them."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        values: list[int] = self._host.tolist()
        return values


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` on the host, which waits for it.

    On CUDA it is pinned, which takes a small part of the time that pageable memory takes.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
