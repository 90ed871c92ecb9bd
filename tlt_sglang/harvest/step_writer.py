"""Writes the steps that a tap has taken as records of the harvest log.

`StepWriter` writes them where it is called: on CPU, where they are present. On CUDA a
`StepThread` calls it, which waits for the copies, so that the main thread only launches work.

Runs in the scheduler process of tensor-parallel rank 0.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch

from tlt_sglang.harvest.host_copies import Copies, Event
from tlt_sglang.harvest.log_size import PENDING_BYTES
from tlt_sglang.harvest.logged import Logged
from tlt_sglang.harvest.record import END, Record
from tlt_sglang.harvest.rows import Span, in_line
from tlt_sglang.harvest.writer import Writer

MOST_PENDING = 64
"""Most steps that a thread has not written; further ones are dropped and counted."""
CLOSE_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """The committed tokens of R requests in one step, request after request."""

    requests: list[Logged]
    spans: list[Span] | torch.Tensor
    """The tokens of each; or [2, R] int64, positions of their first tokens and numbers of tokens,
    where those are known on the device only and the tokens follow one another."""
    tokens: torch.Tensor  # [n] int64, up to the end of the last span
    features: torch.Tensor  # [n, F] bfloat16
    flags: int
    version: int
    ready: Event | None


class StepWriter:
    """Writes steps at once; whatever goes wrong is raised."""

    needs_counts = True
    """True if the number of committed tokens has to be known when a step is taken."""
    error: str | None = None
    """Why nothing is written any more; None while steps are."""
    has_room = True

    def __init__(self, writer: Writer, copies: Copies) -> None:
        self.copies = copies
        self._writer = writer

    def put(self, step: Step) -> None:
        """Write a step: records of at most `most_tokens` tokens."""
        self.copies.wait(step.ready)
        spans, total, most = step.spans, len(step.tokens), self._writer.most_tokens
        if isinstance(spans, torch.Tensor):
            spans = list(in_line(*self.copies.integers(spans).tolist()))
            total = spans[-1].row + spans[-1].size
        tokens = self.copies.integers(step.tokens[:total]).to(torch.int32).numpy()
        for first, rows in self.copies.pieces(step.features[:total]):
            bits = rows.view(torch.uint16).numpy()
            for logged, span in zip(step.requests, spans, strict=True):
                count = logged.committed(span.start, span.size)
                begin, end = max(span.row, first), min(span.row + count, first + len(bits))
                for row in range(begin, end, most):
                    stop = min(end, row + most)
                    self._writer.write(
                        Record(
                            logged.key,
                            span.start + row - span.row,
                            tokens[row:stop],
                            bits[row - first : stop - first],
                            step.version,
                            step.flags,
                        )
                    )

    def put_end(self, logged: Logged, version: int) -> None:
        """Write that no record of a request follows."""
        assert logged.end is not None
        nothing = np.empty((0, self._writer.feature_size), np.uint16)
        empty = np.empty(0, np.int32)
        self._writer.write(Record(logged.key, logged.end, empty, nothing, version, END))

    def close(self) -> None:
        """Do nothing: all steps are written."""


class StepThread:
    """Writes steps on a thread, in their order. An error ends the log, and not the engine."""

    needs_counts = False

    def __init__(self, steps: StepWriter) -> None:
        self.copies = steps.copies
        self.error: str | None = None
        self._steps = steps
        self._queue: queue.SimpleQueue[Step | tuple[Logged, int] | None] = queue.SimpleQueue()
        # Each counter has one thread that changes it.
        self._put = self._written = 0
        self._put_bytes = self._written_bytes = 0
        self._thread = threading.Thread(target=self._run, name="tlt-harvest", daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Return whether a further step is taken."""
        pending_bytes = self._put_bytes - self._written_bytes
        return self._put - self._written < MOST_PENDING and pending_bytes <= PENDING_BYTES

    def put(self, step: Step) -> None:
        """Leave a step to the thread; it is written some steps later."""
        self._put += 1
        self._put_bytes += step.features.nbytes
        self._queue.put(step)

    def put_end(self, logged: Logged, version: int) -> None:
        """Leave the end of a request to the thread, behind its last step."""
        if self.error is None:
            self._queue.put((logged, version))

    def close(self) -> None:
        """Write what is left, and end the thread; give up after CLOSE_SECONDS."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            unwritten = self._put - self._written
            logger.warning("The harvest log is closed with %d steps unwritten", unwritten)

    def _run(self) -> None:
        try:
            while (entry := self._queue.get()) is not None:
                self._write(entry)
                del entry  # which holds memory of the device
        except Exception as error:  # training goes without these hidden states, serving goes on
            self.error = f"{type(error).__name__}: {error}"
            logger.exception(
                "The harvest log ends here: hidden states of this engine are logged again after a "
                "restart"
            )
            while not self._queue.empty():
                self._queue.get()

    def _write(self, entry: Step | tuple[Logged, int]) -> None:
        if isinstance(entry, tuple):
            self._steps.put_end(*entry)
            return
        self._steps.put(entry)
        self._written += 1
        self._written_bytes += entry.features.nbytes
