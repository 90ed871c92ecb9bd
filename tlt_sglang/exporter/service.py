"""The exporter: serves the harvest logs of this machine's engines to readers on other machines.

It keeps nothing but a reader of each log for each peer: a request says which records the peer has,
so an exporter that is started again goes on where the last one stopped. Answers are bounded, and
one that a peer does not take is dropped.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zmq

from tlt_sglang.coordinator import endpoints
from tlt_sglang.errors import ConfigError, EnvironmentProblem
from tlt_sglang.exporter import messages
from tlt_sglang.exporter.messages import Batch, Export, Request
from tlt_sglang.harvest import announce
from tlt_sglang.harvest.layout import Geometry
from tlt_sglang.harvest.reader import Reader

BATCH_BYTES = 8 << 20
"""Bytes of records from which on an answer takes no further one."""
LOOK_SECONDS = 1.0
"""Time between two looks at the announcements."""
IDLE_SECONDS = 60.0
"""Time without a request after which a peer's reader is closed."""
WAITING_ANSWERS = 2
"""Answers that may wait for one peer; more are dropped, and the peer asks again."""
MAX_WAIT_MS = 250
"""The longest wait for a request, and so the delay with which `run` ends."""


@dataclass
class _Open:
    reader: Reader
    used: float


class Exporter:
    """An exporter, whose socket is bound at construction.

    Raises ConfigError for an address or a key that cannot be used, EnvironmentProblem for a store.
    """

    def __init__(self, store: Path, address: str, key: Path | None = None) -> None:
        self.store, self.address = store, ""
        self.dropped = 0
        """The number of malformed requests."""
        self._open: dict[tuple[bytes, str], _Open] = {}
        self._logs: dict[str, Geometry] = {}
        self._elsewhere: set[Path] = set()
        """Announcements of engines whose logs are not on this machine."""
        self._looked = float("-inf")
        self._file: Path | None = None
        check_address(address)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, messages.MAX_REQUEST_BYTES),
            (zmq.SNDHWM, WAITING_ANSWERS),
            (zmq.SNDBUF, messages.SOCKET_BYTES),
            (zmq.ROUTER_HANDOVER, 1),
        ):
            self._socket.set(option, value)
        try:
            endpoints.secure(self._socket, key, server=True)
            with endpoints.exclusive(address):
                self._socket.bind(address)
            self.address = self._socket.get_string(zmq.LAST_ENDPOINT)
            self._look()
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"The exporter cannot listen at {address} ({error.strerror}); choose another."
            ) from error
        except (ConfigError, EnvironmentProblem):
            self.close()
            raise

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, then close."""
        try:
            while not stop.is_set():
                if self._socket.poll(MAX_WAIT_MS):
                    self._answer(*self._socket.recv_multipart())
                if time.monotonic() - self._looked >= LOOK_SECONDS:
                    self._look()
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket and all logs, and remove the file in the store."""
        for one in self._open.values():
            one.reader.close()
        self._open.clear()
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        if not self._socket.closed:
            if self.address:
                endpoints.remove_socket(self.address)
            self._socket.close()
        self._context.term()

    def _look(self) -> None:
        """Find the logs of this machine, say what is served, and close what nobody reads."""
        self._looked = now = time.monotonic()
        messages.export_files(self.store)  # removes those of exporters that were killed here
        logs = {}
        for path, engine in announce.read_files(self.store, self._elsewhere).items():
            if not Path(engine.harvest).exists():
                self._elsewhere.add(path)  # on another machine, or gone: not to be read again
                continue
            with contextlib.suppress(EnvironmentProblem):  # just gone, or not ready yet
                reader = Reader.open(Path(engine.harvest))
                logs[engine.harvest] = reader.geometry
                reader.close()
        if logs != self._logs or self._file is None:
            self._file = Export(self.address, logs).write(self.store)
            self._logs = logs
        for key, one in list(self._open.items()):
            if now - one.used > IDLE_SECONDS:
                self._open.pop(key).reader.close()

    def _answer(self, peer: bytes, *parts: bytes) -> None:
        request = messages.decode(parts[0], Request) if len(parts) == 1 else None
        if request is None or request.after < 0:
            self.dropped += 1
            return
        batch, frames = self._batch(peer, request)
        # A ROUTER drops messages for peers that have left or do not read.
        with contextlib.suppress(zmq.Again):
            reply = [zmq.Frame(part) for part in (peer, messages.encode(batch), *frames)]
            self._socket.send_multipart(reply, zmq.NOBLOCK, copy=False)

    def _batch(self, peer: bytes, request: Request) -> tuple[Batch, list[memoryview]]:
        """Return the records that follow those which the peer has, as frames."""
        log, after = request.log, request.after
        one = self._reader(peer, request)
        if one is None:
            return Batch(log, after, after, 0, 0, True), []
        frames = in_frames(one.reader.read_bytes(BATCH_BYTES))
        batch = Batch(
            log, after, one.reader.last, one.reader.overwritten, one.reader.torn, one.reader.ended
        )
        one.reader.overwritten = one.reader.torn = 0
        return batch, frames

    def _reader(self, peer: bytes, request: Request) -> _Open | None:
        """Return the peer's reader at the right place; None for a log that is not there."""
        one = self._open.get((peer, request.log))
        if one is None or one.reader.last != request.after:
            if one is not None:
                self._open.pop((peer, request.log)).reader.close()
            # A peer may read what an engine has announced, and nothing else.
            if request.log not in self._logs:
                return None
            try:
                reader = Reader.open(Path(request.log), request.after)
            except EnvironmentProblem:
                return None
            one = self._open[peer, request.log] = _Open(reader, 0.0)
        one.used = time.monotonic()
        return one


def in_frames(records: Sequence[npt.NDArray[np.uint8]]) -> list[memoryview]:
    """Return the bytes of the records, the small ones that follow each other as one."""
    frames: list[memoryview] = []
    for small, group in itertools.groupby(records, lambda record: len(record) < messages.LARGE):
        following = list(group)
        frames += [one.data for one in ([np.concatenate(following)] if small else following)]
    return frames


def check_address(address: str) -> None:
    """Raise ConfigError for an address that others cannot reach, or that is open to everybody."""
    endpoints.check_endpoint(address)
    host = address.removeprefix("tcp://").rpartition(":")[0]
    if address.startswith("tcp://") and host in ("*", "0.0.0.0", "[::]", ""):
        raise ConfigError(
            f"The exporter's address {address} names no machine; write the one that trainers "
            "reach, such as tcp://10.0.0.5:7400."
        )
