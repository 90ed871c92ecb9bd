"""A member's side, in an engine, a trainer or an RL stack. It never blocks who calls it.

No call waits, and none raises because the coordinator is dead, not yet there, or came back: what
cannot be sent is dropped, and the client says hello again when somebody answers. It has no thread
and is not for several: its owner calls `report` or `poll` often, at least each second. A trainer
that hears nothing for the coordinator's timeout is told to stop by its own client.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

import zmq

from tlt_sglang.coordinator import endpoints
from tlt_sglang.coordinator import messages as say
from tlt_sglang.errors import ConfigError

RETRY = 0.5
"""Seconds between two hellos that nobody answers."""
WAITING = 64
"""Messages under way, and instructions that nobody fetches."""

_Context = zmq.Context[zmq.Socket[bytes]]


class Client:
    """Raises ConfigError for an address, a key or a name that cannot be right."""

    def __init__(
        self,
        endpoint: str,
        name: str,
        role: say.Role,
        device: str | None = None,
        *,
        key: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.role, self.device = name, role, device
        if say.said(say.encode(say.Hello(name, role, device))) is None:
            raise ConfigError(
                f"{name!r}, {role!r} on {device!r} is no member; write names without blanks."
            )
        self.refused: str | None = None
        """Why the coordinator does not take this member; it is asked again."""
        self.dropped = 0
        """Messages that could not be sent, or not be read."""
        self._clock, self._welcome, self._session = clock, False, ""
        self._timeout, self._heard, self._spoke = 5.0, clock(), float("-inf")
        self._order, self._active, self._alone = 0, False, False
        self._load: say.Load | None = None
        self._told: dict[tuple[str, str | None], say.Signal] = {}
        self._inbox: deque[say.Instruction] = deque(maxlen=WAITING)
        self._context, self._socket = _connected(endpoint, key)

    @property
    def connected(self) -> bool:
        """The coordinator knows this member, and was heard of late."""
        return self._welcome and not self._silent()

    def report(self, running: int, queued: int, tokens_per_s: float) -> None:
        """An engine's load. Call it as often as you like: only what changes is sent at once."""
        rate = float(tokens_per_s) if 0 <= tokens_per_s < 1e15 else 0.0
        load = say.Load(int(running), int(queued), rate)
        old, self._load = self._load, load
        self._receive()
        if old is None or (old.running, old.queued) != (running, queued):
            self._speak()
        self._remind()

    def poll(self) -> list[say.Instruction]:
        """What this member has to act upon, each once."""
        self._receive()
        self._remind()
        if self._active and not self._alone and (self.refused or self._silent()):
            # Nobody could tell it that its engine has work.
            self._alone = True
            self._inbox.append(say.Stop(0, 0, True))
        told = list(self._inbox)
        self._inbox.clear()
        return told

    def stopped(self) -> None:
        """A trainer has left its device, and given back what it was told to."""
        self._active = self._alone = False
        self._speak()

    def tell(self, what: say.What, device: str | None = None) -> None:
        """What an RL stack knows of a device, or of all; an engine speaks of its own.

        A coordinator that was started anew is told again. A stack that was silent joins again with
        this, so it need not show signs of life while it waits for a rollout.
        """
        signal = say.Signal(what, device)
        if say.said(say.encode(signal)) is None:
            raise ConfigError(
                f"{what!r} of {device!r} is nothing to tell; see docs/internals/coordinator.md."
            )
        kind = what.partition("_")[0]
        if device is None:
            self._told = {at: old for at, old in self._told.items() if at[0] != kind}
        self._told[kind, device] = signal
        self._receive()
        if self._welcome and not (self._send(self._hello()) and self._send(signal)):
            self._welcome, self._session = False, ""

    def close(self) -> None:
        """Leave; the coordinator, if there is one, is told."""
        if not self._socket.closed:
            self._send(say.Bye())
            self._socket.close()
            self._context.term()

    def _silent(self) -> bool:
        return self._clock() - self._heard > self._timeout

    def _receive(self) -> None:
        for _ in range(WAITING):
            try:
                told = say.told(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            if told is None:
                self.dropped += 1
                continue
            self._heard = self._clock()
            self._take(told)

    def _take(self, told: say.Told) -> None:
        if isinstance(told, say.Welcome):
            self._welcome, self.refused, self._timeout = True, None, told.timeout_s
            if told.session != self._session:
                self._session = told.session
                for signal in self._told.values():
                    self._send(signal)
            self._speak()
        elif isinstance(told, say.Refused):
            self._welcome, self.refused = False, told.reason
        elif isinstance(told, say.Unknown) and self._welcome:
            self._welcome, self._order, self._spoke = False, 0, float("-inf")
        elif isinstance(told, (say.Start, say.Stop)):
            # A repetition of what is known says nothing new.
            if told.order != self._order:
                self._order, self._active, self._alone = told.order, True, False
                self._inbox.append(told)
        elif isinstance(told, (say.Kill, say.Freed)):
            self._inbox.append(told)

    def _remind(self) -> None:
        """A sign of life, where one is due."""
        since = self._clock() - self._spoke
        if since >= (min(RETRY, self._timeout / 5) if self._welcome else RETRY) or since < 0:
            self._speak()

    def _speak(self) -> None:
        message: say.Said
        if not self._welcome:
            if 0 <= self._clock() - self._spoke < RETRY:
                return
            message = self._hello()
        elif self.role == "trainer":
            message = say.Training(self._order, self._active)
        else:
            message = self._load or say.Ping()
        if self._send(message):
            self._spoke = self._clock()

    def _hello(self) -> say.Hello:
        return say.Hello(self.name, self.role, self.device, self._active)

    def _send(self, message: say.Said) -> bool:
        try:
            self._socket.send(say.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += self._welcome
            return False
        return True


def ask(endpoint: str, key: Path | None = None, wait: float = 2.0) -> say.Status | None:
    """What the coordinator at `endpoint` knows; None if it does not answer within `wait` seconds.

    Blocks; for people.
    """
    context, socket = _connected(endpoint, key)
    try:
        socket.set(zmq.SNDTIMEO, int(1000 * wait))
        socket.set(zmq.RCVTIMEO, int(1000 * wait))
        socket.send(say.encode(say.Ask()))
        told = say.told(socket.recv())
    except zmq.Again:
        return None
    finally:
        socket.close()
        context.term()
    return told if isinstance(told, say.Status) else None


def _connected(endpoint: str, key: Path | None) -> tuple[_Context, zmq.Socket[bytes]]:
    endpoints.checked(endpoint)
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    for option, value in (
        (zmq.LINGER, 100),
        (zmq.SNDHWM, WAITING),
        (zmq.RCVHWM, WAITING),
        (zmq.MAXMSGSIZE, say.MOST_BYTES),
        # Nothing waits for a coordinator that is not there.
        (zmq.IMMEDIATE, 1),
        (zmq.RECONNECT_IVL, 50),
        (zmq.RECONNECT_IVL_MAX, 500),
    ):
        socket.set(option, value)
    # Kept over reconnections; one that began with a zero byte would be ZMQ's own.
    socket.set(zmq.ROUTING_ID, b"m" + uuid.uuid4().bytes)
    try:
        endpoints.secure(socket, key, server=False)
        socket.connect(endpoint)
    except (zmq.ZMQError, ConfigError) as error:
        socket.close()
        context.term()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The coordinator's address {endpoint!r} is not possible ({error.strerror}); write "
            "ipc:///FOLDER/NAME or tcp://HOST:PORT."
        ) from error
    return context, socket
