"""What members and the coordinator say to each other: typed, JSON, strictly validated.

No message carries a time: members' clocks are not trusted. Used in every process that takes part.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

MOST_BYTES = 1 << 20
"""Of a message; ZMQ hangs up on a peer that sends more. The status of very many devices fits."""

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[!-~]+\Z")]
"""Of a member or a device: printable ASCII without blanks."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Rate = Annotated[float, Meta(ge=0, le=1e15)]
Role = Literal["engine", "trainer", "stack"]
"""`stack`: an RL framework or a launcher, which belongs to no device."""
What = Literal["rollout_begins", "rollout_ends", "device_wanted", "device_free"]


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """The base of all of them; the type's name travels as `type`."""


class Hello(Message, frozen=True, tag="hello"):
    """A member joins, or joins again because the coordinator does not know it."""

    name: Name
    role: Role
    device: Name | None = None
    active: bool = False
    """Of a trainer: it may be on its device, from when the coordinator was another one."""


class Load(Message, frozen=True, tag="load"):
    """An engine's, also as its sign of life."""

    running: Count
    queued: Count
    tokens_per_s: Rate


class Training(Message, frozen=True, tag="training"):
    """A trainer's report and sign of life: the order it got last, and whether it is yet to stop."""

    order: Count
    active: bool
    """From the moment that it gets an order until it says that it has stopped."""


class Signal(Message, frozen=True, tag="signal"):
    """What an RL stack, or an engine of its own device, says explicitly."""

    what: What
    device: Name | None = None
    """None: an engine's own device, or all that there are and will be."""


class Ping(Message, frozen=True, tag="ping"):
    """A sign of life."""


class Bye(Message, frozen=True, tag="bye"):
    """A member leaves."""


class Ask(Message, frozen=True, tag="ask"):
    """Anybody may ask for a Status."""


Said = Hello | Load | Training | Signal | Ping | Bye | Ask
"""What the coordinator hears."""


class Welcome(Message, frozen=True, tag="welcome"):
    """The member has joined."""

    session: str
    """Of this coordinator: another one is to be told again what stacks have said."""
    timeout_s: Rate
    """A member that is silent for so long is forgotten, and a trainer that hears nothing stops."""


class Refused(Message, frozen=True, tag="refused"):
    """The member cannot join now."""

    reason: str


class Unknown(Message, frozen=True, tag="unknown"):
    """Say hello first: the coordinator was started anew, or has forgotten this member."""


class Pong(Message, frozen=True, tag="pong"):
    """Heard."""


class Start(Message, frozen=True, tag="start"):
    """The trainer may use its device until it is told to stop."""

    order: Count


class Stop(Message, frozen=True, tag="stop"):
    """The trainer must leave its device, and say so, within a time that begins with receiving this.

    Order 0 is the client's own: the coordinator is silent.
    """

    order: Count
    within_ms: Count
    release: bool
    """The memory on the device is wanted, too."""


class Kill(Message, frozen=True, tag="kill"):
    """A trainer did not stop in time. Told to itself, and to each stack, which can end it."""

    order: Count
    name: Name
    device: Name


class Freed(Message, frozen=True, tag="freed"):
    """To who wanted a device: nobody trains there and the memory was given back."""

    device: Name


class Status(Message, frozen=True, tag="status"):
    """What the coordinator knows; for people and dashboards."""

    states: dict[str, str]
    """By device."""
    members: dict[str, str]
    """Role by name."""
    tokens_per_s: float
    late: int
    """Stops that were not confirmed in time."""
    dropped: int
    """Malformed messages."""
    stop_ms: list[float]
    """The last stops: from the order to its confirmation."""


Told = Welcome | Refused | Unknown | Pong | Start | Stop | Kill | Freed | Status
"""What the coordinator says."""
Instruction = Start | Stop | Kill | Freed
"""What a member has to act upon."""

T = TypeVar("T")
_said: msgspec.json.Decoder[Said] = msgspec.json.Decoder(Said)
_told: msgspec.json.Decoder[Told] = msgspec.json.Decoder(Told)


def encode(message: Said | Told) -> bytes:
    """Its JSON."""
    return msgspec.json.encode(message)


def said(data: bytes) -> Said | None:
    """What a member says in `data`; None where it is malformed."""
    return _decoded(_said, data)


def told(data: bytes) -> Told | None:
    """What the coordinator says in `data`; None where it is malformed."""
    return _decoded(_told, data)


def _decoded(decoder: msgspec.json.Decoder[T], data: bytes) -> T | None:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
