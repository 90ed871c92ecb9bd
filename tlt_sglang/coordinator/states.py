"""The coordinator's decisions as a pure function: an event in, messages out.

Used in the coordinator's process. No clock and no I/O: time comes with the event, from the
server's monotonic clock. Timeouts (silence, dwell, deadlines) are only evaluated by events without
a message, which the server sends after everything that has arrived, so that a server which was
held up does not blame its members.
"""

from __future__ import annotations

from dataclasses import dataclass

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.transition import WITH_DEADLINE, Outgoing, Transition
from tlt_sglang.coordinator.world import Phase, Rules, World


@dataclass(frozen=True, slots=True)
class Event:
    """A message of a peer arrives; or, without a message, time passes."""

    at: float
    peer: str = ""
    message: messages.MemberMessage | None = None


def step(world: World, event: Event, rules: Rules) -> tuple[World, list[Outgoing]]:
    """Return the world after `event` and the messages to send."""
    transition = Transition(world, max(event.at, world.at), rules)
    if event.message is None:
        transition.pass_time()
    else:
        transition.receive(event.peer, event.message)
    return transition.finish(), transition.outgoing


def due(world: World, rules: Rules) -> float | None:
    """Return when the passing of time alone changes something, or None if it never does."""
    times = [member.last_contact + rules.timeout for member in world.members.values()]
    for device in world.devices.values():
        if device.phase in WITH_DEADLINE:
            times.append(device.deadline)
        elif device.phase is Phase.OFF and device.trainer and device.calm_since is not None:
            times.append(device.calm_since + rules.dwell)
    return min(times, default=None)
