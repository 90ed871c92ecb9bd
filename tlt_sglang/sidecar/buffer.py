"""The online buffer: what the sidecar trains on while the engine runs. Pure, but for what it holds.

It holds documents of the current RL step, and the long ones of the step before: early in a step
only short responses are over, and a drafter that trains on those alone forgets the long tail for
which it is there (TLT, arXiv 2511.16665: one-step offset). All are of one version of the target;
a new version empties the buffer, so that nothing trains on features of mixed versions.

It is bounded in bytes. Documents are weighted by the length of their response, both when they are
drawn and when one has to go: each gets the priority u^(1/length) with u uniform, and the lowest
goes first (Efraimidis & Spirakis 2006), so long ones tend to stay, and short ones are not wiped
out. Equal calls with an equal seed have equal results.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HELD_OUT = 16
"""One request in so many is never trained on, but gates what is published."""
LONG_SHARE = 0.25
"""Share of a step's documents, those with the longest responses, that the next step keeps."""

REASONS = (
    "seen",
    "replaced",
    "evicted",
    "outdated",
    "late",
    "empty",
    "short",
    "repeated",
    "too_large",
)
"""Counters of `status`: documents that came, and those that went or did not stay."""

Array = Any
"""A numpy array or a tensor: whatever has `len` and `nbytes`."""


@dataclass(frozen=True)
class Recorded:
    """A request as an engine has recorded it; T tokens."""

    key: str
    """Of the request; the same when more of it is recorded later."""
    target_version: int
    step: int
    """Of RL; counts up."""
    ids: Array
    """[T]."""
    features: Array
    """[T, A * N]."""
    prompt_length: int
    """Index of the first token of the response."""
    last: Array | None = None
    """[T, N] what the target's head reads, where that is not `features`."""

    def __post_init__(self) -> None:
        rows = {
            len(self.ids),
            len(self.features),
            len(self.ids if self.last is None else self.last),
        }
        if len(rows) > 1:
            raise ValueError(f"request {self.key}: ids and features have {sorted(rows)} rows")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def response_length(self) -> int:
        """Tokens that can be trained on."""
        return len(self) - self.prompt_length

    @property
    def nbytes(self) -> int:
        """Memory of its arrays."""
        arrays = (self.ids, self.features, *(() if self.last is None else (self.last,)))
        return sum(int(array.nbytes) for array in arrays)


class Buffer:
    """At most `limit` bytes of documents."""

    def __init__(self, limit: int, seed: int = 0) -> None:
        self.limit, self.seed = limit, seed
        self.target_version = -1
        self.step = -1
        self._kept: dict[str, Recorded] = {}
        self._held_out: set[str] = set()
        self._bytes = 0
        self.tokens = 0
        """Of all documents."""
        self._long = 0  # response length from which documents of the step before are kept
        self._draws = 0
        self._counts: Counter[str] = Counter()

    def add(self, document: Recorded) -> bool:
        """Whether it is in the buffer now; `status` counts why one is not."""
        self._counts["seen"] += 1
        self.move_on(document.target_version, document.step)
        if reason := self._refusal(document):
            self._counts[reason] += 1
            return False
        if document.key in self._kept:
            self._drop("replaced", document.key)
        self._kept[document.key] = document
        if self._hash(f"held out {document.key}") % HELD_OUT == 0:
            self._held_out.add(document.key)
        self._bytes += document.nbytes
        self.tokens += len(document)
        while self._bytes > self.limit:
            self._drop("evicted", min(self._kept, key=self._priority))
        return document.key in self._kept

    def move_on(self, target_version: int, step: int) -> None:
        """The engine is at this version and step; what is too old for them goes."""
        if target_version > self.target_version:
            self.target_version, self.step, self._long = target_version, step, 0
            self._drop_where("outdated", lambda document: True)
        elif target_version == self.target_version and step > self.step:
            before = step - 1
            lengths = [d.response_length for d in self._kept.values() if d.step == before]
            lengths.sort(reverse=True)
            self._long = lengths[math.ceil(LONG_SHARE * len(lengths)) - 1] if lengths else 0
            self.step = step
            self._drop_where(
                "outdated", lambda d: d.step < before or d.response_length < self._long
            )

    def sample(self, token_budget: int) -> list[Recorded]:
        """Different documents to train on, of at most so many tokens together; another draw at
        each call. The first one may be longer than the budget, and is then alone."""
        chance = random.Random(f"{self.seed}/{self._draws}")
        self._draws += 1
        drawn = [
            (math.log(1.0 - chance.random()) / document.response_length, document)
            for document in self._kept.values()
            if document.key not in self._held_out
        ]
        drawn.sort(key=lambda pair: -pair[0])
        found: list[Recorded] = []
        left = token_budget
        for _, document in drawn:
            if len(document) <= left or not found:
                found.append(document)
                left -= len(document)
        return found

    def held_out(self) -> list[Recorded]:
        """Documents that `sample` never returns, in the order in which they came."""
        return [document for key, document in self._kept.items() if key in self._held_out]

    def __len__(self) -> int:
        return len(self._kept)

    def status(self) -> dict[str, int]:
        """What is there, and what became of all that was seen since the start."""
        return {
            "target_version": self.target_version,
            "step": self.step,
            "documents": len(self._kept),
            "held_out": len(self._held_out),
            "of_the_step_before": sum(d.step < self.step for d in self._kept.values()),
            "tokens": self.tokens,
            "bytes": self._bytes,
            "limit": self.limit,
        } | {reason: self._counts[reason] for reason in REASONS}

    def _refusal(self, document: Recorded) -> str:
        known = self._kept.get(document.key)
        if document.target_version < self.target_version or document.step < self.step - 1:
            return "late"
        if document.response_length < 1:
            return "empty"
        if document.step < self.step and document.response_length < self._long:
            return "short"
        if known is not None and len(known) >= len(document):
            return "repeated"
        if document.nbytes > self.limit:
            return "too_large"
        return ""

    def _priority(self, key: str) -> float:
        """Log of u^(1/length), with the key's own u."""
        u = (self._hash(key) + 1) / 2**64
        return math.log(u) / self._kept[key].response_length

    def _hash(self, text: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{text}".encode()).digest()[:8])

    def _drop(self, reason: str, key: str) -> None:
        document = self._kept.pop(key)
        self._held_out.discard(key)
        self._bytes -= document.nbytes
        self.tokens -= len(document)
        self._counts[reason] += 1

    def _drop_where(self, reason: str, old: Callable[[Recorded], bool]) -> None:
        for key in [key for key, document in self._kept.items() if old(document)]:
            self._drop(reason, key)
