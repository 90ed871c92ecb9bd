"""The notation of strategies: what it accepts, and the error for anything else."""

from __future__ import annotations

import pytest

from tlt_sglang.errors import ConfigError
from tlt_sglang.strategy.strategies import MAX_TOKENS, SYNTAX, Strategy, parse


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("off", Strategy("off")),
        ("ngram:8", Strategy("ngram", num_draft_tokens=8)),
        ("ngram:2", Strategy("ngram", num_draft_tokens=2)),
        ("eagle:3x1x4", Strategy("eagle", 3, 1, 4)),
        ("eagle:3x4x8", Strategy("eagle", 3, 4, 8)),
        ("eagle:1x1x2", Strategy("eagle", 1, 1, 2)),
        ("eagle:16x16x64", Strategy("eagle", 16, 16, 64)),
        ("eagle3:5x8x32", Strategy("eagle3", 5, 8, 32)),
    ],
)
def test_parsing_and_formatting_are_inverse(text: str, strategy: Strategy) -> None:
    assert parse(text) == strategy
    assert str(strategy) == text


@pytest.mark.parametrize("text", ["  ngram:8\n", "NGRAM:8", "ngram:08"])
def test_case_space_and_leading_zeros_do_not_matter(text: str) -> None:
    assert parse(text) == Strategy("ngram", num_draft_tokens=8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "on",
        "eagle",
        "eagle:",
        "eagle:4",
        "eagle:4x4",
        "eagle:4x4x",
        "eagle:4x4x16x2",
        "eagle:-1x1x4",
        "eagle:3.0x1x4",
        "eagle:3\u00d71\u00d74",  # the sign for times
        "eagle2:3x1x4",
        "ngram",
        "ngram:",
        "ngram:-8",
        "ngram:8x1",
        "ngram:8,off",
        "ngram:\u0968",  # a digit, but not one of ours
        "ngram:" + "9" * 5000,  # more digits than int() takes
        "off:1",
        "eagle:3x1x4; rm -rf /",
    ],
)
def test_the_error_of_an_unknown_strategy_has_the_syntax(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert str(error.value) == f"Unknown strategy {text.strip().lower()!r}; write {SYNTAX}."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ngram:0", f"TOKENS must be 2 to {MAX_TOKENS}"),
        ("ngram:1", f"TOKENS must be 2 to {MAX_TOKENS}"),
        ("ngram:65", f"TOKENS must be 2 to {MAX_TOKENS}"),
        ("ngram:999999", f"TOKENS must be 2 to {MAX_TOKENS}"),
        ("eagle:0x1x4", "STEPS must be 1 to 16"),
        ("eagle:17x1x18", "STEPS must be 1 to 16"),
        ("eagle:3x0x4", "TOPK must be 1 to 16"),
        ("eagle:3x17x4", "TOPK must be 1 to 16"),
        ("eagle:3x4x1", f"TOKENS must be 2 to {MAX_TOKENS}"),
        ("eagle3:3x4x65", f"TOKENS must be 2 to {MAX_TOKENS}"),
        ("eagle:3x1x3", "a chain of 3 verifies 4 tokens"),
        ("eagle3:3x1x5", "a chain of 3 verifies 4 tokens"),
        ("eagle:1x4x6", "such a tree has only 4 nodes"),
        ("eagle:2x2x8", "such a tree has only 6 nodes"),
    ],
)
def test_the_error_of_an_impossible_strategy_has_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(text)
    assert str(error.value) == f"Strategy {text!r} is not possible: {reason}."


def test_the_largest_tree_of_a_shape_is_possible() -> None:
    assert parse("eagle:2x2x7").num_draft_tokens == 7
    assert parse("eagle:1x4x5").num_draft_tokens == 5


def test_defaults() -> None:
    assert Strategy("off") == Strategy("off", num_steps=0, topk=1, num_draft_tokens=1)
