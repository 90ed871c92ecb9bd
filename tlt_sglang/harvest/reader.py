"""The reading end of a harvest log. Runs in other processes than the engine, any number of them.

It maps the file for reading only and creates nothing, so it may die at any time. Records are copied
and verified after the copy; records that were overwritten before they were read are counted.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.harvest import layout, segments
from tlt_sglang.harvest.layout import FLOOR, HEAD, HEADER_SIZE, NEWEST, Geometry, fence
from tlt_sglang.harvest.record import Record

SKIP = 4
"""A reader that was overtaken skips this part of the ring, so as not to be overtaken again."""


class Reader:
    """The reader of one log; `open` makes it."""

    def __init__(self, file: int, geometry: Geometry, after: int) -> None:
        self.geometry = geometry
        self.overwritten = 0
        """Records that were overwritten before they were read."""
        self.torn = 0
        """Records that were overwritten while they were copied, or are damaged."""
        self._file = file
        self._map = mmap.mmap(file, geometry.file_size, access=mmap.ACCESS_READ)
        with memoryview(self._map) as view:
            self._words = view[:HEADER_SIZE].cast("Q")
            self._index = view[HEADER_SIZE : HEADER_SIZE + 8 * geometry.slots].cast("Q")
        self._ring = np.frombuffer(self._map, np.uint8, offset=geometry.ring_start)
        self._next = max(after + 1, self._first(1, self._words[NEWEST], margin=0))

    @staticmethod
    def open(path: Path, after: int = 0) -> Reader:
        """Open a log at its oldest record, or at the one after sequence number `after`.

        Raises EnvironmentProblem if the file is not a readable log.
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
                f"{path} {error}; give the harvest log of a running engine of this version of TLT."
            ) from error

    @property
    def last(self) -> int:
        """Return the last sequence number that was read or skipped; for `after` of `open`."""
        return self._next - 1

    @property
    def ended(self) -> bool:
        """Return whether everything is read and the writer has closed the log, or is dead."""
        return segments.is_orphan(self._file) and self._next > self._words[NEWEST]

    def read(self, most: int = 256) -> list[Record]:
        """Return up to `most` new records. Never waits."""
        return [record for _, record in islice(self._new(), most)]

    def read_bytes(self, most: int) -> list[npt.NDArray[np.uint8]]:
        """Return new records as they lie in the log, up to the one with which they are `most`
        bytes. Never waits."""
        records: list[npt.NDArray[np.uint8]] = []
        size = 0
        for data, _ in self._new():
            records.append(data)
            size += len(data)
            if size >= most:
                break
        return records

    def _new(self) -> Iterator[tuple[npt.NDArray[np.uint8], Record]]:
        """Yield the bytes of each new record, and the record, whose arrays are views of them."""
        while self._next <= (newest := self._words[NEWEST]):
            fence()
            offset = self._index[self._next % self.geometry.slots]
            lapped = newest - self._next >= self.geometry.slots - 1
            if lapped or offset < self._words[FLOOR]:
                first = self._first(self._next + 1, newest, self.geometry.ring // SKIP)
                self.overwritten += first - self._next
                self._next = first
                continue
            data = self._copy(offset % self.geometry.ring)
            fence()
            record = None
            if data is not None and offset >= self._words[FLOOR]:
                record = layout.unpack(self.geometry, data, self._next)
            self._next += 1
            if data is None or record is None:
                self.torn += 1
            else:
                yield data, record

    def close(self) -> None:
        """Close the log; records that were read stay valid."""
        if self._map.closed:
            return
        self._words.release()
        self._index.release()
        self._ring = np.empty(0, np.uint8)
        self._map.close()
        os.close(self._file)

    def _first(self, least: int, newest: int, margin: int) -> int:
        """Return the first sequence number from `least` on, `margin` bytes above the floor."""
        slots = self.geometry.slots
        numbers = range(max(least, newest - slots + 2), newest + 1)
        floor = self._words[FLOOR] + margin
        return numbers.start + bisect_left(numbers, floor, key=lambda s: self._index[s % slots])

    def _copy(self, offset: int) -> npt.NDArray[np.uint8] | None:
        """Return a copy of the record at `offset` of the ring, with the length in its head."""
        if offset + HEAD.size > self.geometry.ring:
            return None
        count = HEAD.unpack_from(self._ring.data, offset)[1]
        end = offset + self.geometry.record_size(count)
        return self._ring[offset:end].copy() if end <= self.geometry.ring else None
