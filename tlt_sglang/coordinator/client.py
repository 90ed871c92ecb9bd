"""The client of a member: an engine, a trainer or an RL stack. It never blocks its caller.

No call waits, and none raises because the coordinator is dead, not yet up, or restarted: what
cannot be sent is dropped, and the client joins again when a coordinator answers. It has no thread
and is not thread-safe: its owner calls `report` or `poll` often, at least each second. A trainer
that hears nothing for the coordinator's timeout is stopped by its own client.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.connection import MAX_PENDING, connect
from tlt_sglang.coordinator.location import Location
from tlt_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""The time between two attempts to join."""

Connect = Callable[[str | None, Path | None], tuple[Any, Any]]
"""Returns a context and a socket, as `connection.connect` does."""


class Client:
    """A member of a coordinator.

    Raises ConfigError for an address, a key, a name or a role that is not valid.
    """

    def __init__(
        self,
        endpoint: str,
        name: str,
        role: messages.Role,
        device: str | None = None,
        *,
        key: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        connect: Connect = connect,
    ) -> None:
        self.name, self.role, self.device = name, role, device
        hello = messages.encode(messages.Hello(name, role, device))
        if messages.decode_member_message(hello) is None:
            raise ConfigError(
                f"The member {name!r} with the role {role!r} on the device {device!r} is not "
                "valid; write names in ASCII without blanks."
            )
        self.refusal: str | None = None
        """Why the coordinator does not take this member; the client keeps trying."""
        self.dropped = 0
        """The number of messages that could not be sent, or not be read."""
        self._clock, self._joined, self._session = clock, False, ""
        self._timeout, self._last_received, self._last_sent = 5.0, clock(), float("-inf")
        self._seq, self._active, self._stopped_alone = 0, False, False
        self._load: messages.Load | None = None
        self._signals: dict[tuple[bool, str | None], messages.Signal] = {}
        self._inbox: deque[messages.Instruction] = deque(maxlen=MAX_PENDING)
        self._location = Location(endpoint)
        self._address = self._location.address
        self._context, self._socket = connect(self._address, key)

    @property
    def connected(self) -> bool:
        """Return whether the coordinator has accepted this member and answered in time."""
        return self._joined and not self._silent()

    def report(self, running: int, queued: int, tokens_per_s: float) -> None:
        """Report an engine's load. May be called at any rate: only a change is sent at once."""
        rate = float(tokens_per_s) if 0 <= tokens_per_s < 1e15 else 0.0
        load = messages.Load(int(running), int(queued), rate)
        old, self._load = self._load, load
        self._receive()
        if old is None or (old.running, old.queued) != (running, queued):
            self._send_state()
        self._keep_alive()

    def poll(self) -> list[messages.Instruction]:
        """Return what this member has to act upon, each instruction once."""
        self._receive()
        self._keep_alive()
        if self._active and not self._stopped_alone and (self.refusal or self._silent()):
            # Without a coordinator nobody would stop the trainer when its engine gets work.
            self._stopped_alone = True
            self._inbox.append(messages.Stop(0, 0, True))
        instructions = list(self._inbox)
        self._inbox.clear()
        return instructions

    def confirm_stop(self) -> None:
        """Confirm that a trainer has left its device and freed what it was asked to free."""
        self._active = self._stopped_alone = False
        self._send_state()

    def tell(self, kind: messages.SignalKind, device: str | None = None) -> None:
        """Send a signal for one device, or for all; an engine sends it for its own device.

        The client repeats its signals to a coordinator that was restarted. A stack that was silent
        joins again with this call, so it need not poll while it waits for a rollout.
        """
        signal = messages.Signal(kind, device)
        if messages.decode_member_message(messages.encode(signal)) is None:
            raise ConfigError(
                f"The signal {kind!r} for the device {device!r} is not valid; see "
                "docs/internals/coordinator.md."
            )
        # A signal for all devices supersedes those of its kind for single devices.
        about_claims = kind in ("claim_device", "release_device")
        if device is None:
            self._signals = {
                at: old for at, old in self._signals.items() if at[0] is not about_claims
            }
        self._signals[about_claims, device] = signal
        self._receive()
        if self._joined:
            self._join_again(signal)

    def close(self) -> None:
        """Leave the coordinator, if there is one, and close the socket."""
        if not self._socket.closed:
            self._send(messages.Bye())
            self._socket.close()
            self._context.term()

    def _silent(self) -> bool:
        return self._quiet_for() > self._timeout

    def _quiet_for(self) -> float:
        return self._clock() - self._last_received

    def _receive(self) -> None:
        for _ in range(MAX_PENDING):
            try:
                message = messages.decode_coordinator_message(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if message is None:
                self.dropped += 1
                continue
            self._last_received = self._clock()
            self._handle(message)

    def _handle(self, message: messages.CoordinatorMessage) -> None:
        if isinstance(message, messages.Welcome):
            self._joined, self.refusal, self._timeout = True, None, message.timeout_s
            if message.session != self._session:
                self._session = message.session
                for signal in self._signals.values():
                    self._send(signal)
            self._send_state()
        elif isinstance(message, messages.Refused):
            if message.reason != self.refusal:
                logger.warning("The coordinator refuses %s. %s", self.name, message.reason)
            self._joined, self.refusal = False, message.reason
        elif isinstance(message, messages.Unknown) and self._joined:
            # It was silent for too long: it joins again, with all that it has signalled.
            self._seq, self._last_sent = 0, float("-inf")
            self._join_again(*self._signals.values())
        elif isinstance(message, (messages.Start, messages.Stop)):
            # The coordinator repeats a command until it is confirmed.
            if message.seq != self._seq:
                self._seq, self._active, self._stopped_alone = message.seq, True, False
                self._inbox.append(message)
        elif isinstance(message, (messages.Kill, messages.Freed)):
            self._inbox.append(message)

    def _join_again(self, *signals: messages.Signal) -> None:
        """Send who this is, and signals; where that fails, all of them follow the next welcome."""
        words: list[messages.MemberMessage] = [self._hello(), *signals]
        if not all(self._send(word) for word in words):
            self._joined, self._session = False, ""

    def _keep_alive(self) -> None:
        """Send a sign of life, or try to join, where one is due."""
        elapsed = self._clock() - self._last_sent
        interval = self._timeout / 5 if self._joined else RETRY_SECONDS
        if elapsed >= interval or elapsed < 0:
            if not self._joined or self._quiet_for() > self._timeout / 2:
                self._follow()
            self._send_state()

    def _follow(self) -> None:
        """Turn to where the coordinator is now, if it has moved."""
        self._location.look()
        if (address := self._location.address) == self._address or address is None:
            return
        if self._address is not None:
            self._socket.disconnect(self._address)
        self._socket.connect(address)
        self._address, self._joined, self._seq = address, False, 0

    def _send_state(self) -> None:
        message: messages.MemberMessage
        if not self._joined:
            if 0 <= self._clock() - self._last_sent < RETRY_SECONDS:
                return
            message = self._hello()
        elif self.role == "trainer":
            message = messages.Training(self._seq, self._active)
        else:
            message = self._load or messages.Ping()
        if self._send(message):
            self._last_sent = self._clock()

    def _hello(self) -> messages.Hello:
        return messages.Hello(self.name, self.role, self.device, self._active)

    def _send(self, message: messages.MemberMessage) -> bool:
        try:
            self._socket.send(messages.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += self._joined
            return False
        return True
