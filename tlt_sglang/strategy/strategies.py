"""Strategies and their notation: `eagle:4x4x16`, `eagle3:3x1x4`, `ngram:8`, `off`.

Pure: parses and formats strings. It neither chooses a strategy nor runs one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tlt_sglang.errors import ConfigError

DrafterName = Literal["off", "ngram", "eagle", "eagle3"]

SYNTAX = "eagle:STEPSxTOPKxTOKENS, eagle3:STEPSxTOPKxTOKENS, ngram:TOKENS or off"
MAX_TOKENS = 64

_EAGLE = re.compile(r"(eagle3?):([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})")
_NGRAM = re.compile(r"ngram:([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to decode a step: who drafts, how deep, how wide, how much is verified."""

    drafter: DrafterName
    num_steps: int = 0
    """Draft depth; 0 for `off` and `ngram` (whose depth the index decides)."""
    topk: int = 1
    """Branches kept at each depth."""
    num_draft_tokens: int = 1
    """Tokens of a request that the target verifies in a step, the last committed one included."""

    def __str__(self) -> str:
        if self.drafter == "off":
            return "off"
        if self.drafter == "ngram":
            return f"ngram:{self.num_draft_tokens}"
        return f"{self.drafter}:{self.num_steps}x{self.topk}x{self.num_draft_tokens}"


TRUSTED_MATCH = 4
"""Shortest suffix match, in tokens, whose continuation a chain verifies instead of the learned
drafter's tokens."""


def uses_match(strategy: Strategy, match_length: int) -> bool:
    """Return whether a request with this suffix match length is drafted from the n-gram index."""
    if strategy.drafter == "ngram":
        return match_length > 0
    return strategy.num_steps > 0 and strategy.topk == 1 and match_length >= TRUSTED_MATCH


def depth_of(strategy: Strategy) -> int:
    """Return the largest number of drafts that can be accepted in one step."""
    if strategy.drafter == "ngram":
        return strategy.num_draft_tokens - 1
    return strategy.num_steps


def envelope(pool: Sequence[Strategy]) -> Strategy:
    """Return a strategy as large as each of `pool`, which has one learned drafter at most."""
    if len(pool) == 1:
        return pool[0]
    learned = [strategy for strategy in pool if strategy.drafter in ("eagle", "eagle3")]
    # N-grams are verified as a chain, so that their depth is that of a chain as wide.
    depth = max(depth_of(strategy) for strategy in pool)
    tokens = max(strategy.num_draft_tokens for strategy in pool)
    return Strategy(learned[0].drafter, depth, max(strategy.topk for strategy in pool), tokens)


def parse(text: str) -> Strategy:
    """Return the strategy that `text` names.

    Raises ConfigError with the accepted syntax, or with the bound that a number breaks.
    """
    text = text.strip().lower()
    if text == "off":
        return Strategy("off")
    if match := _NGRAM.fullmatch(text):
        tokens = int(match[1])
        _check(text, 2 <= tokens <= MAX_TOKENS, f"TOKENS must be 2 to {MAX_TOKENS}")
        return Strategy("ngram", num_draft_tokens=tokens)
    if match := _EAGLE.fullmatch(text):
        steps, topk, tokens = int(match[2]), int(match[3]), int(match[4])
        _check(text, 1 <= steps <= 16, "STEPS must be 1 to 16")
        _check(text, 1 <= topk <= 16, "TOPK must be 1 to 16")
        _check(text, 2 <= tokens <= MAX_TOKENS, f"TOKENS must be 2 to {MAX_TOKENS}")
        if topk == 1:
            _check(text, tokens == steps + 1, f"a chain of {steps} verifies {steps + 1} tokens")
        else:
            nodes = topk + (steps - 1) * topk * topk
            _check(text, tokens - 1 <= nodes, f"such a tree has only {nodes} nodes")
        drafter: DrafterName = "eagle3" if match[1] == "eagle3" else "eagle"
        return Strategy(drafter, steps, topk, tokens)
    raise ConfigError(f"Unknown strategy {text!r}; write {SYNTAX}.")


def _check(text: str, holds: bool, reason: str) -> None:
    if not holds:
        raise ConfigError(f"Strategy {text!r} is not possible: {reason}.")
