"""Event logs (`--tlt-events`) read back: the counts of every strategy for each second.

Runs in `tlt report`. It reads files and draws nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlt_sglang.errors import ConfigError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """One summary of one engine: about a second."""

    time: float
    """Its end, in seconds since 1970."""
    seconds: float
    running: int
    """Requests that were running at its end."""
    verify_steps: dict[str, int]
    """Verify steps by strategy, one for each request of a batch."""
    accepted: dict[str, int]
    """Accepted drafts by strategy."""

    @property
    def tokens_per_s(self) -> float:
        """Committed tokens a second of all strategies."""
        tokens = sum(self.verify_steps.values()) + sum(self.accepted.values())
        return tokens / self.seconds if self.seconds else 0.0

    def tokens_per_s_of(self, strategy: str) -> float:
        """Return the committed tokens a second of one strategy."""
        tokens = self.verify_steps.get(strategy, 0) + self.accepted.get(strategy, 0)
        return tokens / self.seconds if self.seconds else 0.0

    @property
    def accept_length(self) -> float | None:
        """Committed tokens per verify step; None where nothing ran."""
        steps = sum(self.verify_steps.values())
        return 1 + sum(self.accepted.values()) / steps if steps else None


@dataclass(frozen=True, slots=True)
class StrategyTotal:
    """The counts of one strategy over a whole log."""

    strategy: str
    verify_steps: int
    tokens: int
    switches: int
    """Changes to this strategy."""


@dataclass
class Events:
    """The events of one or more engines."""

    engines: dict[int, list[Interval]] = field(default_factory=dict)
    """Summaries by process id."""
    switches: Counter[str] = field(default_factory=Counter)
    """Changes to each strategy."""
    skipped: int = 0
    """Lines that could not be read."""

    @property
    def strategies(self) -> list[str]:
        """All strategies that ran, those with the most verify steps first."""
        steps: Counter[str] = Counter()
        for intervals in self.engines.values():
            for interval in intervals:
                steps.update(interval.verify_steps)
        return [name for name, _ in steps.most_common()]

    def totals(self) -> list[StrategyTotal]:
        """Return the totals of every strategy, those with the most verify steps first."""
        intervals = [interval for each in self.engines.values() for interval in each]
        totals = []
        for name in self.strategies:
            steps = sum(interval.verify_steps.get(name, 0) for interval in intervals)
            accepted = sum(interval.accepted.get(name, 0) for interval in intervals)
            totals.append(StrategyTotal(name, steps, steps + accepted, self.switches[name]))
        return totals


def read(path: Path) -> Events:
    """Return the events of a log; raise ConfigError if it cannot be read or has no steps."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(
            f"The event log {path} cannot be read ({error.strerror}); name the file that a server "
            "was given with --tlt-events."
        ) from error
    events = parse(lines)
    if not events.engines:
        raise ConfigError(
            f"The event log {path} holds no steps; let the server answer something first."
        )
    return events


def parse(lines: Iterable[str]) -> Events:
    """Return the events of a log's lines; those that cannot be read are counted and left out."""
    events = Events()
    for line in lines:
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if event["event"] == "summary":
                events.engines.setdefault(int(event["pid"]), []).append(_interval(event))
            elif event["event"] == "strategy_switch":
                events.switches[str(event["strategy"])] += 1
        except (ValueError, KeyError, TypeError, AttributeError):
            events.skipped += 1
    return events


def _interval(event: Json) -> Interval:
    tallies = {str(name): tally for name, tally in event["strategies"].items()}
    return Interval(
        float(event["time"]),
        float(event["seconds"]),
        int(event["running_requests"]),
        {name: int(tally["verify_steps"]) for name, tally in tallies.items()},
        {name: int(tally["accepted"]) for name, tally in tallies.items()},
    )


def training(path: Path) -> Sequence[Json]:
    """Return the lines of a store's training.jsonl; none if the file does not exist."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    gates = []
    for line in lines:
        try:
            gates.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return gates
