"""The coordinator's knowledge: members, devices, and the states that follow from them.

Used in the coordinator's process. No clock and no I/O. Times are seconds of the server's monotonic
clock, peers are addresses of the transport. What a message or a timeout needs is found without a
search through all members or devices, so that an event costs the same however many there are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum

from tlt_sglang.coordinator.messages import Role, Status

STOP_TIMES = 256
"""How many of the most recent stop durations are kept."""


class State(StrEnum):
    """The state of a device as users see it."""

    BUSY = "BUSY"
    """Its engine has work, is about to get some, or has not reported."""
    DRAINING = "DRAINING"
    """Some requests still run, no more than the threshold, and none is queued."""
    IDLE = "IDLE"
    TRAINING = "TRAINING"
    """A trainer has started and has neither confirmed a stop nor exceeded its deadline."""
    AWAY = "AWAY"
    """An RL stack claims the device: no training until it releases it."""


class Phase(Enum):
    """The phase of the trainer on a device."""

    OFF = "off"
    ON = "on"
    STOPPING = "stopping"
    RELEASING = "releasing"
    """The trainer was off and has to free its memory on the device."""
    KILLED = "killed"
    """The trainer exceeded its deadline; it gets no new command until it confirms or leaves."""


WITH_DEADLINE = (Phase.STOPPING, Phase.RELEASING, Phase.KILLED)
"""The phases in which a deadline is set."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules by which training starts and stops; times in seconds."""

    threshold: int = 0
    """Requests that may still run on a device while it trains; 0 trains on idle devices only."""
    dwell: float = 0.5
    """How long a device has to be quiet before training starts, to ignore short gaps."""
    preempt: float = 0.5
    """How long a trainer may take to stop."""
    timeout: float = 5.0
    """How long a member may be silent before it is removed."""


@dataclass(slots=True)
class Member:
    """A process that takes part."""

    name: str
    role: Role
    device: str | None
    last_contact: float
    """When its last message arrived."""
    check_at: float
    """When its silence is looked at next; the time of its entry among the timeouts."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The signals in force for a device. They last until the opposite signal arrives."""

    claimed: bool = False
    """An RL stack claims the device."""
    rollout_pending: bool = False
    """A rollout has begun, and the engine has had no request of it yet."""


@dataclass(slots=True)
class Device:
    """A device with its engine and its trainer."""

    marks: Marks
    claimant: str | None = None
    """The peer that waits for the device to be free."""
    engine: str | None = None
    running: int = 0
    queued: int = 0
    tokens_per_s: float = 0.0
    reported: bool = False
    """True if the engine has reported a load."""
    calm_since: float | None = None
    """When the engine became quiet; None while it is not."""
    trainer: str | None = None
    phase: Phase = Phase.OFF
    seq: int = 0
    """The number of the trainer's last command; 0 if it has had none since it joined."""
    release: bool = False
    """True if the last command asks to free the memory."""
    holds_memory: bool = False
    """True if the trainer may have memory on the device."""
    stop_sent_at: float = 0.0
    deadline: float = 0.0
    """When a stop has to be confirmed, or a kill is repeated."""
    check_at: float | None = None
    """When it is looked at next; the time of its entry among the timeouts, None without one."""

    @property
    def on_device(self) -> bool:
        """Return whether the trainer may be computing there, with the coordinator's permission."""
        return self.phase in (Phase.ON, Phase.STOPPING)

    def quiet(self, rules: Rules) -> bool:
        """Return whether the engine leaves room to train."""
        if self.engine is None or not self.reported:
            return False
        if self.marks.claimed or self.marks.rollout_pending:
            return False
        return not self.queued and self.running <= rules.threshold

    def due(self, rules: Rules) -> float | None:
        """Return when the passing of time alone changes something here, or None for never."""
        if self.phase in WITH_DEADLINE:
            return self.deadline
        if self.phase is Phase.OFF and self.trainer and self.calm_since is not None:
            return self.calm_since + rules.dwell
        return None

    def state(self, rules: Rules) -> State:
        """Return the state that users see."""
        if self.on_device:
            return State.TRAINING
        if self.marks.claimed:
            return State.AWAY
        if not self.quiet(rules):
            return State.BUSY
        return State.DRAINING if self.running else State.IDLE


Timeout = tuple[float, str, str]
"""When to look at a member or a device, which of the two, and its peer or name."""


@dataclass(slots=True)
class World:
    """The whole state of a coordinator; the same events lead to the same world."""

    session: str = ""
    """The identity of this coordinator; members repeat their signals to a new one."""
    at: float = float("-inf")
    members: dict[str, Member] = field(default_factory=dict)
    """All members, by peer."""
    devices: dict[str, Device] = field(default_factory=dict)
    """All devices, by name."""
    default_marks: Marks = Marks()
    """The signals for all devices, with which a new device begins."""
    last_seq: int = 0
    """The number of the most recent command."""
    late: int = 0
    """The number of stops that were not confirmed in time."""
    stop_times: deque[float] = field(default_factory=lambda: deque(maxlen=STOP_TIMES))
    """Seconds from the command to its confirmation, of the most recent stops."""
    names: dict[str, str] = field(default_factory=dict)
    """The peer of each member, by the member's name."""
    stacks: dict[str, None] = field(default_factory=dict)
    """The peers of the RL stacks, in the order in which they joined."""
    timeouts: list[Timeout] = field(default_factory=list)
    """A heap. An entry whose time is no longer its member's or device's `check_at` is void."""

    def copy(self) -> World:
        """Return a world that later events of this one do not change."""
        return replace(
            self,
            members={peer: replace(member) for peer, member in self.members.items()},
            devices={name: replace(device) for name, device in self.devices.items()},
            stop_times=self.stop_times.copy(),
            names=self.names.copy(),
            stacks=self.stacks.copy(),
            timeouts=self.timeouts.copy(),
        )

    def status(self, rules: Rules, dropped: int) -> Status:
        """Return the summary for users; `dropped` counts malformed messages."""
        return Status(
            {name: device.state(rules).value for name, device in self.devices.items()},
            {member.name: member.role for member in self.members.values()},
            sum(device.tokens_per_s for device in self.devices.values()),
            self.late,
            dropped,
            [round(1000 * seconds, 3) for seconds in self.stop_times],
        )
