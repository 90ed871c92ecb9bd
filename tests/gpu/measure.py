"""Timed decoding: tokens per second, milliseconds of a step, and accept length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.prompts import Prompt
from benchmarks.harness.server import Server
from tests.gpu.session import Line

PLAIN = "plain"
ADAPTIVE = "adaptive"
"""The policy chooses."""


@dataclass(frozen=True)
class Timing:
    """The decoding of a batch that stays whole."""

    tokens_per_s: float
    requests: int
    accept_length: float | None
    """None where nobody counts accepted drafts."""

    def as_json(self) -> dict[str, float]:
        """Return the fields and the milliseconds of a step, rounded."""
        figures = {"tokens_per_s": round(self.tokens_per_s, 1)}
        if self.accept_length is None:
            return figures
        step_ms = 1000 * self.requests * self.accept_length / self.tokens_per_s
        more = {"step_ms": round(step_ms, 3), "accept_length": round(self.accept_length, 3)}
        return figures | more


def decode(
    server: Server,
    prompts: Sequence[Prompt],
    tokens: int,
    repetitions: int,
    counted: bool = True,
) -> Timing:
    """Return the fastest of `repetitions` decodings of `tokens` tokens for each prompt.

    `counted` is False for a server that drafts without TLT, which counts no accepted drafts.
    """
    timings = [_decode_once(server, prompts, tokens) for _ in range(repetitions)]
    best = max(timings, key=lambda timing: timing.tokens_per_s)
    return best if counted else dataclasses.replace(best, accept_length=None)


def _decode_once(server: Server, prompts: Sequence[Prompt], tokens: int) -> Timing:
    before = counts(server)
    sample = server.generate(prompts, tokens, full_batch=True)
    steps, accepted = (now - then for now, then in zip(counts(server), before, strict=True))
    accept_length = 1 + accepted / steps if steps else 1.0
    return Timing(sample.tokens / sample.seconds, len(prompts), accept_length)


def counts(server: Server) -> tuple[int, int]:
    """Return the verify steps and accepted drafts of all requests so far; zeros without TLT."""
    status = server.scheduler()
    tallies = list((status or {}).get("strategies", {}).values())
    return sum(t["verify_steps"] for t in tallies), sum(t["accepted"] for t in tallies)


def pinned(server: Server, strategy: str) -> None:
    """Let the server use one strategy, or what its policy chooses."""
    server.pin(None if strategy == ADAPTIVE else strategy)


def equal_share(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Line:
    """Return how many answers are equal, and the first different position of the others."""
    first = [
        next(
            (i for i, (a, b) in enumerate(zip(*pair, strict=False)) if a != b), min(map(len, pair))
        )
        for pair in zip(one, other, strict=True)
        if list(pair[0]) != list(pair[1])
    ]
    return {"equal": len(one) - len(first), "of": len(one), "first_differences": first[:16]}
