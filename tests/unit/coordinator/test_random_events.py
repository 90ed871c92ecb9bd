"""The coordinator's decisions: rules that hold for any events, and what an event costs."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable

import pytest

from tests.support.coordination import BUSY, IDLE, RULES, Play
from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.messages import (
    Hello,
    Kill,
    Load,
    Signal,
    Start,
    Stop,
    Training,
)
from tlt_sglang.coordinator.states import Event, step
from tlt_sglang.coordinator.transition import Outgoing
from tlt_sglang.coordinator.world import Rules, State, World


def python_calls(action: Callable[[], object]) -> int:
    """Return the number of functions that `action` calls, those written in C included."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # hypothesis has functions called at each collection
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def work_per_event(devices: int) -> dict[str, int]:
    """Return how many functions each kind of event calls, among so many devices."""
    play = Play()
    for number in range(devices):
        play.engine(f"cpu:{number}")
        play.trainer(f"cpu:{number}")
    kinds: dict[str, tuple[str, messages.MemberMessage]] = {
        "load": ("e-cpu:3", IDLE),
        "same load": ("e-cpu:3", IDLE),
        "ping": ("t-cpu:3", messages.Ping()),
        "leave": ("t-cpu:3", messages.Bye()),
        "join": ("t-cpu:3", Hello("t-cpu:3", "trainer", "cpu:3")),
    }
    counts = {
        kind: python_calls(lambda: step(play.world, Event(play.now, peer, message), RULES))  # noqa: B023
        for kind, (peer, message) in kinds.items()
    }
    started: list[Outgoing] = []
    later = Event(play.now + RULES.dwell)
    counts["time"] = python_calls(lambda: started.extend(step(play.world, later, RULES)))
    assert started == [Outgoing("t-cpu:3", Start(1))]
    return counts


def test_an_event_costs_the_same_however_many_members_there_are() -> None:
    few, many = work_per_event(5), work_per_event(3000)
    assert few == many


def test_timeouts_do_not_pile_up_while_members_come_and_go() -> None:
    play = Play()
    for _ in range(200):
        for number in range(10):
            play.engine(f"cpu:{number}")
            play.trainer(f"cpu:{number}")
            play.say(f"e-cpu:{number}", IDLE)
        play.wait(RULES.dwell)
        for number in range(10):
            play.say(f"e-cpu:{number}", BUSY)
            play.say(f"t-cpu:{number}", messages.Bye())
    # Each cycle leaves at most one for each trainer that left, until its time has come.
    assert len(play.world.timeouts) <= 40 + 10 * RULES.timeout / RULES.dwell


DEVICES = ("cpu:0", "cpu:1")
PEERS = [f"{role}-{device}" for role in ("engine", "trainer") for device in DEVICES] + ["stack-x"]


def anything(dice: random.Random, world: World, peer: str) -> messages.MemberMessage:
    """Return a message, mostly a valid one for the member."""
    role, _, device = peer.partition("-")
    odd = dice.random()
    if peer not in world.members or odd < 0.03:
        name = dice.choice(PEERS) if odd < 0.02 else peer
        return Hello(name, role, None if role == "stack" else device, odd > 0.9)  # type: ignore[arg-type]
    if odd < 0.06:
        return messages.Bye()
    if odd < 0.1:
        role = dice.choice(("engine", "trainer", "stack"))
    if role == "engine":
        return dice.choice((IDLE, IDLE, IDLE, Load(1, 0, 1.0), BUSY))
    if role == "stack":
        what = dice.choice(messages.SignalKind.__args__)  # type: ignore[attr-defined]
        return dice.choice((messages.Ping(), Signal(what, dice.choice((None, *DEVICES)))))
    at = world.devices.get(device)
    seq = at.seq if at and dice.random() < 0.8 else dice.randint(0, 9)
    return Training(seq, dice.random() < 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_the_rules_hold_for_random_events(seed: int) -> None:
    dice = random.Random(seed)
    rules = Rules(dice.choice((0, 1)), dice.choice((0.0, 0.5)), 0.5, 3.0)
    world, now, history = World(), 0.0, []
    last_contact: dict[str, float] = {}
    started: dict[str, int] = {}
    busy: dict[str, float] = {}
    for _ in range(400):
        now += dice.choice((0.0, 0.01, 0.1, 0.3)) if dice.random() < 0.99 else 3.0
        peer = dice.choice(PEERS)
        message = None if dice.random() < 0.3 else anything(dice, world, peer)
        event = Event(now, peer if message else "", message)
        before = world.copy()
        sent = step(world, event, rules)
        history.append((event, world.copy(), sent))
        if message:
            last_contact[peer] = now
        if (
            isinstance(message, Training)
            and not message.active
            and message.seq == started.get(peer)
        ):
            del started[peer]
        for one in sent:
            reply = one.message
            # A member that is silent for too long gets no instruction.
            assert message or now < last_contact[one.peer] + rules.timeout
            if isinstance(reply, messages.Instruction):
                assert one.peer in world.members
            # Every start is followed by a stop before another start.
            if isinstance(reply, Start) and reply.seq:
                assert started.setdefault(one.peer, reply.seq) == reply.seq
            elif isinstance(reply, (Stop, Kill)):
                started.pop(one.peer, None)
        for peer in set(started) - set(world.members):
            del started[peer]
        # Nobody trains on beside an engine that has had work for longer than the deadline.
        for name in DEVICES:
            device, old = world.devices.get(name), before.devices.get(name)
            if device is None or device.quiet(rules) or not (old and old.on_device):
                busy.pop(name, None)
                continue
            busy.setdefault(name, now)
            if message is None and now >= busy[name] + rules.preempt:
                assert device.state(rules) is not State.TRAINING
    # The same events lead to the same instructions and the same worlds.
    again = World()
    for event, after, sent in history:
        assert step(again, event, rules) == sent and again == after
