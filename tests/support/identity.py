"""Compare greedy outputs with those of plain decoding, and recognise ties of two logits."""

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
"""Strategies of one server, which saves a start: tests pin PINNED on it."""
TIE = 1e-4
"""Two logits nearer than this are the same number, rounded in two orders of summation."""


def each(strategies: Sequence[str], quick: int = 100) -> pytest.MarkDecorator:
    """Run a test for each strategy, on the fixture `server`; all but the `quick` ones are long."""
    parameters = []
    for at, name in enumerate(strategies):
        marks = [pytest.mark.server(name), *([pytest.mark.long] if at >= quick else [])]
        parameters.append(pytest.param(name, marks=marks))
    return pytest.mark.parametrize("strategy", parameters)


@dataclass(frozen=True)
class Tie:
    """A position where another token was chosen because two had the same logit."""

    prompt: int
    position: int
    tokens: tuple[int, int]
    gap: float


class Reference:
    """Outputs of the `off` server, and the gap between the two best logits of each token.

    They are generated eight at a time; another test compares that with one at a time.
    """

    def __init__(self, servers: Servers, prompts: Sequence[list[int]]) -> None:
        self.servers = servers
        self.prompts = list(prompts)
        self.outputs: list[list[int]] = []
        self.gaps: list[list[float]] = []
        options = {"return_logprob": True, "top_logprobs_num": 2}
        started = time.monotonic()
        off = self.off()
        for answer in off.generate_all(prompts, max_new_tokens=LENGTH, options=options):
            self.outputs.append(answer["output_ids"])
            best = answer["meta_info"]["output_top_logprobs"]
            self.gaps.append([first[0] - second[0] for first, second in best])
        self.seconds = time.monotonic() - started

    def off(self) -> Server:
        """Return the server without speculation."""
        return self.servers.get("off")

    def texts(self) -> list[tuple[list[int], list[int]]]:
        """Return the pairs of prompt and output."""
        return list(zip(self.prompts, self.outputs, strict=True))

    def compare(self, prompt: int, got: Sequence[int], length: int = LENGTH) -> Tie | None:
        """Return None if `got` is the first `length` tokens of the reference, else the tie.

        Raises AssertionError if it differs elsewhere than at a tie.
        """
        expected = self.outputs[prompt][:length]
        if list(got) == expected:
            return None  # without the `off` server, which may have to be started
        tie = difference(self.off(), self.prompts[prompt], expected, got)
        if tie is None:
            return None
        position, tokens, gap = tie
        return Tie(prompt, position, tokens, gap)


def difference(
    off: Server, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int], **sampling: Any
) -> tuple[int, tuple[int, int], float] | None:
    """Return None if two outputs are equal, else the first position, the two tokens and their gap.

    Raises AssertionError if the gap is too large for a tie, or one output is a prefix of the other.
    """
    if list(expected) == list(got):
        return None
    pairs = enumerate(zip(expected, got, strict=False))
    first = next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), None)
    assert first is not None, f"{len(got)} tokens and not {len(expected)}"
    position, tokens = first
    gap = rescore(off, [*prompt, *expected[:position]], tokens)
    assert gap < TIE, f"at {position}: {tokens[1]} and not {tokens[0]}, {gap:.5f} below it"
    return position, tokens, gap


def rescore(off: Server, ids: Sequence[int], tokens: tuple[int, int]) -> float:
    """Return the gap between the logits of two tokens after `ids`, from a prefill of `ids`."""
    one, other = logprobs_of(off, ids, tokens)
    return abs(one - other)


def logprobs_of(off: Server, ids: Sequence[int], tokens: tuple[int, int]) -> tuple[float, float]:
    """Return the log-probabilities of two tokens after `ids`, from a prefill of `ids`."""
    off.wait_until_idle()
    off.post("/flush_cache")
    options = {"return_logprob": True, "token_ids_logprob": list(tokens)}
    answer = off.generate(ids, 1, options=options)
    scores = {t: score for score, t, _ in answer["meta_info"]["output_token_ids_logprobs"][0]}
    return scores[tokens[0]], scores[tokens[1]]
