"""The coordinator: pure decisions as values, then real sockets, processes and faults."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from tlt_sglang.coordinator import messages
from tlt_sglang.coordinator.client import Client
from tlt_sglang.coordinator.commands import main
from tlt_sglang.coordinator.endpoints import make_keys
from tlt_sglang.coordinator.messages import (
    Freed,
    Hello,
    Kill,
    Load,
    Signal,
    Start,
    Stop,
    Training,
)
from tlt_sglang.coordinator.server import Server
from tlt_sglang.coordinator.states import Event, due, step
from tlt_sglang.coordinator.status import query_status
from tlt_sglang.coordinator.transition import Outgoing
from tlt_sglang.coordinator.world import Rules, State, World
from tlt_sglang.errors import ConfigError

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


# --- decisions


def test_training_starts_when_the_engine_was_idle_for_the_dwell_time() -> None:
    play = Play()
    play.engine()
    play.trainer()
    assert play.state() is State.BUSY, "nothing is known yet"
    assert play.wait(9) == []
    play.say("e-cpu:0", BUSY)
    assert play.wait(9) == [] and play.state() is State.BUSY
    play.say("e-cpu:0", IDLE)
    assert play.wait(0.4) == [] and play.state() is State.IDLE
    assert due(play.world) == pytest.approx(play.now + 0.1)
    assert play.wait(0.1) == [Outgoing("t-cpu:0", Start(1))] and play.state() is State.TRAINING


def test_a_gap_between_two_requests_does_not_count_as_idle() -> None:
    play = Play()
    play.engine()
    play.trainer()
    for _ in range(20):
        play.say("e-cpu:0", IDLE)
        assert play.wait(0.4) == []
        play.say("e-cpu:0", Load(1, 0, 9.0))
        assert play.wait(0.1) == []


@pytest.mark.parametrize("work", [Load(1, 0, 0.0), Load(0, 1, 0.0), BUSY])
def test_training_stops_as_soon_as_the_engine_reports_work(work: Load) -> None:
    play = training()
    assert play.say("e-cpu:0", work) == [Outgoing("t-cpu:0", Stop(2, 500, False))]
    assert play.state() is State.TRAINING, "until it is confirmed"
    play.now += 0.05
    assert play.say("t-cpu:0", Training(2, False)) == []
    assert play.state() is State.BUSY
    assert play.world.stop_times[0] == pytest.approx(0.05) and play.world.late == 0


def test_below_the_threshold_an_engine_drains_and_its_device_is_trained_on() -> None:
    play = training(Rules(threshold=2))
    assert play.say("e-cpu:0", Load(2, 0, 9.0)) == []
    assert isinstance(play.say("e-cpu:0", Load(2, 1, 9.0))[0].message, Stop)
    play.say("t-cpu:0", Training(2, False))
    play.say("e-cpu:0", Load(2, 0, 9.0))
    assert play.state() is State.DRAINING
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(3))]


def test_a_late_trainer_is_counted_and_killed_until_it_confirms() -> None:
    play = training()
    play.stack()
    play.say("e-cpu:0", BUSY)
    assert play.wait(0.49) == []
    kill = Kill(2, "t-cpu:0", "cpu:0")
    for _ in range(3):
        assert play.wait(0.5) == [Outgoing("t-cpu:0", kill), Outgoing("rl", kill)]
        assert play.world.late == 1 and play.state() is State.BUSY
    play.say("e-cpu:0", IDLE)
    play.wait(0.3)
    assert play.state() is State.IDLE and not play.world.devices["cpu:0"].on_device
    play.say("t-cpu:0", Training(2, False))
    assert play.wait(9) == [Outgoing("t-cpu:0", Start(3))]


def test_a_rollout_that_begins_stops_training_before_a_request_arrives() -> None:
    play = training()
    play.stack()
    assert play.say("rl", Signal("rollout_begins")) == [Outgoing("t-cpu:0", Stop(2, 500, False))]
    play.say("t-cpu:0", Training(2, False))
    play.say("e-cpu:0", IDLE)
    assert play.wait(60) == [] and play.state() is State.BUSY, "work is awaited"
    play.say("e-cpu:0", BUSY)
    play.say("e-cpu:0", IDLE)
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(3))], (
        "its share is done; the rollout goes on"
    )


def test_a_rollout_that_ends_frees_an_engine_that_got_no_share() -> None:
    play = training()
    play.stack()
    play.say("rl", Signal("rollout_begins"))
    play.say("t-cpu:0", Training(2, False))
    play.say("rl", Signal("rollout_ends"))
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(3))]


def test_the_first_of_two_replicas_to_finish_trains_while_the_other_decodes_its_tail() -> None:
    play = Play()
    for device in ("cpu:0", "cpu:1"):
        play.engine(device)
        play.trainer(device)
        play.say(f"e-{device}", BUSY)
    play.say("e-cpu:0", IDLE)
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(1))]
    assert (play.state("cpu:0"), play.state("cpu:1")) == (State.TRAINING, State.BUSY)
    play.say("e-cpu:1", IDLE)
    assert play.wait(0.5) == [Outgoing("t-cpu:1", Start(2))]
    assert play.say("e-cpu:0", BUSY) == [Outgoing("t-cpu:0", Stop(3, 500, False))]


def test_a_claimed_device_is_freed_of_training_and_of_its_memory() -> None:
    play = training()
    play.stack()
    assert play.say("rl", Signal("claim_device", "cpu:0")) == [
        Outgoing("t-cpu:0", Stop(2, 500, True))
    ]
    assert play.say("t-cpu:0", Training(2, False)) == [Outgoing("rl", Freed("cpu:0"))]
    assert play.wait(60) == [] and play.state() is State.AWAY
    play.say("rl", Signal("release_device", "cpu:0"))
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(3))]


def test_a_trainer_that_has_stopped_or_is_about_to_frees_its_memory_too() -> None:
    play = training()
    play.say("e-cpu:0", BUSY)
    play.now += 0.4
    assert play.say("e-cpu:0", Signal("claim_device")) == [Outgoing("t-cpu:0", Stop(3, 100, True))]
    assert play.say("t-cpu:0", Training(3, False)) == [Outgoing("e-cpu:0", Freed("cpu:0"))]

    play = training()
    play.say("e-cpu:0", BUSY)
    play.say("t-cpu:0", Training(2, False))
    assert play.say("e-cpu:0", Signal("claim_device")) == [Outgoing("t-cpu:0", Stop(3, 500, True))]
    assert play.say("e-cpu:0", Signal("release_device")) == []
    assert play.say("t-cpu:0", Training(3, False)) == []


def test_a_signal_for_all_devices_holds_for_those_that_join_later() -> None:
    play = Play()
    play.stack()
    play.say("rl", Signal("claim_device"))
    play.engine()
    play.trainer()
    play.say("e-cpu:0", IDLE)
    play.say("t-cpu:0", Training(1, False))
    assert play.wait(9) == [] and play.state() is State.AWAY
    play.say("rl", Signal("release_device"))
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(2))]


@pytest.mark.parametrize("end", ["silence", "bye"])
def test_a_trainer_stops_when_its_engine_leaves(end: str) -> None:
    play = training()
    if end == "bye":
        sent = play.say("e-cpu:0", messages.Bye())
    else:
        play.now += 4.9
        assert play.say("t-cpu:0", Training(1, True)) == []
        sent = play.silence(0.1)
    assert sent == [Outgoing("t-cpu:0", Stop(2, 500, False))]
    play.say("t-cpu:0", Training(2, False))
    play.engine(name="another")
    play.say("another", IDLE)
    assert play.wait(0.5) == [Outgoing("t-cpu:0", Start(3))]


def test_a_silent_member_is_removed_and_is_unknown_when_it_returns() -> None:
    play = training()
    play.silence(5)
    assert not play.world.members and not play.world.devices
    assert play.say("t-cpu:0", Training(1, True)) == [Outgoing("t-cpu:0", messages.Unknown())]


def test_a_name_and_a_device_are_taken_once() -> None:
    play = training()
    for peer, hello, words in (
        ("x", Hello("e-cpu:0", "engine", "cpu:7"), "is taken"),
        ("x", Hello("another", "engine", "cpu:0"), "has one engine already"),
        ("x", Hello("another", "trainer", "cpu:0"), "has one trainer already"),
        ("x", Hello("another", "engine"), "must name their device"),
        ("x", Hello("another", "stack", "cpu:0"), "a stack must not"),
    ):
        (sent,) = play.say(peer, hello)
        assert isinstance(sent.message, messages.Refused) and words in sent.message.reason
    assert set(play.world.members) == {"e-cpu:0", "t-cpu:0"}
    assert play.wait(1) == [], "nobody is disturbed"


def test_a_lost_command_is_repeated() -> None:
    play = training()
    assert play.say("t-cpu:0", Training(0, False)) == [Outgoing("t-cpu:0", Start(1))]
    play.say("e-cpu:0", BUSY)
    play.now += 0.1
    assert play.say("t-cpu:0", Training(1, True)) == [Outgoing("t-cpu:0", Stop(2, 400, False))]


def test_a_trainer_that_ends_by_itself_is_started_again_after_the_dwell_time() -> None:
    play = training()
    assert play.say("t-cpu:0", Training(1, False)) == []
    assert play.state() is State.IDLE and play.wait(0.4) == []
    assert play.wait(0.1) == [Outgoing("t-cpu:0", Start(2))]


@pytest.mark.parametrize("idle", [True, False])
def test_a_new_coordinator_adopts_a_trainer_at_work_only_where_the_engine_is_idle(
    idle: bool,
) -> None:
    play = Play()
    play.engine()
    play.say("e-cpu:0", IDLE if idle else BUSY)
    sent = play.trainer(active=True)
    assert sent == ([] if idle else [Outgoing("t-cpu:0", Stop(1, 500, False))])
    assert play.state() is State.TRAINING


def test_a_server_that_was_held_up_reads_all_messages_before_it_applies_timeouts() -> None:
    play = training()
    play.say("e-cpu:0", BUSY)
    play.now += 60
    play.say("e-cpu:0", BUSY)
    play.say("t-cpu:0", Training(2, False))
    assert play.silence(0) == []
    assert len(play.world.members) == 2 and play.world.late == 0


def test_time_that_runs_backwards_counts_as_no_time() -> None:
    play = training()
    play.now -= 3600
    assert play.wait() == [] and play.state() is State.TRAINING
    assert play.say("e-cpu:0", BUSY) == [Outgoing("t-cpu:0", Stop(2, 500, False))]


def python_calls(action: Callable[[], object]) -> int:
    """Return the number of functions that `action` calls, those written in C included."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
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


# --- decisions, whatever happens

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


# --- messages


def test_every_message_survives_encoding() -> None:
    for message in (
        Hello("e", "engine", "cpu:0-1"),
        Load(1, 2, 3.5),
        Training(7, True),
        messages.Ping(),
        Signal("claim_device", "cpu:0"),
        messages.Bye(),
        messages.StatusRequest(),
    ):
        assert messages.decode_member_message(messages.encode(message)) == message
    for reply in (
        messages.Welcome("x", 5.0),
        messages.Refused("no"),
        messages.Unknown(),
        messages.Pong(),
        Start(1),
        Stop(2, 500, True),
        Kill(2, "t", "cpu:0"),
        Freed("cpu:0"),
        messages.Status({"cpu:0": "IDLE"}, {"t": "trainer"}, 1.0, 0, 0, [1.5]),
    ):
        assert messages.decode_coordinator_message(messages.encode(reply)) == reply


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


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_message_decodes_to_none(data: bytes) -> None:
    assert messages.decode_member_message(data) is None


def test_no_bytes_make_the_decoders_raise() -> None:
    dice = random.Random(0)
    good = messages.encode(Hello("engine", "engine", "cpu:0"))
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        for read in (messages.decode_member_message, messages.decode_coordinator_message):
            read(bytes(bad[: dice.randint(0, len(bad))]))


# --- sockets


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder with a short path (107 bytes at most) that has to be empty at the end."""
    monkeypatch.setattr("tlt_sglang.coordinator.client.RETRY_SECONDS", 0.05)
    monkeypatch.setattr("tlt_sglang.coordinator.server.MAX_WAIT_SECONDS", 0.02)
    with tempfile.TemporaryDirectory(prefix="tlt", dir="/tmp") as made:
        before = {thread.ident for thread in threading.enumerate()}
        yield Path(made)
        leftovers = [path for path in Path(made).rglob("*") if ".key" not in path.name]
        assert not leftovers
        assert {thread.ident for thread in threading.enumerate()} == before


@contextmanager
def serving(endpoint: str, rules: Rules = FAST, key: Path | None = None) -> Iterator[Server]:
    made, stop = Server(endpoint, rules, key), threading.Event()
    thread = threading.Thread(target=made.run, args=(stop,))
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()


Join = Callable[..., Client]


@pytest.fixture
def join(folder: Path) -> Iterator[Join]:
    """Yield a function that joins the coordinator in `folder`; all members leave at the end."""
    with ExitStack() as stack:

        def joined(
            name: str, role: messages.Role, device: str | None = None, **more: Any
        ) -> Client:
            client = Client(f"ipc://{folder}/c", name, role, device, **more)
            stack.callback(client.close)
            return client

        yield joined


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def next_instruction(client: Client, *others: Client) -> messages.Instruction:
    """Return the next instruction of `client`; `others` poll meanwhile."""
    instructions: list[messages.Instruction] = []

    def fetched() -> bool:
        assert not any(other.poll() for other in others)
        instructions.extend(client.poll())
        return bool(instructions)

    until(fetched)
    (one,) = instructions
    return one


def settle(*clients: Client) -> None:
    until(
        lambda: not any(client.poll() for client in clients) and all(c.connected for c in clients)
    )


def test_an_engine_and_a_trainer_take_turns_over_ipc(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer, rl = (
        join("e", "engine", "cpu:0"),
        join("t", "trainer", "cpu:0"),
        join("rl", "stack"),
    )
    with serving(at):
        settle(engine, trainer, rl)
        latencies = []
        for _ in range(40):
            engine.report(0, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Start)
            began = time.perf_counter()
            engine.report(1, 0, 5.0)
            assert isinstance(next_instruction(trainer), Stop)
            latencies.append(1000 * (time.perf_counter() - began))
            trainer.confirm_stop()
        cuts = statistics.quantiles(latencies, n=100)
        print(f"preemption over ipc: p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms")
        assert cuts[98] < 1000 * FAST.preempt
        rl.tell("claim_device", "cpu:0")
        stop = next_instruction(trainer)
        assert isinstance(stop, Stop) and stop.release
        trainer.confirm_stop()
        assert next_instruction(rl) == Freed("cpu:0")
        status = query_status(at)
        assert status and status.states == {"cpu:0": "AWAY"} and len(status.stop_ms) == 40
        assert status.members == {"e": "engine", "t": "trainer", "rl": "stack"}
        assert (status.late, status.dropped, status.tokens_per_s) == (0, 0, 5.0)


def test_malformed_and_oversized_messages_are_dropped_and_counted(folder: Path) -> None:
    at = f"ipc://{folder}/c"
    with serving(at) as served, zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.set(zmq.LINGER, 0)
        raw.connect(at)
        for data in MALFORMED:
            raw.send(data)
        raw.send_multipart([b"two", b"frames"])
        until(lambda: served.dropped == len(MALFORMED) + 1)
        raw.send(b"x" * (messages.MAX_BYTES + 1))
        status = query_status(at)
        assert status and status.dropped == served.dropped


def test_a_name_that_is_taken_is_refused_until_its_owner_leaves(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    with serving(at):
        first, second = join("e", "engine", "a"), join("e", "engine", "b")
        settle(first)
        until(lambda: second.poll() or first.poll() or second.refusal)
        assert second.refusal and "taken" in second.refusal and not second.connected
        first.close()
        settle(second)
        assert second.refusal is None


def test_without_a_coordinator_no_call_waits_or_raises(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    slowest = 0.0
    for number in range(500):
        began = time.thread_time()
        engine.report(number, 0, float("nan"))
        engine.tell("rollout_begins")
        assert engine.poll() == [] and trainer.poll() == []
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 0.05 and not engine.connected
    with serving(at) as served:
        settle(engine, trainer)
        until(lambda: engine.poll() or served.world.devices["a"].reported)
        assert served.world.devices["a"].running == 499, "it tells the newest, not what was"


def test_a_trainer_without_a_coordinator_stops_and_resumes_later(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    with serving(at, Rules(dwell=0.002, timeout=0.4)):
        engine.report(0, 0, 0.0)
        settle(engine)
        assert isinstance(next_instruction(trainer), Start)
    assert next_instruction(trainer) == Stop(0, 0, True)
    trainer.confirm_stop()
    assert trainer.poll() == [] and not trainer.connected
    with serving(at):
        assert isinstance(next_instruction(trainer, engine), Start)


def test_clocks_that_jump_change_nothing(
    folder: Path, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = f"ipc://{folder}/c"
    offset = [0.0]
    monkeypatch.setattr(time, "time", lambda: random.uniform(0, 2e9))
    with serving(at) as served:
        engine = join("e", "engine", "a", clock=lambda: time.monotonic() + offset[0])
        trainer = join("t", "trainer", "a")
        for jump in (0.0, 3600.0, -7200.0, 3600.0):
            offset[0] += jump
            engine.report(0, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Start)
            engine.report(1, 0, 0.0)
            assert isinstance(next_instruction(trainer, engine), Stop)
            trainer.confirm_stop()
        assert served.world.late == 0


def test_members_rejoin_a_coordinator_that_was_killed_and_restarted(
    folder: Path, join: Join
) -> None:
    at = f"ipc://{folder}/c"
    command = [
        sys.executable,
        "-m",
        "tlt_sglang.cli",
        "coordinator",
        "--tlt-coordinator",
        at,
        "--tlt-coordinator-dwell-ms",
        "10",
        "--tlt-coordinator-timeout-ms",
        "1000",
    ]

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout and at in process.stdout.readline()
        return process

    process = start()
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    rl = join("rl", "stack")
    try:
        engine.report(0, 0, 0.0)
        settle(engine, rl)
        rl.tell("claim_device")
        assert isinstance(next_instruction(trainer, engine), Stop)
        trainer.confirm_stop()
        for _ in range(2):
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
            assert (folder / "c").is_socket(), "that is what a killed one leaves"
            process = start()
            # Members repeat their signals.
            until(lambda: (engine.poll(), rl.poll(), states(at) == {"a": "AWAY"})[-1])
            stop = next_instruction(trainer, engine)
            assert isinstance(stop, Stop) and stop.release
            trainer.confirm_stop()
        rl.tell("release_device")
        assert isinstance(next_instruction(trainer, engine), Start)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for number in range(1000):
            engine.report(number, 0, 0.0)
        assert time.monotonic() - began < 1, "a coordinator that hangs holds up nobody"
        process.send_signal(signal.SIGCONT)
        assert isinstance(next_instruction(trainer, engine), Stop)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        process.stdout.close()  # type: ignore[union-attr]


def states(at: str) -> dict[str, str]:
    status = query_status(at)
    return status.states if status else {}


def test_a_running_coordinator_keeps_its_address(folder: Path) -> None:
    at = f"ipc://{folder}/c"
    with serving(at), pytest.raises(ConfigError, match="already"):
        Server(at, FAST)
    (folder / "c").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        Server(at, FAST)
    assert (folder / "c").read_text() == "precious"
    (folder / "c").unlink()


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://x", "is not valid"),
        ("ipc://relative", "is not valid"),
        ("ipc://@abstract", "is not valid"),
        ("ipc:///tmp/c", "open to others"),
        ("ipc:///tmp/" + "x" * 107, "too long"),
        ("tcp://nowhere", "(is not valid|cannot listen)"),
    ],
)
def test_an_invalid_address_is_refused_with_a_reason(endpoint: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Server(endpoint, FAST)
    with pytest.raises(ConfigError, match=words):
        Client(endpoint, "e", "engine", "a")


def test_the_folder_of_the_socket_is_made_for_its_owner_alone(folder: Path) -> None:
    with serving(f"ipc://{folder}/sub/c"):
        assert (folder / "sub").stat().st_mode & 0o777 == 0o700
    (folder / "sub").rmdir()


def test_over_tcp_only_holders_of_the_key_take_part(folder: Path) -> None:
    public, secret = make_keys(folder / "keys")
    other, _ = make_keys(folder / "other.keys")
    assert {path.stat().st_mode & 0o777 for path in (public, secret)} == {0o600}
    with pytest.raises(ConfigError, match="needs the secret one"):
        Server("tcp://127.0.0.1:*", FAST, public)
    with pytest.raises(ConfigError, match="is not a key file"):
        Client("tcp://127.0.0.1:9", "e", "engine", "a", key=folder / "nothing")
    with serving("tcp://127.0.0.1:*", FAST, secret) as served:
        assert query_status(served.endpoint, public) is not None
        assert query_status(served.endpoint, wait=0.1) is None
        assert query_status(served.endpoint, other, wait=0.1) is None
    for path in (public.parent, other.parent):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_the_command_line_reports_errors_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0 and "--tlt-preempt-ms" in capsys.readouterr().out
    assert main(["--tlt-preempt-ms", "soon"]) == 2
    assert "is not a whole number" in capsys.readouterr().err
    at = f"ipc://{folder}/c"
    with serving(at):
        assert main(["--status", "--tlt-coordinator", at]) == 0
        assert "late stops 0" in capsys.readouterr().out
        assert main(["--tlt-coordinator", at]) == 1
        assert "listens at" in capsys.readouterr().err


def test_the_coordinator_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, tlt_sglang.coordinator.commands; "
        "sys.exit(bool({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
