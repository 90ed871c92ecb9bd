"""An event log (`--tlt-events`) read back: what every strategy did in each second. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlt_sglang.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Second:
    """About a second of one engine."""

    time: float
    """Its end, in seconds since 1970."""
    seconds: float
    running: int
    rounds: dict[str, int]
    """Verify steps of each strategy, one for each request."""
    accepted: dict[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Committed by all strategies."""
        made = sum(self.rounds.values()) + sum(self.accepted.values())
        return made / self.seconds if self.seconds else 0.0

    def tokens(self, strategy: str) -> float:
        """A second, by one strategy."""
        made = self.rounds.get(strategy, 0) + self.accepted.get(strategy, 0)
        return made / self.seconds if self.seconds else 0.0

    @property
    def accept_length(self) -> float | None:
        """Tokens a round; None where nothing ran."""
        rounds = sum(self.rounds.values())
        return 1 + sum(self.accepted.values()) / rounds if rounds else None


@dataclass
class Events:
    """Of one or more engines."""

    engines: dict[int, list[Second]] = field(default_factory=dict)
    switches: Counter[str] = field(default_factory=Counter)
    """To each strategy."""
    skipped: int = 0
    """Lines that are none."""

    @property
    def strategies(self) -> list[str]:
        """All that ran, those that ran most first."""
        total: Counter[str] = Counter()
        for seconds in self.engines.values():
            for second in seconds:
                total.update(second.rounds)
        return [name for name, _ in total.most_common()]

    def totals(self) -> list[tuple[str, int, int, int]]:
        """(strategy, rounds, tokens, switches to it), those that ran most first."""
        found = []
        for name in self.strategies:
            rounds = sum(s.rounds.get(name, 0) for one in self.engines.values() for s in one)
            accepted = sum(s.accepted.get(name, 0) for one in self.engines.values() for s in one)
            found.append((name, rounds, rounds + accepted, self.switches[name]))
        return found


def read(path: Path) -> Events:
    """An event log; raises ConfigError if it cannot be read or holds nothing."""
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
    """Lines that cannot be read are counted and left out."""
    found = Events()
    for line in lines:
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            if told["event"] == "steps":
                found.engines.setdefault(int(told["engine"]), []).append(_second(told))
            elif told["event"] == "strategy":
                found.switches[str(told["strategy"])] += 1
        except (ValueError, KeyError, TypeError, AttributeError):
            found.skipped += 1
    return found


def _second(told: dict[str, Any]) -> Second:
    each = {str(name): tally for name, tally in told["strategies"].items()}
    return Second(
        float(told["time"]),
        float(told["seconds"]),
        int(told["running"]),
        {name: int(tally["rounds"]) for name, tally in each.items()},
        {name: int(tally["accepted"]) for name, tally in each.items()},
    )


def training(path: Path) -> Sequence[dict[str, Any]]:
    """The lines of a store's training.jsonl; () where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    found = []
    for line in lines:
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
