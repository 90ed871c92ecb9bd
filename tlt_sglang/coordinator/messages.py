"""The messages between members and the coordinator: typed, JSON, strictly validated.

Used in every process that takes part. No message carries a time, because the clocks of members
are not trusted, and nothing here sends or receives.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

MAX_BYTES = 1 << 20
"""The largest message to the coordinator; ZMQ hangs up on a peer that sends more."""
MAX_REPLY_BYTES = 1 << 24
"""The largest message from the coordinator: a status of as many members as it takes fits."""

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[!-~]+\Z")]
"""The name of a member or a device: printable ASCII without blanks."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Rate = Annotated[float, Meta(ge=0, le=1e15)]
Role = Literal["engine", "trainer", "stack"]
"""`stack`: an RL framework or a launcher, which belongs to no device."""
SignalKind = Literal["rollout_begins", "rollout_ends", "claim_device", "release_device"]


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """The base of all messages; the name of the type travels as `type`."""


class Hello(Message, frozen=True, tag="hello"):
    """A member joins, or joins again because the coordinator does not know it."""

    name: Name
    role: Role
    device: Name | None = None
    active: bool = False
    """True if a trainer may be on its device already, on command of an earlier coordinator."""


class Load(Message, frozen=True, tag="load"):
    """An engine reports its load; this is its sign of life as well."""

    running: Count
    queued: Count
    tokens_per_s: Rate


class Training(Message, frozen=True, tag="training"):
    """A trainer confirms its last command; this is its sign of life as well."""

    seq: Count
    """The number of the last command that it received."""
    active: bool
    """True from the moment that it receives a command until it confirms that it has stopped."""


class Signal(Message, frozen=True, tag="signal"):
    """An RL stack announces a rollout or claims a device; an engine does so for its own device."""

    kind: SignalKind
    device: Name | None = None
    """None means an engine's own device, or all present and future devices."""


class Ping(Message, frozen=True, tag="ping"):
    """A member shows that it is alive."""


class Bye(Message, frozen=True, tag="bye"):
    """A member leaves."""


class StatusRequest(Message, frozen=True, tag="status_request"):
    """Anybody may request a Status without joining."""


MemberMessage = Hello | Load | Training | Signal | Ping | Bye | StatusRequest
"""The messages that the coordinator receives."""


class Welcome(Message, frozen=True, tag="welcome"):
    """The member has joined."""

    session: str
    """The identity of this coordinator; a new one needs the signals of the stacks again."""
    timeout_s: Rate
    """A member that is silent for so long is removed; a trainer that hears nothing stops."""


class Refused(Message, frozen=True, tag="refused"):
    """The member cannot join now."""

    reason: str


class Unknown(Message, frozen=True, tag="unknown"):
    """The sender is not a member: the coordinator restarted, or has removed it."""


class Pong(Message, frozen=True, tag="pong"):
    """The coordinator has received the member's message."""


class Start(Message, frozen=True, tag="start"):
    """The trainer may use its device until it receives a Stop."""

    seq: Count


class Stop(Message, frozen=True, tag="stop"):
    """The trainer must leave its device and confirm it in time, counted from receiving this.

    A `seq` of 0 means that the client itself stops the trainer, as the coordinator is silent.
    """

    seq: Count
    within_ms: Count
    release: bool
    """True if the memory on the device has to be freed, too."""


class Kill(Message, frozen=True, tag="kill"):
    """A trainer did not stop in time; sent to the trainer and to each stack, which can end it."""

    seq: Count
    name: Name
    device: Name


class Freed(Message, frozen=True, tag="freed"):
    """A claimed device is free: nobody trains there and its memory is free."""

    device: Name


class Status(Message, frozen=True, tag="status"):
    """A summary of the coordinator's knowledge, for people and dashboards."""

    states: dict[str, str]
    """The state of each device, by its name."""
    members: dict[str, str]
    """The role of each member, by its name."""
    tokens_per_s: float
    late: int
    """The number of stops that were not confirmed in time."""
    dropped: int
    """The number of malformed messages."""
    stop_ms: list[float]
    """The durations of the most recent stops, from the command to its confirmation."""


CoordinatorMessage = Welcome | Refused | Unknown | Pong | Start | Stop | Kill | Freed | Status
"""The messages that the coordinator sends."""
Instruction = Start | Stop | Kill | Freed
"""The messages that a member has to act upon."""

T = TypeVar("T")
_member_decoder: msgspec.json.Decoder[MemberMessage] = msgspec.json.Decoder(MemberMessage)
_coordinator_decoder: msgspec.json.Decoder[CoordinatorMessage] = msgspec.json.Decoder(
    CoordinatorMessage
)


def encode(message: MemberMessage | CoordinatorMessage) -> bytes:
    """Return the JSON of a message."""
    return msgspec.json.encode(message)


def decode_member_message(data: bytes) -> MemberMessage | None:
    """Return the message of a member, or None if `data` is malformed."""
    return _decode(_member_decoder, data)


def decode_coordinator_message(data: bytes) -> CoordinatorMessage | None:
    """Return the message of a coordinator, or None if `data` is malformed."""
    return _decode(_coordinator_decoder, data)


def _decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T | None:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
