"""Small tables from the host to the engine's device, for which neither waits.

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
