"""The coordinator's server: a ZMQ ROUTER and a clock around the decisions of `states`.

Runs in `tlt coordinator`, or on a thread of the launcher. It decides nothing itself.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from pathlib import Path

import zmq

from tlt_sglang.coordinator import endpoints, messages
from tlt_sglang.coordinator.states import Event, due, step
from tlt_sglang.coordinator.world import Rules, World
from tlt_sglang.errors import ConfigError

MAX_BATCH_SECONDS = 0.5
"""How long messages are handled before timeouts are evaluated although more are there."""
MAX_WAIT_SECONDS = 0.25
"""The longest wait for a message, and so the delay with which `run` ends."""


class Server:
    """A coordinator, whose socket is bound at construction.

    Raises ConfigError for an address or a key that cannot be used.
    """

    def __init__(self, endpoint: str, rules: Rules, key: Path | None = None) -> None:
        self.rules, self.world = rules, World(uuid.uuid4().hex)
        self.endpoint = ""
        """The address as bound, with the port that a wildcard stood for."""
        self.dropped = 0
        """The number of malformed messages."""
        endpoints.check_endpoint(endpoint)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.MAXMSGSIZE, messages.MAX_BYTES)
        # A member that reconnects before its old connection has timed out keeps its address.
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        try:
            endpoints.secure(self._socket, key, server=True)
            with endpoints.exclusive(endpoint):
                self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(
                f"The coordinator cannot listen at {endpoint} ({error.strerror}); choose another."
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
                end = time.monotonic() + MAX_BATCH_SECONDS
                while self._receive() and time.monotonic() < end:
                    pass
                self._decide(Event(time.monotonic()))
        finally:
            self.close()

    def close(self) -> None:
        """Close and unlink the socket; one that another coordinator has bound stays."""
        if not self._socket.closed:
            endpoints.remove_socket(self.endpoint)
            self._socket.close()
        self._context.term()

    def _wait(self) -> int:
        """Return the milliseconds until the next timeout, or until the longest wait has passed."""
        at = due(self.world)
        seconds = MAX_WAIT_SECONDS
        if at is not None:
            seconds = min(seconds, at - time.monotonic())
        return max(0, int(1000 * seconds) + 1)

    def _receive(self) -> bool:
        """Handle one message; return whether there was one."""
        try:
            peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        message = messages.decode_member_message(frames[0]) if len(frames) == 1 else None
        if message is None:
            self.dropped += 1
        elif isinstance(message, messages.StatusRequest):
            self._send(peer.hex(), self.world.status(self.rules, self.dropped))
        else:
            self._decide(Event(time.monotonic(), peer.hex(), message))
        return True

    def _decide(self, event: Event) -> None:
        for one in step(self.world, event, self.rules):
            self._send(one.peer, one.message)

    def _send(self, peer: str, message: messages.CoordinatorMessage) -> None:
        # A ROUTER drops messages for peers that have left or do not read.
        with contextlib.suppress(zmq.Again):
            self._socket.send_multipart(
                [bytes.fromhex(peer), messages.encode(message)], zmq.NOBLOCK
            )
