"""A coordinator's world and its clock, to play events in, and messages that it must not accept."""

from __future__ import annotations

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.messages import (
    Hello,
    Load,
    Start,
    Training,
)
from tlt_sglang.coordinator.states import Event, step
from tlt_sglang.coordinator.transition import Outgoing
from tlt_sglang.coordinator.world import Rules, State, World

RULES = Rules()
FAST = Rules(dwell=0.002, preempt=1.0, timeout=2.0)
BUSY, IDLE = Load(3, 2, 50.0), Load(0, 0, 0.0)


class Play:
    """A world and its clock. Peers have the names of their members."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.rules, self.world, self.now = rules, World(), 100.0
        self.events: list[Event] = []

    def say(self, peer: str, message: messages.MemberMessage) -> list[Outgoing]:
        return self._step(Event(self.now, peer, message))

    def wait(self, seconds: float = 0.0) -> list[Outgoing]:
        """Let time pass; every member shows a sign of life first."""
        self.now += seconds
        for peer in list(self.world.members):
            self.say(peer, messages.Ping())
        return self._step(Event(self.now))

    def silence(self, seconds: float) -> list[Outgoing]:
        self.now += seconds
        return self._step(Event(self.now))

    def engine(self, device: str = "cpu:0", name: str = "") -> list[Outgoing]:
        return self.say(name or f"e-{device}", Hello(name or f"e-{device}", "engine", device))

    def trainer(self, device: str = "cpu:0", active: bool = False) -> list[Outgoing]:
        return self.say(f"t-{device}", Hello(f"t-{device}", "trainer", device, active))

    def stack(self) -> None:
        self.say("rl", Hello("rl", "stack"))

    def state(self, device: str = "cpu:0") -> State:
        return self.world.devices[device].state(self.rules)

    def _step(self, event: Event) -> list[Outgoing]:
        self.events.append(event)
        sent = step(self.world, event, self.rules)
        return [
            one for one in sent if not isinstance(one.message, (messages.Pong, messages.Welcome))
        ]


def training(rules: Rules = RULES) -> Play:
    """Return a world with an idle engine and a trainer at work on command 1."""
    play = Play(rules)
    play.engine()
    play.trainer()
    play.say("e-cpu:0", IDLE)
    assert play.wait(rules.dwell) == [Outgoing("t-cpu:0", Start(1))]
    play.say("t-cpu:0", Training(1, True))
    return play


MALFORMED = [
    b"",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"null",
    b"{}",
    b'{"type":"shutdown"}',
    b'{"type":"start","seq":1}',
    b'{"type":"load","running":-1,"queued":0,"tokens_per_s":0}',
    b'{"type":"load","running":1e99,"queued":0,"tokens_per_s":0}',
    b'{"type":"load","running":1,"queued":0,"tokens_per_s":NaN}',
    b'{"type":"load","running":1,"queued":0,"tokens_per_s":1e999}',
    b'{"type":"load","running":"1","queued":0,"tokens_per_s":0}',
    b'{"type":"load","running":1,"queued":0}',
    b'{"type":"load","running":1,"queued":0,"tokens_per_s":0,"time":12.5}',
    b'{"type":"hello","name":"","role":"engine","device":"a"}',
    b'{"type":"hello","name":"a b","role":"engine","device":"a"}',
    b'{"type":"hello","name":"a\\n","role":"engine","device":"a"}',
    b'{"type":"hello","name":"a","role":"boss","device":"a"}',
    b'{"type":"signal","kind":"explode"}',
]
