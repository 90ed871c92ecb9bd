"""The reading end of a harvest log that is on another machine, with the interface of `Reader`.

It never waits: one request is always on its way while the records of the answer before are read, so
it holds at most two answers. An exporter that is silent is asked again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zmq

from tlt_sglang.coordinator import endpoints
from tlt_sglang.exporter import messages
from tlt_sglang.exporter.messages import Batch, Request
from tlt_sglang.harvest import layout
from tlt_sglang.harvest.layout import HEAD, Geometry
from tlt_sglang.harvest.record import Record

AGAIN_SECONDS = 2.0
"""Time without an answer after which a request is repeated."""
QUIET_SECONDS = 0.02
"""Time between two requests while there is nothing new."""


class RemoteReader:
    """The reader of one log of an exporter at `address`.

    Raises ConfigError for a key that cannot be used.
    """

    def __init__(
        self,
        address: str,
        log: str,
        geometry: Geometry,
        key: Path | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.geometry = geometry
        self.overwritten = 0
        """Records that were overwritten before they were read."""
        self.torn = 0
        """Records that were damaged, also on the way."""
        self.last = 0
        """The last sequence number that was received or skipped."""
        self._log, self._clock = log, clock
        self._asked, self._waiting = float("-inf"), False
        self._complete = False
        self._news = True
        """False after an answer that brought nothing."""
        self._frames: deque[npt.NDArray[np.uint8]] = deque()
        self._next: deque[npt.NDArray[np.uint8]] = deque()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.SNDHWM, 2),
            (zmq.RCVHWM, 2),
            (zmq.RCVBUF, messages.SOCKET_BYTES),
            # Nothing is queued for an exporter that is not up.
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, 50),
            (zmq.RECONNECT_IVL_MAX, 500),
        ):
            self._socket.set(option, value)
        self.address = address
        try:
            endpoints.secure(self._socket, key, server=False)
            self._socket.connect(address)
        except BaseException:
            self.close()
            raise

    def move(self, address: str) -> None:
        """Go on at another address, where the exporter has been started again."""
        self._socket.disconnect(self.address)
        self._socket.connect(address)
        self.address, self._waiting = address, False

    @property
    def ended(self) -> bool:
        """Return whether everything is read and no record follows."""
        return self._complete and not self._frames and not self._next

    def read(self, most: int = 256) -> list[Record]:
        """Return up to `most` new records. Never waits."""
        records: list[Record] = []
        while len(records) < most:
            if not self._frames:
                self._fetch()
                self._frames, self._next = self._next, self._frames
                if not self._frames:
                    break
            record = self._take()
            if record is None:
                self.torn += 1
            else:
                records.append(record)
        self._fetch()
        return records

    def close(self) -> None:
        """Close the connection; records that were read stay valid."""
        if not self._socket.closed:
            self._socket.close()
            self._context.term()

    def _take(self) -> Record | None:
        """Remove the first record that waits; its whole frame where its length makes no sense."""
        frame = self._frames.popleft()
        size = len(frame)
        if size < HEAD.size:
            return None
        number, count, *_ = HEAD.unpack_from(frame.data)
        size = min(size, self.geometry.record_size(count))
        if size < len(frame):
            self._frames.appendleft(frame[size:])
        # Small ones share a frame: each is copied, so that one that is kept does not keep them all.
        data = frame[:size].copy() if size < messages.LARGE else frame[:size]
        return layout.unpack(self.geometry, data, number)

    def _fetch(self) -> None:
        """Receive an answer and ask for the next one, if there is room for it."""
        if self._waiting and not self._next:
            self._receive()
        now = self._clock()
        if self._waiting and now - self._asked > AGAIN_SECONDS:
            self._waiting = False
        nothing_new = not self._news and now - self._asked < QUIET_SECONDS
        if self._waiting or self._complete or self._next or nothing_new:
            return
        try:
            self._socket.send(messages.encode(Request(self._log, self.last)), zmq.NOBLOCK)
        except zmq.Again:
            return
        self._asked, self._waiting = now, True

    def _receive(self) -> None:
        try:
            head, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        batch = messages.decode(head.bytes, Batch)
        if batch is None or (batch.log, batch.after) != (self._log, self.last):
            return  # malformed, or the second answer to a request that was repeated
        self._waiting = False
        self._next = deque(np.frombuffer(frame.buffer, np.uint8) for frame in frames)
        self.last, self._complete, self._news = batch.last, batch.ended, batch.last > batch.after
        self.overwritten += batch.overwritten
        self.torn += batch.torn
