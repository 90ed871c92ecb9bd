"""The binary layout of a harvest log, format version 1; docs/internals/harvest.md shows it.

A file of a header, an index and a ring, little-endian. Offsets count all bytes ever allocated in
the ring, so they only grow; a record at `offset` lies at `offset % ring`, contiguously. Three
things change while it is written:

- FLOOR: bytes below this offset are overwritten, or about to be. Raised before any byte is.
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
"""Offsets of these 8-byte words in the header, each in a cache line of its own."""

HEAD = struct.Struct("<QIIqq16s12xI")
"""Head of a record: sequence number, T, flags, start, version, request, checksum. Tokens [T] int32,
features [T, F] and the sequence number follow, the last at the record's last 8 bytes."""
ALIGN = 64
LARGEST = 4
"""A record takes at most this part of the ring, so that readers have time to copy it."""

_FENCE = threading.Lock()


def fence() -> None:
    """Order the stores and loads before it before those after it, on machines that reorder them.

    A release followed by an acquire does that; Python has no memory barrier of its own.
    """
    with _FENCE:
        pass
    with _FENCE:
        pass


@dataclass(frozen=True)
class Geometry:
    """The dimensions of a log."""

    feature_size: int
    """Values per token (F)."""
    feature_type: FeatureType
    ring: int
    """Bytes of the ring, a multiple of ALIGN."""
    slots: int
    """Entries of the index."""

    @classmethod
    def fit(cls, size: int, feature_size: int, feature_type: FeatureType) -> Self:
        """Return the largest that fits a file of `size` bytes. Raises ValueError if none does."""
        slots = max(1, size // cls(feature_size, feature_type, 0, 0).record_size(1))
        ring = (size - cls(feature_size, feature_type, 0, slots).ring_start) // ALIGN * ALIGN
        fitted = cls(feature_size, feature_type, ring, slots)
        if fitted.record_size(1) > fitted.largest:
            raise ValueError("too small")
        return fitted

    @property
    def ring_start(self) -> int:
        """Return the offset of the ring in the file."""
        return HEADER_SIZE + _up(8 * self.slots, ALIGN)

    @property
    def file_size(self) -> int:
        """Return the bytes of the file."""
        return self.ring_start + self.ring

    @property
    def largest(self) -> int:
        """Return the bytes of the largest record that is accepted."""
        return self.ring // LARGEST

    @property
    def numpy_type(self) -> type[np.float16] | type[np.uint16]:
        """Return numpy's type of the features; bfloat16 is represented by its bits."""
        return np.float16 if self.feature_type == "float16" else np.uint16

    def record_size(self, tokens: int) -> int:
        """Return the bytes that a record of `tokens` tokens takes in the ring."""
        return _up(HEAD.size + tokens * (4 + 2 * self.feature_size) + 8, ALIGN)

    @property
    def most_tokens(self) -> int:
        """Return the tokens of the largest record that is accepted, at least 1."""
        spare = self.largest // ALIGN * ALIGN - HEAD.size - 8
        return max(1, spare // (4 + 2 * self.feature_size))

    def pack(self, pid: int) -> bytes:
        """Return the fixed part of the header."""
        kind = FEATURE_TYPES.index(self.feature_type)
        return _HEADER.pack(MAGIC, FORMAT, kind, self.feature_size, pid, self.ring, self.slots)

    @classmethod
    def unpack(cls, header: bytes, file_size: int) -> Self:
        """Parse what `pack` returns. Raises ValueError with what is wrong with the file."""
        if len(header) < HEADER_SIZE or not header.startswith(MAGIC):
            raise ValueError("is not a harvest log, or not ready yet")
        _, version, kind, feature_size, _, ring, slots = _HEADER.unpack_from(header)
        if version != FORMAT:
            raise ValueError(f"is a harvest log of format {version}, and this reads {FORMAT}")
        if kind >= len(FEATURE_TYPES) or ring % ALIGN or not ring or not slots:
            raise ValueError("is a damaged harvest log")
        geometry = cls(feature_size, FEATURE_TYPES[kind], ring, slots)
        if geometry.file_size > file_size:
            raise ValueError("is a truncated harvest log")
        return geometry


def pack_head(record: Record, seq: int) -> bytes:
    """Return the head of `record`."""
    head = HEAD.pack(
        seq, len(record), record.flags, record.start, record.version, record.request, 0
    )
    return head[:-4] + _checksum(head, record.tokens.tobytes()).to_bytes(4, "little")


def unpack(geometry: Geometry, data: npt.NDArray[np.uint8], seq: int) -> Record | None:
    """Return record `seq`, as views of `data`, which it fills; None if it is damaged."""
    first, count, flags, start, version, request, checksum = HEAD.unpack_from(data.data)
    if len(data) != geometry.record_size(count):
        return None
    middle = HEAD.size + 4 * count
    end = middle + 2 * count * geometry.feature_size
    if not first == seq == int.from_bytes(data[-8:].data, "little"):
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
