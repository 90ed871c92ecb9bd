"""The target's embedding and head after an update, copied and published off the main thread.

The sidecar trains against them. On CUDA they are copied through pinned buffers, on a stream of its
own, while the engine serves. They are read from the live weights: before these change again, or
their memory is released, the main thread waits for the copy (`wait`), and at no other time.

Runs in the scheduler process of tensor-parallel rank 0.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from tlt_sglang.harvest.host_copies import Copies, Event, PinnedCopies, Present

Publish = Callable[[int, list[torch.Tensor]], None]
"""Publishes embedding and head [V, N] of a version of the target; one tensor if they are tied."""

logger = logging.getLogger(__name__)


class EmbedAndHead:
    """Copies embedding and head of the newest version of the target, and publishes them."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        self._copies: Copies | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._publishing = threading.Lock()
        self._newest = 0

    def begin(self, version: int, parts: Sequence[torch.Tensor], live: bool) -> None:
        """Publish `parts` [V, N] as those of `version`; `live` ones are weights of the target,
        which are copied first. Called when the update has been launched."""
        self.wait()
        self._newest = version
        if not live:
            self._start(version, parts, None)
            return
        if self._copies is None:
            self._copies = _copies(parts[0])
        self._copied.clear()
        self._start(version, parts, self._copies)

    def wait(self) -> None:
        """Wait until the live weights have been copied; they may change or go then."""
        self._copied.wait()

    def _start(self, version: int, parts: Sequence[torch.Tensor], copies: Copies | None) -> None:
        ready = None if copies is None else copies.ready()
        threading.Thread(
            target=self._run,
            args=(version, parts, copies, ready),
            name="tlt-embed-and-head",
            daemon=True,
        ).start()

    def _run(
        self,
        version: int,
        parts: Sequence[torch.Tensor],
        copies: Copies | None,
        ready: Event | None,
    ) -> None:
        try:
            try:
                if copies is not None:
                    copies.wait(ready)
                    parts = [_copy(part, copies) for part in parts]
            finally:
                self._copied.set()
            with self._publishing:
                if version == self._newest:  # else the next one is about to be published
                    self._publish(version, list(parts))
        except Exception:  # training waits for the next version; serving goes on
            logger.exception(
                "Embedding and head of version %d of the target cannot be published; training "
                "resumes when the target is updated again",
                version,
            )


def _copies(part: torch.Tensor) -> Copies:
    if part.device.type != "cuda":
        return Present()
    return PinnedCopies(part.device, part.shape[1] * part.element_size())


def _copy(part: torch.Tensor, copies: Copies) -> torch.Tensor:
    """Return a copy of `part` [V, N] on the host, as bfloat16."""
    whole = torch.empty(part.shape, dtype=torch.bfloat16)
    for first, rows in copies.pieces(part):
        whole[first : first + len(rows)] = rows
    return whole
