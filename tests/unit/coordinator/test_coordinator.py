"""The coordinator: who trains when. Decisions are pure; sockets, processes and faults are real."""

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

from tlt_sglang.coordinator import messages as say
from tlt_sglang.coordinator.client import Client, ask
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
from tlt_sglang.coordinator.states import Event, Sent, due, step
from tlt_sglang.coordinator.world import Rules, State, World
from tlt_sglang.errors import ConfigError

RULES = Rules()
FAST = Rules(dwell=0.002, preempt=1.0, timeout=2.0)
BUSY, IDLE = Load(3, 2, 50.0), Load(0, 0, 0.0)


class Play:
    """A world, and the hand that moves its time. Peers are named as the members are."""

    def __init__(self, rules: Rules = RULES) -> None:
        self.rules, self.world, self.now = rules, World(), 100.0
        self.events: list[Event] = []

    def say(self, peer: str, said: say.Said) -> list[Sent]:
        return self._step(Event(self.now, peer, said))

    def wait(self, seconds: float = 0.0) -> list[Sent]:
        """Time passes; everybody who is a member shows a sign of life first."""
        self.now += seconds
        for peer in list(self.world.members):
            self.say(peer, say.Ping())
        return self._step(Event(self.now))

    def silence(self, seconds: float) -> list[Sent]:
        self.now += seconds
        return self._step(Event(self.now))

    def engine(self, device: str = "cpu:0", name: str = "") -> list[Sent]:
        return self.say(name or f"e-{device}", Hello(name or f"e-{device}", "engine", device))

    def trainer(self, device: str = "cpu:0", active: bool = False) -> list[Sent]:
        return self.say(f"t-{device}", Hello(f"t-{device}", "trainer", device, active))

    def stack(self) -> None:
        self.say("rl", Hello("rl", "stack"))

    def state(self, device: str = "cpu:0") -> State:
        return self.world.devices[device].state(self.rules)

    def _step(self, event: Event) -> list[Sent]:
        self.events.append(event)
        self.world, sent = step(self.world, event, self.rules)
        return [one for one in sent if not isinstance(one.told, (say.Pong, say.Welcome))]


def training(rules: Rules = RULES) -> Play:
    """One engine that is idle, and a trainer at work under order 1."""
    play = Play(rules)
    play.engine()
    play.trainer()
    play.say("e-cpu:0", IDLE)
    assert play.wait(rules.dwell) == [Sent("t-cpu:0", Start(1))]
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
    assert due(play.world, RULES) == pytest.approx(play.now + 0.1)
    assert play.wait(0.1) == [Sent("t-cpu:0", Start(1))] and play.state() is State.TRAINING


def test_a_gap_between_two_requests_is_no_idle_time() -> None:
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
    assert play.say("e-cpu:0", work) == [Sent("t-cpu:0", Stop(2, 500, False))]
    assert play.state() is State.TRAINING, "until it is confirmed"
    play.now += 0.05
    assert play.say("t-cpu:0", Training(2, False)) == []
    assert play.state() is State.BUSY
    assert play.world.stops[0] == pytest.approx(0.05) and play.world.late == 0


def test_below_the_threshold_an_engine_drains_and_its_device_is_trained_on() -> None:
    play = training(Rules(threshold=2))
    assert play.say("e-cpu:0", Load(2, 0, 9.0)) == []
    assert isinstance(play.say("e-cpu:0", Load(2, 1, 9.0))[0].told, Stop)
    play.say("t-cpu:0", Training(2, False))
    play.say("e-cpu:0", Load(2, 0, 9.0))
    assert play.state() is State.DRAINING
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(3))]


def test_a_trainer_that_is_late_is_counted_and_killed_until_it_is_gone() -> None:
    play = training()
    play.stack()
    play.say("e-cpu:0", BUSY)
    assert play.wait(0.49) == []
    kill = Kill(2, "t-cpu:0", "cpu:0")
    for _ in range(3):
        assert play.wait(0.5) == [Sent("t-cpu:0", kill), Sent("rl", kill)]
        assert play.world.late == 1 and play.state() is State.BUSY
    play.say("e-cpu:0", IDLE)
    play.wait(0.3)
    assert play.state() is State.IDLE and not play.world.devices["cpu:0"].on_device
    play.say("t-cpu:0", Training(2, False))
    assert play.wait(9) == [Sent("t-cpu:0", Start(3))]


def test_a_rollout_that_begins_stops_training_before_a_request_arrives() -> None:
    play = training()
    play.stack()
    assert play.say("rl", Signal("rollout_begins")) == [Sent("t-cpu:0", Stop(2, 500, False))]
    play.say("t-cpu:0", Training(2, False))
    play.say("e-cpu:0", IDLE)
    assert play.wait(60) == [] and play.state() is State.BUSY, "work is awaited"
    play.say("e-cpu:0", BUSY)
    play.say("e-cpu:0", IDLE)
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(3))], "its share is done; the rollout goes on"


def test_a_rollout_that_ends_frees_an_engine_that_got_no_share() -> None:
    play = training()
    play.stack()
    play.say("rl", Signal("rollout_begins"))
    play.say("t-cpu:0", Training(2, False))
    play.say("rl", Signal("rollout_ends"))
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(3))]


def test_of_two_replicas_the_first_that_is_done_trains_while_the_other_decodes_its_tail() -> None:
    play = Play()
    for device in ("cpu:0", "cpu:1"):
        play.engine(device)
        play.trainer(device)
        play.say(f"e-{device}", BUSY)
    play.say("e-cpu:0", IDLE)
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(1))]
    assert (play.state("cpu:0"), play.state("cpu:1")) == (State.TRAINING, State.BUSY)
    play.say("e-cpu:1", IDLE)
    assert play.wait(0.5) == [Sent("t-cpu:1", Start(2))]
    assert play.say("e-cpu:0", BUSY) == [Sent("t-cpu:0", Stop(3, 500, False))]


def test_a_wanted_device_is_freed_of_training_and_of_its_memory() -> None:
    play = training()
    play.stack()
    assert play.say("rl", Signal("device_wanted", "cpu:0")) == [Sent("t-cpu:0", Stop(2, 500, True))]
    assert play.say("t-cpu:0", Training(2, False)) == [Sent("rl", Freed("cpu:0"))]
    assert play.wait(60) == [] and play.state() is State.AWAY
    play.say("rl", Signal("device_free", "cpu:0"))
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(3))]


def test_memory_is_wanted_back_also_from_a_trainer_that_has_stopped_or_is_about_to() -> None:
    play = training()
    play.say("e-cpu:0", BUSY)
    play.now += 0.4
    assert play.say("e-cpu:0", Signal("device_wanted")) == [Sent("t-cpu:0", Stop(3, 100, True))]
    assert play.say("t-cpu:0", Training(3, False)) == [Sent("e-cpu:0", Freed("cpu:0"))]

    play = training()
    play.say("e-cpu:0", BUSY)
    play.say("t-cpu:0", Training(2, False))
    assert play.say("e-cpu:0", Signal("device_wanted")) == [Sent("t-cpu:0", Stop(3, 500, True))]
    assert play.say("e-cpu:0", Signal("device_free")) == []
    assert play.say("t-cpu:0", Training(3, False)) == []


def test_what_is_said_of_all_devices_holds_for_those_that_join_later() -> None:
    play = Play()
    play.stack()
    play.say("rl", Signal("device_wanted"))
    play.engine()
    play.trainer()
    play.say("e-cpu:0", IDLE)
    play.say("t-cpu:0", Training(1, False))
    assert play.wait(9) == [] and play.state() is State.AWAY
    play.say("rl", Signal("device_free"))
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(2))]


@pytest.mark.parametrize("end", ["silence", "bye"])
def test_a_trainer_whose_engine_is_gone_stops(end: str) -> None:
    play = training()
    if end == "bye":
        sent = play.say("e-cpu:0", say.Bye())
    else:
        play.now += 4.9
        assert play.say("t-cpu:0", Training(1, True)) == []
        sent = play.silence(0.1)
    assert sent == [Sent("t-cpu:0", Stop(2, 500, False))]
    play.say("t-cpu:0", Training(2, False))
    play.engine(name="another")
    play.say("another", IDLE)
    assert play.wait(0.5) == [Sent("t-cpu:0", Start(3))]


def test_a_silent_member_is_forgotten_and_asked_for_its_name_when_it_is_back() -> None:
    play = training()
    play.silence(5)
    assert not play.world.members and not play.world.devices
    assert play.say("t-cpu:0", Training(1, True)) == [Sent("t-cpu:0", say.Unknown())]


def test_a_name_and_a_device_are_taken_once() -> None:
    play = training()
    for peer, hello, words in (
        ("x", Hello("e-cpu:0", "engine", "cpu:7"), "is taken"),
        ("x", Hello("another", "engine", "cpu:0"), "has one engine already"),
        ("x", Hello("another", "trainer", "cpu:0"), "has one trainer already"),
        ("x", Hello("another", "engine"), "name their device"),
        ("x", Hello("another", "stack", "cpu:0"), "a stack none"),
    ):
        (sent,) = play.say(peer, hello)
        assert isinstance(sent.told, say.Refused) and words in sent.told.reason
    assert set(play.world.members) == {"e-cpu:0", "t-cpu:0"}
    assert play.wait(1) == [], "nobody is disturbed"


def test_an_order_that_was_lost_is_repeated() -> None:
    play = training()
    assert play.say("t-cpu:0", Training(0, False)) == [Sent("t-cpu:0", Start(1))]
    play.say("e-cpu:0", BUSY)
    play.now += 0.1
    assert play.say("t-cpu:0", Training(1, True)) == [Sent("t-cpu:0", Stop(2, 400, False))]


def test_a_trainer_may_end_by_itself_and_is_asked_again_after_the_dwell_time() -> None:
    play = training()
    assert play.say("t-cpu:0", Training(1, False)) == []
    assert play.state() is State.IDLE and play.wait(0.4) == []
    assert play.wait(0.1) == [Sent("t-cpu:0", Start(2))]


@pytest.mark.parametrize("idle", [True, False])
def test_a_new_coordinator_adopts_a_trainer_at_work_only_where_the_engine_is_idle(
    idle: bool,
) -> None:
    play = Play()
    play.engine()
    play.say("e-cpu:0", IDLE if idle else BUSY)
    sent = play.trainer(active=True)
    assert sent == ([] if idle else [Sent("t-cpu:0", Stop(1, 500, False))])
    assert play.state() is State.TRAINING


def test_a_server_that_was_held_up_hears_everybody_before_it_blames_anybody() -> None:
    play = training()
    play.say("e-cpu:0", BUSY)
    play.now += 60
    play.say("e-cpu:0", BUSY)
    play.say("t-cpu:0", Training(2, False))
    assert play.silence(0) == []
    assert len(play.world.members) == 2 and play.world.late == 0


def test_time_that_runs_backwards_is_taken_for_no_time() -> None:
    play = training()
    play.now -= 3600
    assert play.wait() == [] and play.state() is State.TRAINING
    assert play.say("e-cpu:0", BUSY) == [Sent("t-cpu:0", Stop(2, 500, False))]


# --- decisions, whatever happens

DEVICES = ("cpu:0", "cpu:1")
PEERS = [f"{role}-{device}" for role in ("engine", "trainer") for device in DEVICES] + ["stack-x"]


def anything(dice: random.Random, world: World, peer: str) -> say.Said:
    """Mostly what a member would say, sometimes what it should not."""
    role, _, device = peer.partition("-")
    odd = dice.random()
    if peer not in world.members or odd < 0.03:
        name = dice.choice(PEERS) if odd < 0.02 else peer
        return Hello(name, role, None if role == "stack" else device, odd > 0.9)  # type: ignore[arg-type]
    if odd < 0.06:
        return say.Bye()
    if odd < 0.1:
        role = dice.choice(("engine", "trainer", "stack"))
    if role == "engine":
        return dice.choice((IDLE, IDLE, IDLE, Load(1, 0, 1.0), BUSY))
    if role == "stack":
        what = dice.choice(say.What.__args__)  # type: ignore[attr-defined]
        return dice.choice((say.Ping(), Signal(what, dice.choice((None, *DEVICES)))))
    at = world.devices.get(device)
    order = at.order if at and dice.random() < 0.8 else dice.randint(0, 9)
    return Training(order, dice.random() < 0.5)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_the_rules_hold(seed: int) -> None:
    dice = random.Random(seed)
    rules = Rules(dice.choice((0, 1)), dice.choice((0.0, 0.5)), 0.5, 3.0)
    world, now, history = World(), 0.0, []
    heard: dict[str, float] = {}
    begun: dict[str, int] = {}
    busy: dict[str, float] = {}
    for _ in range(400):
        now += dice.choice((0.0, 0.01, 0.1, 0.3)) if dice.random() < 0.99 else 3.0
        peer = dice.choice(PEERS)
        said = None if dice.random() < 0.3 else anything(dice, world, peer)
        event = Event(now, peer if said else "", said)
        before = world
        world, sent = step(before, event, rules)
        history.append((before, event, world, sent))
        if said:
            heard[peer] = now
        if isinstance(said, Training) and not said.active and said.order == begun.get(peer):
            del begun[peer]
        for one in sent:
            told = one.told
            # A member that is silent for too long gets no instruction.
            assert said or now < heard[one.peer] + rules.timeout
            if isinstance(told, say.Instruction):
                assert one.peer in world.members
            # Every start is followed by a stop before another start.
            if isinstance(told, Start) and told.order:
                assert begun.setdefault(one.peer, told.order) == told.order
            elif isinstance(told, (Stop, Kill)):
                begun.pop(one.peer, None)
        for gone in set(begun) - set(world.members):
            del begun[gone]
        # Nobody trains on beside an engine that has had work for longer than the deadline.
        for name in DEVICES:
            device, old = world.devices.get(name), before.devices.get(name)
            if device is None or device.quiet(rules) or not (old and old.on_device):
                busy.pop(name, None)
                continue
            busy.setdefault(name, now)
            if said is None and now >= busy[name] + rules.preempt:
                assert device.state(rules) is not State.TRAINING
    # The same events lead to the same instructions, and no world was changed behind its back.
    again = World()
    for before, event, after, sent in history:
        assert step(before, event, rules) == (after, sent)
        again, repeated = step(again, event, rules)
        assert repeated == sent


# --- messages


def test_every_message_survives_its_way() -> None:
    for said in (
        Hello("e", "engine", "cpu:0-1"),
        Load(1, 2, 3.5),
        Training(7, True),
        say.Ping(),
        Signal("device_wanted", "cpu:0"),
        say.Bye(),
        say.Ask(),
    ):
        assert say.said(say.encode(said)) == said
    for told in (
        say.Welcome("x", 5.0),
        say.Refused("no"),
        say.Unknown(),
        say.Pong(),
        Start(1),
        Stop(2, 500, True),
        Kill(2, "t", "cpu:0"),
        Freed("cpu:0"),
        say.Status({"cpu:0": "IDLE"}, {"t": "trainer"}, 1.0, 0, 0, [1.5]),
    ):
        assert say.told(say.encode(told)) == told


MALFORMED = [
    b"",
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"null",
    b"{}",
    b'{"type":"shutdown"}',
    b'{"type":"start","order":1}',
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
    b'{"type":"signal","what":"explode"}',
]


@pytest.mark.parametrize("data", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_message_is_nothing(data: bytes) -> None:
    assert say.said(data) is None


def test_no_bytes_at_all_raise_an_error() -> None:
    dice = random.Random(0)
    good = say.encode(Hello("engine", "engine", "cpu:0"))
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(dice.randint(1, 4)):
            bad[dice.randrange(len(bad))] = dice.randrange(256)
        for read in (say.said, say.told):
            read(bytes(bad[: dice.randint(0, len(bad))]))


# --- sockets


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short path (a socket's may have 107 bytes), in which nothing may be left."""
    monkeypatch.setattr("tlt_sglang.coordinator.client.RETRY", 0.05)
    monkeypatch.setattr("tlt_sglang.coordinator.server.LONGEST", 0.02)
    with tempfile.TemporaryDirectory(prefix="tlt", dir="/tmp") as made:
        before = {thread.ident for thread in threading.enumerate()}
        yield Path(made)
        left = [path for path in Path(made).rglob("*") if ".key" not in path.name]
        assert not left
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
    """Clients of the coordinator in `folder`; they leave when the test ends, whatever happens."""
    with ExitStack() as stack:

        def joined(name: str, role: say.Role, device: str | None = None, **more: Any) -> Client:
            client = Client(f"ipc://{folder}/c", name, role, device, **more)
            stack.callback(client.close)
            return client

        yield joined


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def told(client: Client, *others: Client) -> say.Instruction:
    """Its next instruction; `others` show signs of life meanwhile."""
    found: list[say.Instruction] = []

    def fetched() -> bool:
        assert not any(other.poll() for other in others)
        found.extend(client.poll())
        return bool(found)

    until(fetched)
    (one,) = found
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
            assert isinstance(told(trainer, engine), Start)
            began = time.perf_counter()
            engine.report(1, 0, 5.0)
            assert isinstance(told(trainer), Stop)
            latencies.append(1000 * (time.perf_counter() - began))
            trainer.stopped()
        cuts = statistics.quantiles(latencies, n=100)
        print(f"preemption over ipc: p50 {cuts[49]:.2f} ms, p99 {cuts[98]:.2f} ms")
        assert cuts[98] < 1000 * FAST.preempt
        rl.tell("device_wanted", "cpu:0")
        asked = told(trainer)
        assert isinstance(asked, Stop) and asked.release
        trainer.stopped()
        assert told(rl) == Freed("cpu:0")
        status = ask(at)
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
        raw.send(b"x" * (say.MOST_BYTES + 1))
        status = ask(at)
        assert status and status.dropped == served.dropped


def test_a_name_that_is_taken_is_refused_until_its_owner_leaves(folder: Path, join: Join) -> None:
    at = f"ipc://{folder}/c"
    with serving(at):
        first, second = join("e", "engine", "a"), join("e", "engine", "b")
        settle(first)
        until(lambda: second.poll() or first.poll() or second.refused)
        assert second.refused and "taken" in second.refused and not second.connected
        first.close()
        settle(second)
        assert second.refused is None


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


def test_a_trainer_that_hears_nothing_stops_by_itself_and_goes_on_later(
    folder: Path, join: Join
) -> None:
    at = f"ipc://{folder}/c"
    engine, trainer = join("e", "engine", "a"), join("t", "trainer", "a")
    with serving(at, Rules(dwell=0.002, timeout=0.4)):
        engine.report(0, 0, 0.0)
        settle(engine)
        assert isinstance(told(trainer), Start)
    assert told(trainer) == Stop(0, 0, True)
    trainer.stopped()
    assert trainer.poll() == [] and not trainer.connected
    with serving(at):
        assert isinstance(told(trainer, engine), Start)


def test_clocks_that_jump_change_nothing(
    folder: Path, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = f"ipc://{folder}/c"
    ahead = [0.0]
    monkeypatch.setattr(time, "time", lambda: random.uniform(0, 2e9))
    with serving(at) as served:
        engine = join("e", "engine", "a", clock=lambda: time.monotonic() + ahead[0])
        trainer = join("t", "trainer", "a")
        for jump in (0.0, 3600.0, -7200.0, 3600.0):
            ahead[0] += jump
            engine.report(0, 0, 0.0)
            assert isinstance(told(trainer, engine), Start)
            engine.report(1, 0, 0.0)
            assert isinstance(told(trainer, engine), Stop)
            trainer.stopped()
        assert served.world.late == 0


def test_a_killed_coordinator_starts_again_and_everybody_reports_again(
    folder: Path, join: Join
) -> None:
    at = f"ipc://{folder}/c"
    command = [
        sys.executable,
        "-m",
        "tlt_sglang.cli",
        "coordinator",
        "--endpoint",
        at,
        "--dwell-ms",
        "10",
        "--timeout-ms",
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
        rl.tell("device_wanted")
        assert isinstance(told(trainer, engine), Stop)
        trainer.stopped()
        for _ in range(2):
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
            assert (folder / "c").is_socket(), "that is what a killed one leaves"
            process = start()
            # What was said is said again.
            until(lambda: (engine.poll(), rl.poll(), states(at) == {"a": "AWAY"})[-1])
            asked = told(trainer, engine)
            assert isinstance(asked, Stop) and asked.release
            trainer.stopped()
        rl.tell("device_free")
        assert isinstance(told(trainer, engine), Start)
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for number in range(1000):
            engine.report(number, 0, 0.0)
        assert time.monotonic() - began < 1, "a coordinator that hangs holds up nobody"
        process.send_signal(signal.SIGCONT)
        assert isinstance(told(trainer, engine), Stop)
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
        process.stdout.close()  # type: ignore[union-attr]


def states(at: str) -> dict[str, str]:
    status = ask(at)
    return status.states if status else {}


def test_a_live_coordinator_is_not_robbed_of_its_address(folder: Path) -> None:
    at = f"ipc://{folder}/c"
    with serving(at), pytest.raises(ConfigError, match="already"):
        Server(at, FAST)
    (folder / "c").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        Server(at, FAST)
    assert (folder / "c").read_text() == "precious"
    (folder / "c").unlink()


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("http://x", "is not possible"),
        ("ipc://relative", "is not possible"),
        ("ipc://@abstract", "is not possible"),
        ("ipc:///tmp/c", "open to others"),
        ("ipc:///tmp/" + "x" * 107, "too long"),
        ("tcp://nowhere", "(is not possible|cannot listen)"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_words(endpoint: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Server(endpoint, FAST)
    with pytest.raises(ConfigError, match=words):
        Client(endpoint, "e", "engine", "a")


def test_the_folder_of_the_socket_is_made_for_its_owner_alone(folder: Path) -> None:
    with serving(f"ipc://{folder}/sub/c"):
        assert (folder / "sub").stat().st_mode & 0o777 == 0o700
    (folder / "sub").rmdir()


def test_over_tcp_only_who_has_the_key_takes_part(folder: Path) -> None:
    public, secret = make_keys(folder / "keys")
    other, _ = make_keys(folder / "other.keys")
    assert {path.stat().st_mode & 0o777 for path in (public, secret)} == {0o600}
    with pytest.raises(ConfigError, match="needs the secret one"):
        Server("tcp://127.0.0.1:*", FAST, public)
    with pytest.raises(ConfigError, match="is no key"):
        Client("tcp://127.0.0.1:9", "e", "engine", "a", key=folder / "nothing")
    with serving("tcp://127.0.0.1:*", FAST, secret) as served:
        assert ask(served.endpoint, public) is not None
        assert ask(served.endpoint, wait=0.1) is None
        assert ask(served.endpoint, other, wait=0.1) is None
    for path in (public.parent, other.parent):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_the_command_line_says_in_a_sentence_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--help"]) == 0 and "--tlt-preempt-ms" in capsys.readouterr().out
    assert main(["--tlt-preempt-ms", "soon"]) == 2
    assert "no whole number" in capsys.readouterr().err
    at = f"ipc://{folder}/c"
    with serving(at):
        assert main(["--status", "--endpoint", at]) == 0
        assert "late stops 0" in capsys.readouterr().out
        assert main(["--endpoint", at]) == 1
        assert "runs at" in capsys.readouterr().err


def test_taking_part_loads_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, tlt_sglang.coordinator.commands; "
        "sys.exit(bool({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
