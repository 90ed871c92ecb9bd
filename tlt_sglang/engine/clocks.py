"""Clocks that time decode steps: by the wall, or by events on a CUDA stream.

A clock marks moments, and returns the seconds between two of them, or None while that is unknown.
On a GPU the host runs ahead of the device, so that its own clock would measure the launching of
kernels. An event is recorded where the step begins, and read once the device has passed it.

Runs in the scheduler process. No clock ever waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

Moment = Any
"""The return value of a clock's `mark`, opaque to everyone but that clock."""


class Clock(Protocol):
    """Marks moments and measures the time between them."""

    def mark(self) -> Moment:
        """Return the present moment."""

    def seconds(self, start: Moment, end: Moment) -> float | None:
        """Return the time from one moment to a later one; None while it is unknown."""


class Wall:
    """The host's clock."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def mark(self) -> float:
        """Return the present time in seconds."""
        return self._now()

    def seconds(self, start: float, end: float) -> float | None:
        """Return the difference of two times."""
        return end - start


class CudaEvents:
    """The current stream's clock; `make` returns an event with timing enabled."""

    def __init__(self, make: Callable[[], Moment] | None = None) -> None:
        self._make = make or _event

    def mark(self) -> Moment:
        """Record an event on the current stream and return it."""
        event = self._make()
        event.record()
        return event

    def seconds(self, start: Moment, end: Moment) -> float | None:
        """Return the device's time between two events; None until it has passed both."""
        if not end.query():
            return None
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000


def _event() -> Moment:
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
