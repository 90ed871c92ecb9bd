"""Traffic for `bench_adaptive_drafter`: prompts sampled at temperature 1, as an RL rollout does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.adaptive_drafter.processes import AT_ONCE, CHAIN, NGRAM, Engine
from benchmarks.harness.program import BenchmarkError, say
from benchmarks.harness.prompts import Prompt
from benchmarks.harness.server import ANSWER_SECONDS, NO_COUNTS, SchedulerStatus


@dataclass
class Point:
    """The counts of one batch of traffic."""

    seconds: float
    """Seconds since the traffic began."""
    tokens_per_s: float
    accept_length: float
    """Accept length over all strategies."""
    chain: float | None
    """Accept length of the learned chain, if it ran."""
    ngram: float | None
    """Accept length of n-grams, if they ran."""
    version: int
    strategy: str


class Traffic:
    """Batches of prompts, one after another."""

    def __init__(
        self, engine: Engine, prompts: Sequence[Prompt], tokens: int, seed: int = 0
    ) -> None:
        self.engine, self.prompts, self.tokens = engine, list(prompts), tokens
        self.points: list[Point] = []
        self._next = seed
        self._began = time.monotonic()

    def batch(self) -> None:
        """Generate the answers to one batch."""
        rows = [self.prompts[(self._next + i) % len(self.prompts)] for i in range(AT_ONCE)]
        self._next += AT_ONCE
        body = {
            "input_ids": rows,
            "sampling_params": {
                "temperature": 1.0,
                "max_new_tokens": self.tokens,
                "ignore_eos": True,
            },
        }
        before, started = self.engine.status(), time.monotonic()
        self.engine.send("/generate", body, ANSWER_SECONDS)
        seconds = time.monotonic() - started
        self.points.append(
            point_of(before, self.engine.status(), seconds, self.tokens, self._began)
        )

    def run(self, seconds: float) -> None:
        """Generate batches for this time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.batch()

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Generate batches in a thread while the body runs."""
        over = threading.Event()
        problems: list[BaseException] = []

        def work() -> None:
            try:
                while not over.is_set():
                    self.batch()
            except BaseException as error:  # raised again in the thread that waits
                problems.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if problems:
            raise BenchmarkError(f"The traffic broke off: {problems[0]}")

    def report(self) -> None:
        """Print a line of progress."""
        last = self.points[-1]
        say(
            f"{last.seconds:.0f} s: {last.tokens_per_s:.1f} tokens/s, accept length "
            f"{last.accept_length:.2f}, version {last.version}, {last.strategy}"
        )


def point_of(
    before: SchedulerStatus, after: SchedulerStatus, seconds: float, tokens: int, began: float
) -> Point:
    """Return the point of a batch between two statuses of the scheduler."""

    def gained(name: str) -> tuple[int, int]:
        old = before["strategies"].get(name, NO_COUNTS)
        new = after["strategies"].get(name, NO_COUNTS)
        return new["verify_steps"] - old["verify_steps"], new["accepted"] - old["accepted"]

    each = {name: gained(name) for name in after["strategies"]}
    verify_steps = sum(count for count, _ in each.values())
    accepted = sum(count for _, count in each.values())

    def length(name: str) -> float | None:
        count, hits = each.get(name, (0, 0))
        return 1 + hits / count if count else None

    return Point(
        time.monotonic() - began,
        AT_ONCE * tokens / seconds,
        1 + accepted / max(1, verify_steps),
        length(CHAIN),
        length(NGRAM),
        after["drafter_version"],
        after["strategy"],
    )
