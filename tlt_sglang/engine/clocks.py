"""How long a step takes: by the wall, or by events on a CUDA stream, read when they are due.

A clock marks moments and tells the seconds between two of them, or None as long as that is not
known. On a GPU the host runs ahead of the device, so its own clock would measure the launching of
kernels; an event is recorded where the step begins, and nobody waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol


class Clock(Protocol):
    """Moments are opaque."""

    def mark(self) -> Any:
        """Now."""

    def seconds(self, start: Any, end: Any) -> float | None:
        """From one moment to a later one; None: not known yet."""


class Wall:
    """Of the host."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> float:
        return self._now()

    def seconds(self, start: float, end: float) -> float | None:
        return end - start


class CudaEvents:
    """Of the current stream. `make` makes an event that can be timed."""

    def __init__(self, make: Callable[[], Any] | None = None) -> None:
        self._make = make or _event

    def mark(self) -> Any:
        event = self._make()
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float | None:
        if not end.query():
            return None
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000


def _event() -> Any:
    import torch

    cuda: Any = torch.cuda
    return cuda.Event(enable_timing=True)
