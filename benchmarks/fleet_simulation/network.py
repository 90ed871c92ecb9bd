"""Virtual time, and a network of delays and losses between clients and their coordinator."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

import zmq

DELAY = 0.0003
"""Median of a message's delay, in seconds."""
SPREAD = 1.0
"""Standard deviation of the delay's logarithm: one message in a hundred takes ten times as long."""
LOSS = 0.001
"""Share of the messages that get lost."""


class Timeline:
    """Events in the order of their virtual times."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the beginning."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, event: Callable[[], None]) -> None:
        """Have `event` happen at `time`, or now if that has passed."""
        heapq.heappush(self._events, (max(time, self.now), next(self._numbers), event))

    def run(self, until: float) -> None:
        """Let everything happen that is due before `until`."""
        while self._events and self._events[0][0] < until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until


class Receiver(Protocol):
    """The end of the network that receives the messages of all sockets."""

    up: bool

    def arrive(self, peer: str, data: bytes) -> None:
        """Take a message in; `peer` says whose it is."""


class Network:
    """Every message takes its own time, so messages may overtake each other."""

    def __init__(self, timeline: Timeline, dice: random.Random) -> None:
        self.timeline, self.dice = timeline, dice
        self.receiver: Receiver
        self.sockets: dict[str, Socket] = {}
        self._numbers = itertools.count()

    def connect(self, *_: object) -> tuple[Socket, Socket]:
        """Return a socket, also as its context; see `coordinator.connection.connect`."""
        socket = Socket(self, str(next(self._numbers)))
        self.sockets[socket.peer] = socket
        return socket, socket

    def carry(self, begin: float, arrive: Callable[[], None]) -> None:
        """Have a message that is sent at `begin` arrive, if it is not lost."""
        if self.dice.random() >= LOSS:
            self.timeline.at(begin + DELAY * self.dice.lognormvariate(0, SPREAD), arrive)

    def reply(self, begin: float, peer: str, data: bytes) -> None:
        """Send a message of the coordinator."""
        if peer in self.sockets:
            self.carry(begin, lambda: self.sockets[peer].inbox.append(data))


class Socket:
    """The socket of a client, as far as a client uses it."""

    def __init__(self, network: Network, peer: str) -> None:
        self.network, self.peer, self.closed = network, peer, False
        self.inbox: deque[bytes] = deque()

    def send(self, data: bytes, _flags: int) -> None:
        """Send a message; raises zmq.Again if the coordinator is down."""
        receiver = self.network.receiver
        if not receiver.up:
            raise zmq.Again
        self.network.carry(self.network.timeline.now, lambda: receiver.arrive(self.peer, data))

    def recv(self, _flags: int) -> bytes:
        """Return the next message; raises zmq.Again if there is none."""
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def close(self) -> None:
        """Lose whatever still arrives."""
        self.closed = True

    def term(self) -> None:
        """Do nothing: the socket is its own context."""
