"""Strategies and how they are written: `eagle:4x4x16`, `eagle3:3x1x4`, `ngram:8`, `off`.

Pure: strings in, values out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tlt_sglang.errors import ConfigError

Drafter = Literal["off", "ngram", "eagle", "eagle3"]

SYNTAX = "eagle:STEPSxTOPKxTOKENS, eagle3:STEPSxTOPKxTOKENS, ngram:TOKENS or off"
MAX_TOKENS = 64

_EAGLE = re.compile(r"(eagle3?):([0-9]{1,6})x([0-9]{1,6})x([0-9]{1,6})")
_NGRAM = re.compile(r"ngram:([0-9]{1,6})")


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to decode a step: who drafts, how deep, how wide, how much is verified."""

    drafter: Drafter
    num_steps: int = 0
    """Draft depth; 0 for `off` and `ngram` (whose depth the corpus decides)."""
    topk: int = 1
    """Branches kept at each depth."""
    num_draft_tokens: int = 1
    """Tokens the target verifies per step, the last committed one among them."""

    def __str__(self) -> str:
        if self.drafter == "off":
            return "off"
        if self.drafter == "ngram":
            return f"ngram:{self.num_draft_tokens}"
        return f"{self.drafter}:{self.num_steps}x{self.topk}x{self.num_draft_tokens}"


TRUSTED_ENDING = 4
"""Tokens of an ending that was there before from which on chains draft what followed it, and not
what the learned drafter says."""


def repeats(strategy: Strategy, ending: int) -> bool:
    """Whether a request whose ending is so long is drafted what followed it before."""
    if strategy.drafter == "ngram":
        return ending > 0
    return strategy.num_steps > 0 and strategy.topk == 1 and ending >= TRUSTED_ENDING


def envelope(pool: Sequence[Strategy]) -> Strategy:
    """A strategy as large as each of `pool`, which has one drafter besides `off` and `ngram`."""
    if len(pool) == 1:
        return pool[0]
    learned = [arm for arm in pool if arm.drafter in ("eagle", "eagle3")]
    # N-grams are verified as a chain.
    depths = (arm.num_draft_tokens - 1 if arm.drafter == "ngram" else arm.num_steps for arm in pool)
    tokens = max(arm.num_draft_tokens for arm in pool)
    return Strategy(learned[0].drafter, max(depths), max(arm.topk for arm in pool), tokens)


def parse(text: str) -> Strategy:
    """The strategy that `text` names.

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
        drafter: Drafter = "eagle3" if match[1] == "eagle3" else "eagle"
        return Strategy(drafter, steps, topk, tokens)
    raise ConfigError(f"Unknown strategy {text!r}; write {SYNTAX}.")


def _check(text: str, holds: bool, reason: str) -> None:
    if not holds:
        raise ConfigError(f"Strategy {text!r} is not possible: {reason}.")
