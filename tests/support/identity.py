"""Is a greedy output the same as without speculation? The reference, and what counts as a tie."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.servers import Server, Servers

LENGTH = 128
"""Tokens of each reference output."""
PINNED = "eagle:3x1x4"
POOL = "off,eagle:3x1x4,eagle:1x1x2,eagle:3x4x8,ngram:4"
"""Of one server, on which PINNED is pinned where a test asks for it: it saves a start."""
TIE = 1e-4
"""Two logits nearer than this are the same number, rounded along two ways."""


def each(strategies: Sequence[str]) -> pytest.MarkDecorator:
    """A test for each strategy, on the fixture `server`."""
    parameters = [pytest.param(name, marks=pytest.mark.server(name)) for name in strategies]
    return pytest.mark.parametrize("strategy", parameters)


@dataclass(frozen=True)
class Tie:
    """A position where another token was chosen because two had the same logit."""

    prompt: int
    position: int
    tokens: tuple[int, int]
    gap: float


class Reference:
    """Outputs of the `off` server, and the gap below each token.

    Made eight at a time; that one at a time gives the same is a test of its own.
    """

    def __init__(self, servers: Servers, prompts: Sequence[list[int]]) -> None:
        self.servers = servers
        self.prompts = list(prompts)
        self.outputs: list[list[int]] = []
        self.gaps: list[list[float]] = []
        wanted = {"return_logprob": True, "top_logprobs_num": 2}
        started = time.monotonic()
        off = self.off()
        for answer in off.generate_all(prompts, max_new_tokens=LENGTH, options=wanted):
            self.outputs.append(answer["output_ids"])
            best = answer["meta_info"]["output_top_logprobs"]
            self.gaps.append([first[0] - second[0] for first, second in best])
        self.seconds = time.monotonic() - started

    def off(self) -> Server:
        """The server without speculation."""
        return self.servers.get("off")

    def texts(self) -> list[tuple[list[int], list[int]]]:
        """Pairs of prompt and output."""
        return list(zip(self.prompts, self.outputs, strict=True))

    def compare(self, prompt: int, got: Sequence[int], length: int = LENGTH) -> Tie | None:
        """None if `got` is the first `length` tokens of the reference, or else the tie it left at.

        Raises AssertionError where it differs and the two tokens are no tie.
        """
        wanted = self.outputs[prompt][:length]
        if list(got) == wanted:
            return None  # without the `off` server, which may have to be started
        tie = difference(self.off(), self.prompts[prompt], wanted, got)
        if tie is None:
            return None
        position, tokens, gap = tie
        return Tie(prompt, position, tokens, gap)


def difference(
    off: Server, prompt: Sequence[int], wanted: Sequence[int], got: Sequence[int], **sampling: Any
) -> tuple[int, tuple[int, int], float] | None:
    """None if two outputs are the same; else the first position, the two tokens, and their gap.

    Raises AssertionError if that was no tie, and if one output is the beginning of the other.
    """
    if list(wanted) == list(got):
        return None
    pairs = enumerate(zip(wanted, got, strict=False))
    found = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), None)
    assert found is not None, f"{len(got)} tokens and not {len(wanted)}"
    position, tokens = found
    gap = rescore(off, [*prompt, *wanted[:position]], tokens)
    assert gap < TIE, f"at {position}: {tokens[1]} and not {tokens[0]}, {gap:.5f} below it"
    return position, tokens, gap


def rescore(off: Server, ids: Sequence[int], tokens: tuple[int, int]) -> float:
    """How far apart the logits of two tokens are after `ids`, by a prefill of all of them."""
    off.wait_until_idle()
    off.post("/flush_cache")
    wanted = {"return_logprob": True, "token_ids_logprob": list(tokens)}
    answer = off.generate(ids, 1, options=wanted)
    scores = {t: score for score, t, _ in answer["meta_info"]["output_token_ids_logprobs"][0]}
    return float(abs(scores[tokens[0]] - scores[tokens[1]]))
