"""The simulated coordinator: its real decisions and messages, each of which takes its real time.

It handles one message after the other, as `tlt_sglang.coordinator.server` does. What it takes to
decode a message, to decide and to encode the replies is measured while the simulation runs; what
ZMQ takes to receive and to send one is measured before (`socket_seconds`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import zmq

from benchmarks.fleet_simulation.network import Network
from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.server import MAX_BATCH_SECONDS, MAX_WAIT_SECONDS
from tlt_sglang.coordinator.states import Event, due, step
from tlt_sglang.coordinator.transition import Outgoing
from tlt_sglang.coordinator.world import Rules, World


class Coordinator:
    """A coordinator whose process can die and be started again."""

    def __init__(self, network: Network, rules: Rules, socket_seconds: float) -> None:
        self.network, self.rules, self.socket_seconds = network, rules, socket_seconds
        self.up, self.world, self.sessions = False, World(), 0
        self.received = self.sent = self.forgotten = 0
        """`forgotten` counts the messages of peers that this coordinator no longer knew."""
        self.busy = 0.0
        """Seconds of one core that everything has taken."""
        self.longest_queue = 0
        self._known: set[str] = set()
        self._queue: deque[tuple[str, bytes]] = deque()
        self._wake_at, self._free_at = float("inf"), 0.0
        network.receiver = self
        self.start()

    def start(self) -> None:
        """Begin, or begin again without any knowledge."""
        self.sessions += 1
        self.up, self.world = True, World(str(self.sessions))
        self._known.clear()
        self._wake(self.network.timeline.now)

    def die(self) -> None:
        """Lose everything, also what has arrived."""
        self.up, self._wake_at = False, float("inf")
        self._queue.clear()

    def arrive(self, peer: str, data: bytes) -> None:
        """Queue a message."""
        if self.up:
            self._queue.append((peer, data))
            self.longest_queue = max(self.longest_queue, len(self._queue))
            self._wake(self.network.timeline.now)

    def _wake(self, at: float) -> None:
        """Run at `at` at the latest, but not while it is at work."""
        at = max(at, self._free_at)
        if at < self._wake_at:
            self._wake_at = at
            self.network.timeline.at(at, lambda: self._run(at))

    def _run(self, at: float) -> None:
        """Handle one batch of messages, then the passing of time."""
        if not self.up or at != self._wake_at:
            return
        self._free_at = at
        timeline = self.network.timeline
        while self._queue and self._free_at < at + MAX_BATCH_SECONDS:
            peer, data = self._queue.popleft()
            self._free_at += self._handle(self._free_at, peer, data)
            # Whatever arrives meanwhile is handled, too.
            timeline.run(self._free_at)
        if not self.up:
            return
        self._free_at += self._handle(self._free_at)
        self.busy += self._free_at - at
        self._wake_at = float("inf")
        after = due(self.world)
        waits = MAX_WAIT_SECONDS if after is None else min(MAX_WAIT_SECONDS, after - self._free_at)
        self._wake(self._free_at + (0.0 if self._queue else waits))

    def _handle(self, at: float, peer: str = "", data: bytes = b"") -> float:
        """Handle a message, or the passing of time, and return the seconds that this takes."""
        began = time.thread_time()
        message = messages.decode_member_message(data) if peer else None
        outgoing = step(self.world, Event(at, peer, message), self.rules)
        replies = [(one.peer, messages.encode(one.message)) for one in outgoing]
        seconds = time.thread_time() - began
        seconds += self.socket_seconds * (bool(peer) + len(replies))
        self.received += bool(peer)
        self.sent += len(replies)
        self._count(outgoing)
        for to, reply in replies:
            self.network.reply(at + seconds, to, reply)
        return seconds

    def _count(self, outgoing: Sequence[Outgoing]) -> None:
        for one in outgoing:
            if isinstance(one.message, messages.Welcome):
                self._known.add(one.peer)
            elif isinstance(one.message, messages.Unknown) and one.peer in self._known:
                self.forgotten += 1


def socket_seconds(count: int = 4000) -> float:
    """Return the CPU seconds of a ROUTER for one message: the mean of receiving and sending."""
    with (
        TemporaryDirectory(prefix="tlt-") as folder,
        zmq.Context() as context,
        context.socket(zmq.ROUTER) as router,
        context.socket(zmq.DEALER) as dealer,
    ):
        address = f"ipc://{Path(folder) / 'socket'}"
        for socket in (router, dealer):
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.SNDHWM, 0)
            socket.set(zmq.RCVHWM, 0)
        router.bind(address)
        dealer.connect(address)
        data = messages.encode(messages.Load(1, 0, 1.0))
        for _ in range(count):
            dealer.send(data)
        router.poll()
        began = time.thread_time()
        for _ in range(count):
            peer, _message = router.recv_multipart()
            router.send_multipart([peer, data])
        return (time.thread_time() - began) / (2 * count)
