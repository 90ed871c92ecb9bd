"""One entry of the harvest log: consecutive tokens of a request with the target's features.

`features[i]` is what the target computed at position `start + i`, where `tokens[i]` was its input;
the token after it is what those features predict. A position that was not computed, as its keys
and values came from the radix cache, is in no record: the next record starts behind the gap.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

KEY_SIZE = 16
"""Bytes of a request's key."""

PROMPT = 1
"""Flag: the tokens belong to the prompt."""
END = 2
"""Flag: no record of this request follows."""


def request_key(request: str) -> bytes:
    """Return the key of a request id in the log: a hash, evenly distributed and of fixed size."""
    return hashlib.blake2b(request.encode(), digest_size=KEY_SIZE).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """An entry of the binary log: T tokens at positions [start, end) of a request.

    Not a `TokenSequence`, which `assemble` joins from records: it has flags, and its arrays are
    laid out as in the file. With T = 0 it only marks the end of the request, and `start` is the
    position after the last valid token: a verify step may have gone on past the end of the text.

    Raises ValueError where the parts are inconsistent.
    """

    request: bytes
    """Its `request_key`."""
    start: int
    """Absolute position of the first token."""
    tokens: npt.NDArray[np.int32]
    """[T]"""
    features: npt.NDArray[Any]
    """[T, F] float16, or uint16 that holds the bits of bfloat16."""
    version: int
    """Version of the target's weights that computed the features."""
    flags: int = 0

    def __post_init__(self) -> None:
        if len(self.request) != KEY_SIZE:
            raise ValueError(f"a request key has {KEY_SIZE} bytes, not {len(self.request)}")
        if self.start < 0 or self.version < 0 or not 0 <= self.flags <= PROMPT | END:
            raise ValueError(
                f"start {self.start}, version {self.version} or flags {self.flags} is out of range"
            )
        if self.tokens.dtype != np.int32 or self.tokens.ndim != 1:
            raise ValueError(f"tokens are [T] int32, not {self.tokens.shape} {self.tokens.dtype}")
        if self.features.ndim != 2 or len(self.features) != len(self.tokens):
            raise ValueError(
                f"features {self.features.shape} do not match {len(self.tokens)} tokens"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Return the position after the last token."""
        return self.start + len(self.tokens)
