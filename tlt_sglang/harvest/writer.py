"""The writing end of a harvest log. Runs in the scheduler process of tensor-parallel rank 0.

It never waits: it writes over the oldest records whether they were read or not, and what it does
not take it counts. One thread writes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import numpy as np

from tlt_sglang.errors import ConfigError
from tlt_sglang.harvest import layout, segments
from tlt_sglang.harvest.layout import FLOOR, HEAD, HEADER_SIZE, NEWEST, FeatureType, Geometry, fence
from tlt_sglang.harvest.record import Record


class Writer:
    """Of one log; made by `create`."""

    def __init__(self, path: Path, file: int, geometry: Geometry) -> None:
        self.path = path
        self.sampling = 1.0
        """The fraction of requests that is taken; may be changed at any time."""
        self.written = self.too_large = self.sampled_out = 0
        """Records."""
        self._file, self._geometry = file, geometry
        # Populated: a page fault costs as much as the write, and there is one for every 4 kB.
        self._map = mmap.mmap(file, geometry.file_size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        with memoryview(self._map) as view:
            self._words = view[:HEADER_SIZE].cast("Q")
            self._index = view[HEADER_SIZE : HEADER_SIZE + 8 * geometry.slots].cast("Q")
        self._end = 0
        header = geometry.pack(os.getpid())
        self._map[8 : len(header)] = header[8:]
        fence()
        self._map[:8] = header[:8]  # readers may come

    @classmethod
    def create(
        cls,
        size: int,
        feature_size: int,
        feature_type: FeatureType,
        folder: Path = segments.FOLDER,
    ) -> Writer:
        """A new log of at most `size` bytes, all of them allocated now.

        Raises ConfigError if that is too little, EnvironmentProblem if there is no room.
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
        """Numbers a token."""
        return self._geometry.feature_size

    def wants(self, request: bytes) -> bool:
        """Whether a request is among the sampled ones: depends on its key and `sampling` only."""
        return int.from_bytes(request[:4], "little") < self.sampling * 2**32

    @property
    def dropped(self) -> int:
        """Records that were not written."""
        return self.too_large + self.sampled_out

    def write(self, record: Record) -> bool:
        """Append a record, over the oldest ones; False if it was dropped.

        Raises ValueError for features that are not of this log's size and type.
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
        ring, sequence = self._geometry.ring, self.written + 1
        offset, left = self._end, ring - self._end % ring
        if size > left:
            offset += left  # a record lies in one piece
        self._words[FLOOR] = max(0, offset + size - ring)
        fence()
        self._index[sequence % self._geometry.slots] = offset
        place = self._geometry.ring_start + offset % ring
        tokens = place + HEAD.size
        features = tokens + record.tokens.nbytes
        end = place + size
        self._map[place:tokens] = layout.pack_head(record, sequence)
        self._map[tokens:features] = record.tokens.tobytes()
        self._map[features : features + record.features.nbytes] = np.ascontiguousarray(
            record.features
        ).data
        self._map[end - 8 : end] = sequence.to_bytes(8, "little")
        fence()
        self._words[NEWEST] = sequence
        self._end, self.written = offset + size, sequence

    def close(self) -> None:
        """Remove the log; readers still get what is in it, then find that it has ended."""
        if self._map.closed:
            return
        self._words.release()
        self._index.release()
        self._map.close()
        self.path.unlink(missing_ok=True)
        fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked child may hold the file open
        os.close(self._file)
