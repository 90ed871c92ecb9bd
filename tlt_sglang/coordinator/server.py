"""The coordinator's process: a ZMQ ROUTER around the pure decisions. Theirs is the only clock.

Runs in `tlt coordinator`, or on a thread of the launcher.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from pathlib import Path

import zmq

from tlt_sglang.coordinator import endpoints
from tlt_sglang.coordinator.messages import MOST_BYTES, Ask, Told, encode, said
from tlt_sglang.coordinator.states import Event, due, step
from tlt_sglang.coordinator.world import Rules, World
from tlt_sglang.errors import ConfigError

AT_ONCE = 256
"""Messages that are heard before time is looked at."""
LONGEST = 0.25
"""Seconds of a wait, after which a wish to stop is seen."""


class Server:
    """Bound when it is made. Raises ConfigError for an address or a key that cannot be used."""

    def __init__(self, endpoint: str, rules: Rules, key: Path | None = None) -> None:
        self.rules, self.world = rules, World(uuid.uuid4().hex)
        self.endpoint = ""
        """As bound: with the port, where the caller left it open."""
        self.dropped = 0
        """Malformed messages."""
        endpoints.checked(endpoint)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, MOST_BYTES)
        # A member that connects again before its old connection is found dead keeps its address.
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        try:
            endpoints.secure(self._socket, key, server=True)
            with endpoints.vacant(endpoint):
                self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"The coordinator cannot listen at {endpoint} ({error.strerror}); name another."
            ) from error
        except ConfigError:
            self.close()
            raise
        self.endpoint = self._socket.get_string(zmq.LAST_ENDPOINT)

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, then close."""
        try:
            while not stop.is_set():
                self._socket.poll(self._wait())
                for _ in range(AT_ONCE):
                    if not self._hear():
                        break
                self._decide(Event(time.monotonic()))
        finally:
            self.close()

    def close(self) -> None:
        """No socket is left; one that this server has not bound stays."""
        if not self._socket.closed:
            endpoints.removed(self.endpoint)
            self._socket.close()
        self._context.term()

    def _wait(self) -> int:
        """Milliseconds to the next thing that time brings."""
        at = due(self.world, self.rules)
        left = LONGEST if at is None else min(LONGEST, at - time.monotonic())
        return max(0, int(1000 * left) + 1)

    def _hear(self) -> bool:
        try:
            peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        heard = said(frames[0]) if len(frames) == 1 else None
        if heard is None:
            self.dropped += 1
        elif isinstance(heard, Ask):
            self._tell(peer.hex(), self.world.status(self.rules, self.dropped))
        else:
            self._decide(Event(time.monotonic(), peer.hex(), heard))
        return True

    def _decide(self, event: Event) -> None:
        self.world, sent = step(self.world, event, self.rules)
        for one in sent:
            self._tell(one.peer, one.told)

    def _tell(self, peer: str, told: Told) -> None:
        # A ROUTER drops what a peer does not take, and what is for nobody.
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart([bytes.fromhex(peer), encode(told)], zmq.NOBLOCK)
