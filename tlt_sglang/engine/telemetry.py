"""What became of every strategy's steps: counts for the status, an event log, and Prometheus.

Runs in the scheduler process. Each step costs some additions and a look at the clock; what is
written is written once a second, and at a change of strategy. Imports nothing of SGLang.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.strategy.strategies import Strategy

SECONDS = 1.0
"""Between two summaries."""


@dataclass(slots=True)
class Tally:
    """Of a strategy; a request of a batch at a time."""

    rounds: int = 0
    """Verify steps."""
    proposed: int = 0
    """Drafts; the token they follow is not one."""
    accepted: int = 0
    verified: int = 0
    """Tokens that the target computed for it."""

    def add(self, strategy: Strategy, accepted: Sequence[int]) -> None:
        """A step, with the drafts accepted for each request."""
        self.rounds += len(accepted)
        self.proposed += len(accepted) * (strategy.num_draft_tokens - 1)
        self.accepted += sum(accepted)
        self.verified += len(accepted) * strategy.num_draft_tokens

    def since(self, before: Tally) -> dict[str, int]:
        """What came since `before`."""
        return {name: value - getattr(before, name) for name, value in asdict(self).items()}


class Sink(Protocol):
    """Takes what happens."""

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """From now on steps are of `strategy`."""

    def summary(self, seconds: float, news: dict[Strategy, dict[str, int]], now: int) -> None:
        """What each strategy did in these seconds, and how many requests run now."""


class Telemetry:
    """Of one engine process."""

    def __init__(
        self,
        strategies: Sequence[Strategy],
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tallies = {arm: Tally() for arm in strategies}
        self.switches = 0
        self._sinks, self._clock = sinks, clock
        self._told = {arm: Tally() for arm in strategies}
        self._last = clock()

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """A step of another strategy than the one before begins."""
        self.switches += 1
        for sink in self._sinks:
            sink.switched(strategy, batch_size)

    def step(self, strategy: Strategy, accepted: Sequence[int]) -> None:
        """Drafts accepted for each request in a step."""
        self.tallies[strategy].add(strategy, accepted)
        if self._sinks and self._clock() - self._last >= SECONDS:
            self._summarise(len(accepted))

    def _summarise(self, running: int) -> None:
        now = self._clock()
        news = {
            arm: tally.since(self._told[arm])
            for arm, tally in self.tallies.items()
            if tally != self._told[arm]
        }
        for sink in self._sinks:
            sink.summary(now - self._last, news, running)
        self._told = {arm: replace(tally) for arm, tally in self.tallies.items()}
        self._last = now

    def report(self) -> dict[str, dict[str, int]]:
        """The tallies, for `GET /tlt/status`."""
        return {str(arm): asdict(tally) for arm, tally in self.tallies.items()}


class EventLog:
    """A file of JSON lines, appended to; several engines may share it.

    `{"event": "strategy", "time": ..., "engine": pid, "strategy": name, "running": requests}` and,
    once a second, `{"event": "steps", ..., "seconds": ..., "strategies": {name: tally}}`; the time
    is in seconds since 1970. A disk that is full ends the log, not the engine.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        """Raises EnvironmentProblem if the file cannot be written."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise EnvironmentProblem(
                f"The event log {path} cannot be written ({error.strerror}); give --tlt-events "
                "another file."
            ) from error
        self._clock = clock
        self._lines: list[str] = []
        self.lost = 0
        """Lines that could not be written."""

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """Kept until the next summary."""
        self._add("strategy", strategy=str(strategy), running=batch_size)

    def summary(self, seconds: float, news: dict[Strategy, dict[str, int]], now: int) -> None:
        """Write what there is."""
        told = {str(arm): tally for arm, tally in news.items()}
        self._add("steps", seconds=round(seconds, 3), running=now, strategies=told)
        text = "".join(self._lines).encode()
        try:
            os.write(self._file, text)
        except OSError:
            self.lost += len(self._lines)
        self._lines.clear()

    def _add(self, event: str, **fields: Any) -> None:
        told = {"event": event, "time": round(self._clock(), 3), "engine": os.getpid()} | fields
        self._lines.append(json.dumps(told) + "\n")


class Metrics:
    """Counters `tlt_*` for SGLang's `GET /metrics`, where it is started with --enable-metrics.

    prometheus_client keeps them in files that the HTTP process adds up, as SGLang has set it up.
    """

    def __init__(self, registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter

        registry = registry or REGISTRY

        def counter(name: str, what: str) -> Any:
            return Counter(f"tlt_{name}", what, ["strategy"], registry=registry)

        self._counters = {
            "rounds": counter("rounds", "Verify steps, one for each request of a batch."),
            "proposed": counter("proposed_tokens", "Drafts."),
            "accepted": counter("accepted_tokens", "Drafts that were accepted."),
            "verified": counter("verified_tokens", "Tokens that the target computed."),
        }
        self._switches = counter("switches", "Changes to this strategy.")

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """Count it."""
        self._switches.labels(str(strategy)).inc()

    def summary(self, seconds: float, news: dict[Strategy, dict[str, int]], now: int) -> None:
        """Add what came."""
        for arm, tally in news.items():
            for name, value in tally.items():
                self._counters[name].labels(str(arm)).inc(value)
