"""The writing end of a harvest log. Runs in the scheduler process of tensor-parallel rank 0.

It never waits: it overwrites the oldest records whether they were read or not, and counts records
that it drops. One thread writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from tlt_sglang.errors import ConfigError
from tlt_sglang.harvest import layout, segments
from tlt_sglang.harvest.layout import FLOOR, HEAD, HEADER_SIZE, NEWEST, FeatureType, Geometry, fence
from tlt_sglang.harvest.record import Record

SMALL = 2**16
"""Bytes that mmap copies faster than numpy, which lets other threads run meanwhile."""


class Writer:
    """The writer of one log; `create` makes it."""

    def __init__(self, path: Path, file: int, geometry: Geometry) -> None:
        self.path = path
        self.sampling = 1.0
        """Fraction of requests that is logged; may be changed at any time."""
        self.written = self.too_large = self.sampled_out = 0
        """Numbers of records."""
        self._file, self._geometry = file, geometry
        # Populated: a page fault costs as much as the write, and there is one for every 4 kB.
        self._map = mmap.mmap(file, geometry.file_size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        with memoryview(self._map) as view:
            self._words = view[:HEADER_SIZE].cast("Q")
            self._index = view[HEADER_SIZE : HEADER_SIZE + 8 * geometry.slots].cast("Q")
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._end = 0
        self._closed = False
        header = geometry.pack(os.getpid())
        self._map[8 : len(header)] = header[8:]
        fence()
        self._map[:8] = header[:8]  # from here on readers accept the file

    @classmethod
    def create(
        cls,
        size: int,
        feature_size: int,
        feature_type: FeatureType,
        folder: Path = segments.FOLDER,
    ) -> Writer:
        """Create a log of at most `size` bytes, all of them allocated now.

        Raises ConfigError if that is too small, EnvironmentProblem if there is no room.
        """
        try:
            geometry = Geometry.fit(size, feature_size, feature_type)
        except ValueError as error:
            raise ConfigError(
                f"A harvest log of {size} bytes is too small for features of {feature_size} "
                "numbers a token; set a larger --tlt-harvest-gb."
            ) from error
        path, file = segments.create(folder, geometry.file_size)
        return cls(path, file, geometry)

    @property
    def feature_size(self) -> int:
        """Return the values per token."""
        return self._geometry.feature_size

    @property
    def most_tokens(self) -> int:
        """Return the tokens of the largest record."""
        return self._geometry.most_tokens

    def wants(self, request: bytes) -> bool:
        """Return whether a request is logged; depends only on its key and `sampling`."""
        return int.from_bytes(request[:4], "little") < self.sampling * 2**32

    @property
    def dropped(self) -> int:
        """Return the number of records that were dropped."""
        return self.too_large + self.sampled_out

    def write(self, record: Record) -> bool:
        """Append a record, overwriting the oldest ones; return False if it was dropped.

        Raises ValueError for features of another size or type than the log's.
        """
        geometry, features = self._geometry, record.features
        if features.shape[1] != geometry.feature_size or features.dtype != geometry.numpy_type:
            raise ValueError(
                f"features of {features.shape[1]} {features.dtype} a token in a log of "
                f"{geometry.feature_size} {geometry.feature_type}"
            )
        if not self.wants(record.request):
            self.sampled_out += 1
            return False
        size = geometry.record_size(len(record))
        if size > geometry.largest:
            self.too_large += 1
            return False
        self._append(record, size)
        return True

    def _append(self, record: Record, size: int) -> None:
        ring, seq = self._geometry.ring, self.written + 1
        offset, room = self._end, ring - self._end % ring
        if size > room:
            offset += room  # a record is contiguous

        # First invalidate what is about to be overwritten, for readers that copy it now.
        self._words[FLOOR] = max(0, offset + size - ring)
        fence()

        # Then write the record, and only then publish it.
        self._index[seq % self._geometry.slots] = offset
        place = self._geometry.ring_start + offset % ring
        tokens = place + HEAD.size
        features = tokens + record.tokens.nbytes
        end = place + size
        self._map[place:tokens] = layout.pack_head(record, seq)
        self._map[tokens:features] = record.tokens.tobytes()
        bits = np.ascontiguousarray(record.features)
        if bits.nbytes < SMALL:
            self._map[features : features + bits.nbytes] = bits.data
        else:
            self._bytes[features : features + bits.nbytes] = bits.reshape(-1).view(np.uint8)
        self._map[end - 8 : end] = seq.to_bytes(8, "little")
        fence()
        self._words[NEWEST] = seq
        self._end, self.written = offset + size, seq

    def close(self) -> None:
        """Remove the log; readers can still read the rest of it, then see that it has ended."""
        if self._closed:
            return
        self._closed = True
        self._words.release()
        self._index.release()
        self._bytes = self._bytes[:0].copy()
        with contextlib.suppress(BufferError):  # a thread that was given up writes just now
            self._map.close()
        self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked child may hold the file open
        os.close(self._file)
