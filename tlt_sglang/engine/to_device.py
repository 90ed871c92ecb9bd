"""Tensors between the host and the engine's device, by way of pinned memory.

Runs in the scheduler process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(values: Sequence[int] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `values` as a tensor on `device`; integers become int64.

    On CUDA they go through pinned memory, so that the copy takes its turn on the current stream.
    """
    host = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=torch.int64)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` on the host, which waits for it.

    On CUDA it is pinned, which takes a small part of the time that pageable memory takes.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
