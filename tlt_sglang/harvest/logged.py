"""The requests that a harvest log has begun, and when each of them ends.

With overlap scheduling the engine launches a step before it knows how the step before has ended, so
a request may be computed once more after its last token. It ends in the log when it is finished:
after the steps that were launched before that, and what they have computed beyond its end is cut.

Runs in the scheduler process of tensor-parallel rank 0, on its main thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tlt_sglang.harvest.record import request_key

STALE_STEPS = 2048
"""Steps without a request after which it is taken for ended: it was aborted while it waited."""


class LoggedRequest(Protocol):
    """SGLang's request, as far as the log needs it."""

    @property
    def rid(self) -> str: ...

    @property
    def origin_input_ids(self) -> Sequence[int]: ...

    @property
    def output_ids(self) -> Sequence[int]: ...

    @property
    def finished_len(self) -> int | None:
        """Output tokens up to the end of the text, where a stop has cut them."""

    def finished(self) -> bool: ...


@dataclass(slots=True)
class Logged:
    """A request that may get further records."""

    request: LoggedRequest
    key: bytes
    step: int
    """Number of the last step that computed it."""
    end: int | None = None
    """The position after the last token that the target has read, once the request has ended."""

    def committed(self, start: int, count: int) -> int:
        """Return how many of `count` tokens from position `start` on are part of the text, as far
        as that is known. Any thread may ask."""
        end = self.end
        return count if end is None else max(0, min(count, end - start))


class LoggedRequests:
    """The requests of one log that have not ended."""

    def __init__(self) -> None:
        self._logged: dict[str, Logged] = {}
        self._steps = 0

    def __len__(self) -> int:
        return len(self._logged)

    def begin_step(self, requests: Sequence[LoggedRequest]) -> list[Logged | None]:
        """Return the entries of the requests that a step computes; None for those that have ended:
        they are computed once more, and nothing of it is text."""
        self._steps += 1
        return [None if request.finished() else self._entry(request) for request in requests]

    def _entry(self, request: LoggedRequest) -> Logged:
        logged = self._logged.get(request.rid)
        if logged is None:
            logged = Logged(request, request_key(request.rid), self._steps)
            self._logged[request.rid] = logged
        logged.step = self._steps
        return logged

    def take_ended(self) -> Iterator[Logged]:
        """Remove and yield the requests that get no further record."""
        ended = [
            name
            for name, one in self._logged.items()
            if one.request.finished() or self._steps - one.step > STALE_STEPS
        ]
        for name in ended:
            logged = self._logged.pop(name)
            logged.end = _end(logged.request)
            yield logged


def _end(request: LoggedRequest) -> int:
    """Return the position after the last token that the target has read: the last was sampled."""
    length = request.finished_len
    if length is None:
        length = len(request.output_ids)
    return max(0, len(request.origin_input_ids) + length - 1)
