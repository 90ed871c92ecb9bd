"""Telemetry of every strategy's steps: counts for the status, an event log, and Prometheus.

Runs in the scheduler process. Each step costs a few additions and one reading of the clock; sinks
are written once a second, and at a change of strategy. Imports nothing of SGLang.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Protocol

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.strategy.strategies import Strategy

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter

SECONDS = 1.0
"""Time between two summaries."""


@dataclass(slots=True)
class Tally:
    """The counts of one strategy; a step of a batch counts once for each request."""

    verify_steps: int = 0
    proposed: int = 0
    """Drafts; the token that they follow is not counted."""
    accepted: int = 0
    """Accepted drafts; the bonus token is not counted."""
    verified: int = 0
    """Tokens that the target computed."""
    sampled_verify_steps: int = 0
    """The part of `verify_steps` that is of requests sampled at a temperature."""
    sampled_accepted: int = 0
    """The part of `accepted` that is of such requests."""

    def add(
        self, strategy: Strategy, accepted: Sequence[int], sampled: Sequence[bool] = ()
    ) -> None:
        """Add a step with the accepted drafts of each request; `sampled` says which are sampled."""
        self.verify_steps += len(accepted)
        self.proposed += len(accepted) * (strategy.num_draft_tokens - 1)
        self.accepted += sum(accepted)
        self.verified += len(accepted) * strategy.num_draft_tokens
        if sampled:
            self.sampled_verify_steps += sum(sampled)
            self.sampled_accepted += sum(itertools.compress(accepted, sampled))

    def since(self, before: Tally) -> dict[str, int]:
        """Return the counts since `before`."""
        return {name: value - getattr(before, name) for name, value in asdict(self).items()}


CountsByStrategy = Mapping[Strategy, Mapping[str, int]]
"""For each strategy, the fields of a Tally and their counts."""


class Sink(Protocol):
    """Receives changes of strategy and summaries."""

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """Note that steps are of `strategy` from now on."""

    def summary(self, seconds: float, counts: CountsByStrategy, running: int) -> None:
        """Note the counts of the last `seconds`, and the requests that are running."""

    def drafts_lost(self) -> None:
        """Note that an update of the weights has left no drafts that are accepted."""


class Telemetry:
    """The telemetry of one engine process."""

    def __init__(
        self,
        strategies: Sequence[Strategy],
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tallies = {strategy: Tally() for strategy in strategies}
        self.switches = 0
        self._sinks, self._clock = sinks, clock
        self._summarised = {strategy: Tally() for strategy in strategies}
        self._last = clock()

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """Count a change of strategy: the step that begins is of `strategy`."""
        self.switches += 1
        for sink in self._sinks:
            sink.switched(strategy, batch_size)

    def step(
        self, strategy: Strategy, accepted: Sequence[int], sampled: Sequence[bool] = ()
    ) -> None:
        """Count a step with the accepted drafts of each request; see `Tally.add`."""
        self.tallies[strategy].add(strategy, accepted, sampled)
        if self._sinks and self._clock() - self._last >= SECONDS:
            self._summarise(len(accepted))

    def drafts_lost(self) -> None:
        """Note that an update of the weights has left no drafts that are accepted."""
        for sink in self._sinks:
            sink.drafts_lost()

    def _summarise(self, running: int) -> None:
        now = self._clock()
        counts = {
            strategy: tally.since(self._summarised[strategy])
            for strategy, tally in self.tallies.items()
            if tally != self._summarised[strategy]
        }
        for sink in self._sinks:
            sink.summary(now - self._last, counts, running)
        self._summarised = {strategy: replace(tally) for strategy, tally in self.tallies.items()}
        self._last = now

    def report(self) -> dict[str, dict[str, int]]:
        """Return the tallies by strategy, for `GET /tlt/status`."""
        return {str(strategy): asdict(tally) for strategy, tally in self.tallies.items()}


class EventLog:
    """Appends JSON lines to a file, which several engines may share.

    A line is `{"event": "strategy_switch", "time": ..., "pid": ..., "strategy": name,
    "running_requests": n}` or, once a second, `{"event": "summary", ..., "seconds": ...,
    "strategies": {name: tally}}`; the time is in seconds since 1970. Requests are lines of
    `request_log`. A full disk ends the log, not the engine.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        """Open the file; raise EnvironmentProblem if it cannot be written."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
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
        """Add a line, which the next summary writes."""
        self.add("strategy_switch", strategy=str(strategy), running_requests=batch_size)

    def summary(self, seconds: float, counts: CountsByStrategy, running: int) -> None:
        """Add a line and write all lines that wait."""
        by_name = {str(strategy): dict(tally) for strategy, tally in counts.items()}
        self.add("summary", seconds=round(seconds, 3), running_requests=running, strategies=by_name)
        self.write()

    def drafts_lost(self) -> None:
        """Add a line, which the next summary writes."""
        self.add("drafts_lost")

    def add(self, event: str, **fields: object) -> None:
        """Add a line, which `write` writes; raise TypeError for fields that JSON does not have."""
        common = {"event": event, "time": round(self._clock(), 3), "pid": os.getpid()}
        self._lines.append(json.dumps(common | fields) + "\n")

    def write(self) -> None:
        """Write all lines that wait, or lose them where that is not possible."""
        text = "".join(self._lines).encode()
        try:
            os.write(self._file, text)
        except OSError:
            self.lost += len(self._lines)
        self._lines.clear()


class Metrics:
    """Counts `tlt_*` for SGLang's `GET /metrics`, where it is started with --enable-metrics.

    prometheus_client keeps the counters in files that the HTTP process adds up, as SGLang has set
    it up.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        import prometheus_client

        registry = registry or prometheus_client.REGISTRY

        def counter(name: str, description: str) -> Counter:
            return prometheus_client.Counter(
                f"tlt_{name}", description, ["strategy"], registry=registry
            )

        self._counters = {
            "verify_steps": counter(
                "verify_steps", "Verify steps, one for each request of a batch."
            ),
            "proposed": counter("proposed_tokens", "Drafts that were verified."),
            "accepted": counter("accepted_tokens", "Drafts that were accepted."),
            "verified": counter("verified_tokens", "Tokens that the target computed."),
            "sampled_verify_steps": counter(
                "sampled_verify_steps", "Verify steps of requests at a temperature."
            ),
            "sampled_accepted": counter(
                "sampled_accepted_tokens", "Drafts of such requests that were accepted."
            ),
        }
        self._switches = counter("strategy_switches", "Changes to this strategy.")
        self._lost = prometheus_client.Counter(
            "tlt_drafts_lost",
            "Updates of the weights after which no drafts were accepted.",
            registry=registry,
        )

    def switched(self, strategy: Strategy, batch_size: int) -> None:
        """Count a change of strategy."""
        self._switches.labels(str(strategy)).inc()

    def summary(self, seconds: float, counts: CountsByStrategy, running: int) -> None:
        """Add the counts of the last `seconds`."""
        for strategy, tally in counts.items():
            for name, value in tally.items():
                self._counters[name].labels(str(strategy)).inc(value)

    def drafts_lost(self) -> None:
        """Count it."""
        self._lost.inc()
