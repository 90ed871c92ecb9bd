"""Telemetry: the counts, and what the event log, the trace and Prometheus get of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tlt_sglang.config.settings import Config
from tlt_sglang.engine.telemetry import EventLog, Metrics, Sink, Telemetry
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.strategy import policies
from tlt_sglang.strategy.policy import Observation
from tlt_sglang.strategy.strategies import Strategy, parse
from tlt_sglang.strategy.trace import TracedPolicy, replay

OFF, CHAIN, TREE = Strategy("off"), parse("eagle:3x1x4"), parse("eagle:3x4x8")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def two_seconds(*sinks: Sink) -> Telemetry:
    """Return the telemetry of two seconds: a chain, then plain decoding, then a tree."""
    clock = Clock()
    telemetry = Telemetry([OFF, CHAIN, TREE], sinks, clock)
    telemetry.switched(CHAIN, 2)
    telemetry.step(CHAIN, [3, 1], [False, True])
    clock.now += 0.5
    telemetry.step(CHAIN, [0, 0])
    clock.now += 0.6
    telemetry.step(OFF, [0])
    telemetry.switched(TREE, 1)
    telemetry.step(TREE, [2])
    clock.now += 1
    telemetry.step(TREE, [0])
    return telemetry


def test_tallies_follow_the_width_of_each_strategy() -> None:
    report = two_seconds().report()
    greedy = {"sampled_verify_steps": 0, "sampled_accepted": 0}
    assert report["off"] == greedy | {
        "verify_steps": 1,
        "proposed": 0,
        "accepted": 0,
        "verified": 1,
    }
    assert report["eagle:3x1x4"] == {
        "verify_steps": 4,
        "proposed": 12,
        "accepted": 4,
        "verified": 16,
        "sampled_verify_steps": 1,
        "sampled_accepted": 1,
    }
    assert report["eagle:3x4x8"] == greedy | {
        "verify_steps": 2,
        "proposed": 14,
        "accepted": 2,
        "verified": 16,
    }


def test_the_event_log_has_changes_and_seconds(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "of another engine"}\n')
    two_seconds(EventLog(str(path), Clock()))
    events = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert [event["event"] for event in events] == [
        "strategy_switch",
        "summary",
        "strategy_switch",
        "summary",
    ]
    EventLog(str(tmp_path / "new.jsonl"))  # requests in it are nobody else's business
    assert (tmp_path / "new.jsonl").stat().st_mode & 0o077 == 0
    assert {event["pid"] for event in events} == {os.getpid()}
    assert events[0]["strategy"] == "eagle:3x1x4"
    assert events[0]["running_requests"] == 2
    assert events[1]["seconds"] == 1.1
    assert events[1]["strategies"]["eagle:3x1x4"]["accepted"] == 4
    assert events[1]["strategies"]["off"]["verify_steps"] == 1
    assert set(events[3]["strategies"]) == {"eagle:3x4x8"}


def test_an_event_log_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot be written .*give --tlt-events another"):
        EventLog(str(tmp_path / "no folder" / "events"))


def test_a_full_disk_ends_the_log_only() -> None:
    log = EventLog("/dev/full")
    two_seconds(log)
    assert log.lost == 4


def test_prometheus_counts_the_same() -> None:
    registry = CollectorRegistry()
    two_seconds(Metrics(registry))
    text = generate_latest(registry).decode()
    assert 'tlt_accepted_tokens_total{strategy="eagle:3x1x4"} 4.0' in text
    assert 'tlt_sampled_accepted_tokens_total{strategy="eagle:3x1x4"} 1.0' in text
    assert 'tlt_verified_tokens_total{strategy="eagle:3x4x8"} 16.0' in text
    assert 'tlt_strategy_switches_total{strategy="eagle:3x4x8"} 1.0' in text
    assert "tlt_drafts_lost_total 0.0" in text


def test_drafts_that_are_lost_reach_every_sink(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    log = EventLog(str(tmp_path / "events"))
    Telemetry([OFF], [log, Metrics(registry)]).drafts_lost()
    log.write()
    assert json.loads((tmp_path / "events").read_text())["event"] == "drafts_lost"
    assert "tlt_drafts_lost_total 1.0" in generate_latest(registry).decode()


@pytest.mark.parametrize("name", ["cost-model", "beg-mab", "ema", "random"])
def test_a_trace_replays_to_the_same_choices(name: str) -> None:
    config = Config(policy=name)  # type: ignore[arg-type]
    pool = [OFF, CHAIN, parse("eagle:1x1x2")]
    lines: list[str] = []
    policy = TracedPolicy(policies.make(config, pool), lines.append)
    for step in range(300):
        size = 1 + step * 7 % 13
        strategy = policy.choose(size)
        drafts = strategy.num_draft_tokens - 1
        accepted = [(step * 31 + row * 17) % 5 % (drafts + 1) for row in range(size)]
        policy.observe(Observation(strategy, size, accepted, 0.01 + 0.001 * (step % 7) * drafts))
    choices = list(replay(policies.make(config, pool), [*lines, '["choose", 3']))
    assert len(choices) == 300
    assert all(then == now for then, now in choices)
    assert len({then for then, _ in choices}) > 1


def test_other_lines_are_not_a_trace() -> None:
    policy = policies.make(Config(policy="fixed"), [OFF])
    for line in ("{}\n", '["choose"]\n', '["dance", 1]\n', "no json\n"):
        with pytest.raises(ValueError, match="not a line of a policy trace"):
            list(replay(policy, [line]))
