"""The coordinator's decisions as a function: a world and an event in, messages out.

Used in the coordinator's process. No clock and no I/O: time comes with the event, from the
server's monotonic clock. Timeouts (silence, dwell, deadlines) are only evaluated by events without
a message, which the server sends after everything that has arrived, so that a server which was
held up does not blame its members.
"""

from __future__ import annotations

from dataclasses import dataclass

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.transition import Outgoing, Transition
from tlt_sglang.coordinator.world import Rules, World


@dataclass(frozen=True, slots=True)
class Event:
    """A message of a peer arrives; or, without a message, time passes."""

    at: float
    peer: str = ""
    message: messages.MemberMessage | None = None


def step(world: World, event: Event, rules: Rules) -> list[Outgoing]:
    """Change `world` as `event` demands and return the messages to send."""
    transition = Transition(world, event.at, rules)
    if event.message is None:
        transition.pass_time()
    else:
        transition.receive(event.peer, event.message)
    transition.finish()
    return transition.outgoing


def due(world: World) -> float | None:
    """Return the earliest time at which time alone may change something, or None for never."""
    return world.timeouts[0][0] if world.timeouts else None
