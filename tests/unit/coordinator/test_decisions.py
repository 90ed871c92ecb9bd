"""The coordinator's decisions: what follows from which event."""

from __future__ import annotations

import pytest

from tests.support.coordination import BUSY, IDLE, Play, training
from tlt_sglang.coordinator import messages
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
from tlt_sglang.coordinator.states import due
from tlt_sglang.coordinator.transition import Outgoing
from tlt_sglang.coordinator.world import Rules, State


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
