"""Copies of a step's tensors to the host, for which neither the engine nor its device waits.

Runs in the scheduler process of tensor-parallel rank 0, on its main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A CUDA event."""

    def query(self) -> bool: ...


Copied = tuple[list[torch.Tensor], Event | None]
"""Tensors on the host, and the event after which they are complete; None if they are already."""

ToHost = Callable[[Sequence[torch.Tensor], Sequence[bool]], Copied]
"""Copies tensors to the host; the flags say which nobody else will write into."""


def to_host(device: torch.device) -> ToHost:
    """Return what copies tensors of `device` to the host: on CPU they are there."""
    return _CudaCopies(device) if device.type == "cuda" else _present


def _present(tensors: Sequence[torch.Tensor], owned: Sequence[bool]) -> Copied:
    return list(tensors), None


class _CudaCopies:
    """Copies to pinned memory, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device)

    def __call__(self, tensors: Sequence[torch.Tensor], owned: Sequence[bool]) -> Copied:
        # What a graph or the scheduler writes over in the next step is taken on its own stream.
        kept = [
            tensor if own or not tensor.is_cuda else tensor.clone()
            for tensor, own in zip(tensors, owned, strict=True)
        ]
        cuda: Any = torch.cuda
        self._stream.wait_stream(cuda.current_stream())
        copies = []
        with cuda.stream(self._stream):
            for tensor in kept:
                pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(pinned.copy_(tensor, non_blocking=True))
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)
            done = cuda.Event()
            done.record(self._stream)
        return copies, done
