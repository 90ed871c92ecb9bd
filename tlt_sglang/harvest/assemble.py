"""Joins records to spans: tokens that follow each other, with features of one target. Pure.

A span is of one request and one version of the target. A gap in the positions, another version, or
positions that come again (a request that was retracted and prefilled anew) begin another span.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tlt_sglang.harvest.record import END, PROMPT, Record

OVERHEAD = 1024
"""Bytes reckoned for a record besides its arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """L tokens at positions [start, end) of a request."""

    request: bytes
    start: int
    tokens: npt.NDArray[np.int32]  # [L]
    features: npt.NDArray[Any]  # [L, F]
    version: int
    prompt: int
    """How many of its first tokens are of the prompt."""
    ended: bool
    """Whether the request ended with it."""

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)


@dataclass(slots=True)
class _Growing:
    records: list[Record] = field(default_factory=list)
    prompt: int = 0
    size: int = 0

    def add(self, record: Record) -> None:
        if record.flags & PROMPT and (not self.records or self.records[-1].flags & PROMPT):
            self.prompt += len(record)
        self.records.append(record)
        self.size += _size(record)

    def goes_on_with(self, record: Record) -> bool:
        last = self.records[-1]
        return not len(record) or (last.end == record.start and last.version == record.version)

    def finish(self, ended: bool, end: int | None) -> Span:
        first = self.records[0]
        count = None if end is None else max(0, end - first.start)
        return Span(
            first.request,
            first.start,
            np.concatenate([record.tokens for record in self.records])[:count],
            np.concatenate([record.features for record in self.records])[:count],
            first.version,
            self.prompt,
            ended,
        )


class Assembler:
    """Of the records of one log, in their order.

    Holds at most `most_bytes` of records; beyond that the spans that have not grown for longest are
    finished early. Nothing is lost then: the request goes on in another span.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._growing: dict[bytes, _Growing] = {}  # the one that grew last is last
        self._size = 0

    def add(self, record: Record) -> list[Span]:
        """Take a record; the spans that are finished by it."""
        finished = []
        growing = self._growing.pop(record.request, None)
        if growing is not None and not growing.goes_on_with(record):
            finished.append(self._finish(growing, False))
            growing = None
        if len(record):
            growing = growing or _Growing()
            growing.add(record)
            self._size += _size(record)
        if growing is not None and record.flags & END:
            end = record.start if not len(record) and record.start else None
            finished.append(self._finish(growing, True, end))
        elif growing is not None:
            self._growing[record.request] = growing
        while self._size > self._most:
            finished.append(self._finish(self._growing.pop(next(iter(self._growing))), False))
        return finished

    def flush(self) -> list[Span]:
        """All that is unfinished."""
        finished = [self._finish(growing, False) for growing in self._growing.values()]
        self._growing.clear()
        return finished

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._size

    def _finish(self, growing: _Growing, ended: bool, end: int | None = None) -> Span:
        self._size -= growing.size
        return growing.finish(ended, end)


def _size(record: Record) -> int:
    return record.tokens.nbytes + record.features.nbytes + OVERHEAD
