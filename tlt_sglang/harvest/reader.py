"""The reading end of a harvest log. Runs in other processes than the engine, any number of them.

It maps the file for reading only and creates nothing, so it may die at any time. Records are copied
out and verified after the copy; what was overwritten before it was read is counted.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.harvest import layout, segments
from tlt_sglang.harvest.layout import FLOOR, HEAD, HEADER_SIZE, NEWEST, Geometry, fence
from tlt_sglang.harvest.record import Record

AHEAD = 4
"""A reader that was overtaken goes on this part of the ring ahead of what is overwritten next."""


class Reader:
    """Of one log; made by `open`."""

    def __init__(self, file: int, geometry: Geometry, after: int) -> None:
        self.geometry = geometry
        self.missed = 0
        """Records that were overwritten before they were read, since it was opened."""
        self.torn = 0
        """Records that were overwritten while they were copied, or are damaged."""
        self._file = file
        self._map = mmap.mmap(file, geometry.file_size, access=mmap.ACCESS_READ)
        with memoryview(self._map) as view:
            self._words = view[:HEADER_SIZE].cast("Q")
            self._index = view[HEADER_SIZE : HEADER_SIZE + 8 * geometry.slots].cast("Q")
        self._ring = np.frombuffer(self._map, np.uint8, offset=geometry.ring_start)
        self._next = max(after + 1, self._first(1, self._words[NEWEST], ahead=0))

    @staticmethod
    def open(path: Path, after: int = 0) -> Reader:
        """Read a log from its oldest record on, or from the one after sequence number `after`.

        Raises EnvironmentProblem if it is none that can be read.
        """
        file = segments.open_to_read(path)
        try:
            geometry = Geometry.unpack(os.pread(file, HEADER_SIZE, 0), os.fstat(file).st_size)
            return Reader(file, geometry, after)
        except BaseException as error:
            os.close(file)
            if not isinstance(error, ValueError):
                raise
            raise EnvironmentProblem(
                f"{path} {error}; name the harvest log of a running engine of this version of TLT."
            ) from error

    @property
    def last(self) -> int:
        """The sequence number up to which it has read or given up; for `open`'s `after`."""
        return self._next - 1

    @property
    def ended(self) -> bool:
        """Whether all is read and no more will come: the writer has closed, or is dead."""
        return segments.is_orphan(self._file) and self._next > self._words[NEWEST]

    def read(self, most: int = 256) -> list[Record]:
        """Up to `most` records that are new; none where there are none. Never waits."""
        found: list[Record] = []
        while len(found) < most and self._next <= (newest := self._words[NEWEST]):
            fence()
            offset = self._index[self._next % self.geometry.slots]
            lapped = newest - self._next >= self.geometry.slots - 1
            if lapped or offset < self._words[FLOOR]:
                first = self._first(self._next + 1, newest, self.geometry.ring // AHEAD)
                self.missed += first - self._next
                self._next = first
                continue
            data = self._copy(offset % self.geometry.ring)
            fence()
            record = None
            if data is not None and offset >= self._words[FLOOR]:
                record = layout.unpack(self.geometry, data, self._next)
            if record is None:
                self.torn += 1
            else:
                found.append(record)
            self._next += 1
        return found

    def close(self) -> None:
        """Let go of the log; records that were read stay."""
        if self._map.closed:
            return
        self._words.release()
        self._index.release()
        self._ring = np.empty(0, np.uint8)
        self._map.close()
        os.close(self._file)

    def _first(self, least: int, newest: int, ahead: int) -> int:
        """The first sequence number, not below `least`, that is `ahead` bytes above the floor."""
        slots = self.geometry.slots
        numbers = range(max(least, newest - slots + 2), newest + 1)
        wanted = self._words[FLOOR] + ahead
        return numbers.start + bisect_left(numbers, wanted, key=lambda s: self._index[s % slots])

    def _copy(self, place: int) -> npt.NDArray[np.uint8] | None:
        """What lies at `place` of the ring, of the length that it says it has."""
        if place + HEAD.size > self.geometry.ring:
            return None
        count = HEAD.unpack_from(self._ring.data, place)[1]
        end = place + self.geometry.record_size(count)
        return self._ring[place:end].copy() if end <= self.geometry.ring else None
