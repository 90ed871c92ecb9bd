"""What the coordinator knows, as values: members, devices, and the state that follows from them.

Pure. Times are seconds of the server's monotonic clock, peers the transport's addresses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from tlt_sglang.coordinator.messages import Role, Status


class State(StrEnum):
    """Of a device, as it is shown."""

    BUSY = "BUSY"
    """Its engine has work, is about to get it, or is not known."""
    DRAINING = "DRAINING"
    """A few requests are left, no more than the threshold, and none waits."""
    IDLE = "IDLE"
    TRAINING = "TRAINING"
    """From the start until the trainer confirms its stop, or is late to."""
    AWAY = "AWAY"
    """Somebody wants the device for something else: no training until it is free."""


class Phase(Enum):
    """Of the trainer on a device."""

    OFF = "off"
    ON = "on"
    STOPPING = "stopping"
    RELEASING = "releasing"
    """It was off, but its memory is wanted."""
    KILLED = "killed"
    """It was late to stop. It gets no other order until it confirms, or is forgotten."""


@dataclass(frozen=True, slots=True)
class Rules:
    """When to train; times in seconds."""

    threshold: int = 0
    """Requests that may still run while their device is trained on; 0: only idle ones."""
    dwell: float = 0.5
    """Calm before training starts, so that a gap between two requests is no idle time."""
    preempt: float = 0.5
    """Within which a trainer has to stop."""
    timeout: float = 5.0
    """Silence after which a member is forgotten."""


@dataclass(frozen=True, slots=True)
class Member:
    """Somebody who takes part."""

    name: str
    role: Role
    device: str | None
    seen: float
    """When it was last heard."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What RL stacks have said of a device. They last until the opposite is said."""

    away: bool = False
    expected: bool = False
    """A rollout has begun, and the engine has had no request of it yet."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device, its engine and its trainer."""

    marks: Marks
    asker: str | None = None
    """The peer that waits for the device."""
    engine: str | None = None
    running: int = 0
    queued: int = 0
    tokens_per_s: float = 0.0
    reported: bool = False
    calm_since: float | None = None
    """When the engine became quiet; None while it is not."""
    trainer: str | None = None
    phase: Phase = Phase.OFF
    order: int = 0
    """The trainer's last; 0: none since it joined."""
    release: bool = False
    """The last order asks for the memory."""
    holds: bool = False
    """The trainer may have memory on the device."""
    ordered: float = 0.0
    """When the stop was ordered."""
    deadline: float = 0.0
    """Of the stop, or when the kill is repeated."""

    @property
    def on_device(self) -> bool:
        """The trainer may be computing there, by the coordinator's leave."""
        return self.phase in (Phase.ON, Phase.STOPPING)

    def quiet(self, rules: Rules) -> bool:
        """The engine leaves room to train."""
        if self.engine is None or not self.reported or self.marks.away or self.marks.expected:
            return False
        return not self.queued and self.running <= rules.threshold

    def state(self, rules: Rules) -> State:
        """As it is shown."""
        if self.on_device:
            return State.TRAINING
        if self.marks.away:
            return State.AWAY
        if not self.quiet(rules):
            return State.BUSY
        return State.DRAINING if self.running else State.IDLE


@dataclass(frozen=True, slots=True)
class World:
    """Everything; the same events lead to the same one."""

    session: str = ""
    """Tells one coordinator from the next: a new one has to be told everything."""
    at: float = float("-inf")
    members: Mapping[str, Member] = field(default_factory=dict)
    """By peer."""
    devices: Mapping[str, Device] = field(default_factory=dict)
    """By name."""
    everywhere: Marks = Marks()
    """What was said of all devices: new ones begin with it."""
    orders: int = 0
    late: int = 0
    stops: tuple[float, ...] = ()
    """Seconds from the order to its confirmation, of the last ones."""

    def status(self, rules: Rules, dropped: int) -> Status:
        """For people."""
        return Status(
            {name: device.state(rules).value for name, device in self.devices.items()},
            {member.name: member.role for member in self.members.values()},
            sum(device.tokens_per_s for device in self.devices.values()),
            self.late,
            dropped,
            [round(1000 * seconds, 3) for seconds in self.stops],
        )
