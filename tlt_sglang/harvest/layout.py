"""The binary layout of a harvest log, format version 1; docs/internals/harvest.md shows it.

A file of a header, an index and a ring, little-endian. Offsets count bytes ever given out in the
ring, so they only grow; a record at `offset` lies at `offset % ring`, in one piece. Three things
change while it is written:

- FLOOR: what lies below this offset is overwritten, or is about to be. Raised before any byte is.
- index[sequence % slots]: the offset of a record. Sequence numbers count from 1.
- NEWEST: the sequence number of the last whole record. Raised after all of it is written.

So a record that a reader found through NEWEST and copied is intact if FLOOR has not passed it by
then. A record also bears its sequence number at both ends, and a checksum of its head and tokens;
features are not summed, which would cost the engine more than writing them.
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from tlt_sglang.harvest.record import Record

MAGIC = b"tltharv\0"
FORMAT = 1

FeatureType = Literal["float16", "bfloat16"]
FEATURE_TYPES: tuple[FeatureType, ...] = get_args(FeatureType)

HEADER_SIZE = 4096
_HEADER = struct.Struct("<8sIIIIQQ")
FLOOR, NEWEST = 8, 16
"""Places of these 8-byte words in the header, each in a cache line of its own."""

HEAD = struct.Struct("<QIIqq16s12xI")
"""Of a record: sequence, T, flags, start, version, request, checksum. Tokens [T] int32, features
[T, F] and the sequence number follow, the last at the record's last 8 bytes."""
ALIGN = 64
LARGEST = 4
"""A record is at most one in so many parts of the ring, so that readers have time for it."""

_FENCE = threading.Lock()


def fence() -> None:
    """Keeps stores and loads before it before those after it, on machines that reorder them.

    A release followed by an acquire does; Python has no barrier of its own.
    """
    with _FENCE:
        pass
    with _FENCE:
        pass


@dataclass(frozen=True)
class Geometry:
    """What is where in a log."""

    feature_size: int
    """Numbers a token (F)."""
    feature_type: FeatureType
    ring: int
    """Bytes of it, a multiple of ALIGN."""
    slots: int
    """Of the index."""

    @classmethod
    def fit(cls, size: int, feature_size: int, feature_type: FeatureType) -> Self:
        """The largest that a file of `size` bytes holds; raises ValueError if that is no ring."""
        slots = max(1, size // cls(feature_size, feature_type, 0, 0).record_size(1))
        ring = (size - cls(feature_size, feature_type, 0, slots).ring_start) // ALIGN * ALIGN
        fitted = cls(feature_size, feature_type, ring, slots)
        if fitted.record_size(1) > fitted.largest:
            raise ValueError("too small")
        return fitted

    @property
    def ring_start(self) -> int:
        """Where the ring begins in the file."""
        return HEADER_SIZE + _up(8 * self.slots, ALIGN)

    @property
    def file_size(self) -> int:
        """Bytes of all of it."""
        return self.ring_start + self.ring

    @property
    def largest(self) -> int:
        """Bytes of the largest record that is taken."""
        return self.ring // LARGEST

    @property
    def numpy_type(self) -> type[np.float16] | type[np.uint16]:
        """Of the features; numpy knows bfloat16 as its bits only."""
        return np.float16 if self.feature_type == "float16" else np.uint16

    def record_size(self, tokens: int) -> int:
        """Bytes in the ring of a record of so many tokens."""
        return _up(HEAD.size + tokens * (4 + 2 * self.feature_size) + 8, ALIGN)

    def pack(self, pid: int) -> bytes:
        """The fixed part of the header."""
        kind = FEATURE_TYPES.index(self.feature_type)
        return _HEADER.pack(MAGIC, FORMAT, kind, self.feature_size, pid, self.ring, self.slots)

    @classmethod
    def unpack(cls, header: bytes, file_size: int) -> Self:
        """The inverse of `pack`. Raises ValueError saying what the file is instead."""
        if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
            raise ValueError("is no harvest log, or not ready yet")
        _, version, kind, feature_size, _, ring, slots = _HEADER.unpack_from(header)
        if version != FORMAT:
            raise ValueError(f"is a harvest log of format {version}, and this reads {FORMAT}")
        if kind >= len(FEATURE_TYPES) or ring % ALIGN or not ring or not slots:
            raise ValueError("is a damaged harvest log")
        found = cls(feature_size, FEATURE_TYPES[kind], ring, slots)
        if found.file_size > file_size:
            raise ValueError("is a truncated harvest log")
        return found


def pack_head(record: Record, sequence: int) -> bytes:
    """The head of `record`."""
    head = HEAD.pack(
        sequence, len(record), record.flags, record.start, record.version, record.request, 0
    )
    return head[:-4] + _checksum(head, record.tokens.tobytes()).to_bytes(4, "little")


def unpack(geometry: Geometry, data: npt.NDArray[np.uint8], sequence: int) -> Record | None:
    """The record `sequence`, which is all of `data` and keeps it; None if it is damaged."""
    first, count, flags, start, version, request, checksum = HEAD.unpack_from(data.data)
    if len(data) != geometry.record_size(count):
        return None
    middle = HEAD.size + 4 * count
    end = middle + 2 * count * geometry.feature_size
    if not first == sequence == int.from_bytes(data[-8:].data, "little"):
        return None
    if checksum != _checksum(data[: HEAD.size].tobytes(), data[HEAD.size : middle].tobytes()):
        return None
    tokens = data[HEAD.size : middle].view(np.int32)
    features = data[middle:end].view(geometry.numpy_type)
    features = features.reshape(count, geometry.feature_size)
    return Record(request, start, tokens, features, version, flags)


def _checksum(head: bytes, tokens: bytes) -> int:
    return zlib.crc32(tokens, zlib.crc32(head[:-4]))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
