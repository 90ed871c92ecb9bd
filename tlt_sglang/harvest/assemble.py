"""Join the records of a log into sequences. Pure.

A sequence holds consecutive tokens of one request under one version of the target. A gap in the
positions, another version, or a step back (the request was retracted and prefilled again) starts
another sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tlt_sglang.harvest.record import END, PROMPT, Record
from tlt_sglang.harvest.sequence import TokenSequence

OVERHEAD = 1024
"""Bytes counted for a record in addition to its arrays."""
GROWTH = 1.5
"""Length of a growing response, over that at which it was returned last, from which on it is
returned again; so what is copied of it in all is at most three times its length."""


LoggedSequence = TokenSequence[npt.NDArray[Any]]
"""A sequence as the log has it: int32 ids, and features [L, F] as float16 or bits of bfloat16."""


@dataclass(slots=True)
class _Growing:
    records: list[Record] = field(default_factory=list)
    prompt: int = 0
    size: int = 0
    tokens: int = 0
    returned: int = 0
    """Tokens of the response as it was returned last."""

    def add(self, record: Record) -> None:
        if record.flags & PROMPT and (not self.records or self.records[-1].flags & PROMPT):
            self.prompt += len(record)
        self.records.append(record)
        self.size += _size(record)
        self.tokens += len(record)

    def goes_on_with(self, record: Record) -> bool:
        last = self.records[-1]
        return not len(record) or (last.end == record.start and last.version == record.version)

    def finish(self, ended: bool, end: int | None) -> LoggedSequence:
        first = self.records[0]
        return self._join(None if end is None else max(0, end - first.start), ended)

    def so_far(self, least: int) -> LoggedSequence | None:
        """Return what is there without the newest record, which may be computed beyond the end;
        None if the response has not grown enough."""
        count = self.tokens - len(self.records[-1])
        response = count - self.prompt
        if response < max(self.returned + least, GROWTH * self.returned):
            return None
        self.returned = response
        return self._join(count, ended=False)

    def _join(self, count: int | None, ended: bool) -> LoggedSequence:
        first = self.records[0]
        return TokenSequence(
            np.concatenate([record.tokens for record in self.records])[:count],
            np.concatenate([record.features for record in self.records])[:count],
            self.prompt,
            request=first.request.hex(),
            start=first.start,
            target_version=first.version,
            ended=ended,
        )


class Assembler:
    """Joins the records of one log, added in their order.

    It holds at most `most_bytes` of records. Beyond that, the sequences that have not grown for the
    longest time are finished early; nothing is lost, as the request continues in another sequence.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._growing: dict[bytes, _Growing] = {}  # the one that grew last is last
        self._size = 0

    def add(self, record: Record) -> list[LoggedSequence]:
        """Add a record; return the sequences that it finishes."""
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
        while self._size > self.most_bytes:
            finished.append(self._finish(self._growing.pop(next(iter(self._growing))), False))
        return finished

    def grown(self, least: int) -> list[LoggedSequence]:
        """Return the sequences so far of requests whose response has grown by at least so many
        tokens since it was returned here; they go on growing."""
        sequences = (growing.so_far(least) for growing in self._growing.values())
        return [sequence for sequence in sequences if sequence is not None]

    def flush(self) -> list[LoggedSequence]:
        """Finish and return every sequence."""
        finished = [self._finish(growing, False) for growing in self._growing.values()]
        self._growing.clear()
        return finished

    @property
    def size(self) -> int:
        """Return the bytes held."""
        return self._size

    def _finish(self, growing: _Growing, ended: bool, end: int | None = None) -> LoggedSequence:
        self._size -= growing.size
        return growing.finish(ended, end)


def _size(record: Record) -> int:
    return record.tokens.nbytes + record.features.nbytes + OVERHEAD
