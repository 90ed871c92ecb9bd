"""Copies of device tensors to the host through a few pinned buffers, which are made once.

Runs in the scheduler process, on the thread that reads the copies: it waits for them, and the main
thread does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

BUFFER_BYTES = 16 * 2**20
"""Size of each of the two pinned buffers."""


class Event(Protocol):
    """A CUDA event."""

    def synchronize(self) -> None: ...


class Copies(Protocol):
    """Brings tensors to the host; every call but `ready` may wait."""

    def ready(self) -> Event | None:
        """Return the event after which what the calling thread has launched so far is computed."""

    def wait(self, ready: Event | None) -> None:
        """Let later copies begin after an event."""

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return an int64 tensor on the host, which the next call may overwrite."""

    def pieces(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the index of the first row and the rows of each piece of `rows` [n, F]; a piece may
        be overwritten once the next one is asked for."""


class Present:
    """Tensors that are on the host already."""

    def ready(self) -> None:
        """Return None: everything has been computed."""

    def wait(self, ready: Event | None) -> None:
        """Return at once."""

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor`."""
        return tensor

    def pieces(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield all rows at once."""
        yield 0, rows


class _Piece(NamedTuple):
    first: int
    rows: torch.Tensor
    done: Event


class PinnedCopies:
    """Copies from a CUDA device, on a stream of their own: one piece is read while the next is on
    its way. One thread reads; the caller keeps a tensor until it has read all of it."""

    def __init__(self, device: torch.device, row_bytes: int) -> None:
        """`row_bytes`: bytes of a row of the widest tensor."""
        self._cuda: Any = torch.cuda
        self._stream = self._cuda.Stream(device)
        size = max(BUFFER_BYTES, row_bytes)
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._integers = torch.empty(1024, dtype=torch.int64, pin_memory=True)

    def ready(self) -> Event:
        """Return the event after which what the calling thread has launched so far is computed."""
        # Whoever waits for it sleeps.
        event = self._cuda.Event(blocking=True)
        event.record()
        done: Event = event
        return done

    def wait(self, ready: Event | None) -> None:
        """Let later copies begin after an event, in the calling thread."""
        # A thread begins on the first device, where leaving a stream would make a context.
        self._cuda.set_device(self._stream.device)
        self._stream.wait_event(ready)

    def integers(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of an int64 tensor, until the next call."""
        if not tensor.is_cuda:
            return tensor
        if tensor.numel() > len(self._integers):
            size = 1 << tensor.numel().bit_length()
            self._integers = torch.empty(size, dtype=torch.int64, pin_memory=True)
        target = self._integers[: tensor.numel()].view(tensor.shape)
        self._launch(target, tensor).synchronize()
        return target

    def pieces(self, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield copies of `rows` [n, F], as many at once as a buffer holds."""
        row_bytes = rows.shape[1] * rows.element_size()
        most, launched = len(self._buffers[0]) // row_bytes, deque[_Piece]()
        for number, first in enumerate(range(0, len(rows), most)):
            part = rows[first : first + most]
            buffer = self._buffers[number % 2][: len(part) * row_bytes]
            target = buffer.view(rows.dtype).view(part.shape)
            launched.append(_Piece(first, target, self._launch(target, part)))
            if len(launched) == 2:
                yield _read(launched.popleft())
        while launched:
            yield _read(launched.popleft())

    def _launch(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        with self._cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self.ready()


def _read(piece: _Piece) -> tuple[int, torch.Tensor]:
    piece.done.synchronize()
    return piece.first, piece.rows
