"""Greedy output is the same, token by token, as without speculation.

The drafters know the reference by heart, so that accepted drafts of every depth are among what is
compared; n-grams learn from the prompts and from what was said before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support.identity import LENGTH, Reference, each, rescore
from tests.support.servers import Server

STRATEGIES = ("eagle:3x4x8", "eagle:3x1x4", "eagle3:3x4x8", "ngram:8")
LEAST = {"eagle": 2.0, "eagle3": 1.5, "ngram": 1.3}
"""The least accept length with which a test of identity means something."""
DEEPEST = {"eagle": 3, "eagle3": 2, "ngram": 6}
"""And so many drafts must have been accepted in one step at least once."""

Record = Callable[[str, object], None]


def check(
    reference: Reference,
    strategy: str,
    requested: Sequence[int],
    answers: list[dict[str, Any]],
    record: Record,
    length: int = LENGTH,
) -> None:
    """Compare, and see that drafts were accepted, and many at once, too."""
    result = [
        reference.compare(i, answer["output_ids"], length)
        for i, answer in zip(requested, answers, strict=True)
    ]
    ties = [tie for tie in result if tie is not None]
    report = [answer["meta_info"] for answer in answers]
    assert {info["completion_tokens"] for info in report} == {length}
    rounds = sum(info["spec_verify_ct"] for info in report)
    accepted = sum(info["spec_num_correct_drafts"] for info in report)
    record("ties", len(ties))
    for tie in ties:
        record("tie", tie)
    record("accept length", round(1 + accepted / rounds, 2))
    assert 1 + accepted / rounds > LEAST[strategy.partition(":")[0]]
    deepest = max(len(info["spec_correct_drafts_histogram"]) - 1 for info in report)
    assert deepest >= DEEPEST[strategy.partition(":")[0]]


@pytest.mark.server("off")
def test_reference_can_be_told_apart(reference: Reference, record_property: Record) -> None:
    """Few tokens of the reference are ties, and rescoring by prefill sees the same gaps."""
    gaps = [gap for row in reference.gaps for gap in row]
    assert len(gaps) == LENGTH * len(reference.prompts)
    record_property("seconds", round(reference.seconds))
    record_property("gaps below 1e-3", sum(gap < 1e-3 for gap in gaps))
    assert sum(gap < 1e-3 for gap in gaps) < len(gaps) / 100
    options = {"return_logprob": True, "top_logprobs_num": 2}
    for i, at in ((0, 5), (7, 40), (18, 100)):
        ids = [*reference.prompts[i], *reference.outputs[i][:at]]
        best = reference.off().generate(ids, 1, options=options)["meta_info"]
        tokens = [token for _, token, _ in best["output_top_logprobs"][0]]
        gap = rescore(reference.off(), ids, (tokens[0], tokens[1]))
        assert gap == pytest.approx(reference.gaps[i][at], abs=1e-3)


@pytest.mark.server("off")
def test_plain_decoding_one_after_the_other(reference: Reference) -> None:
    """The reference was made eight at a time; alone, two of its prompts say the same."""
    for i in (7, 18):
        reference.compare(i, reference.off().generate(reference.prompts[i], LENGTH)["output_ids"])


@each(STRATEGIES, quick=2)
def test_one_after_the_other(
    server: Server,
    reference: Reference,
    strategy: str,
    record_property: Record,
    pytestconfig: pytest.Config,
) -> None:
    """Half the output of every third prompt; with --all-prompts the whole one of each."""
    server.post("/flush_cache")
    every = pytestconfig.getoption("--all-prompts")
    requested = range(0, len(reference.prompts), 1 if every else 3)
    length = LENGTH if every else LENGTH // 2
    started = time.monotonic()
    answers = [server.generate(reference.prompts[i], length) for i in requested]
    record_property("seconds", round(time.monotonic() - started))
    check(reference, strategy, requested, answers, record_property, length)
    server.wait_until_idle()


@each(STRATEGIES)
def test_eight_at_once(
    server: Server, reference: Reference, strategy: str, record_property: Record
) -> None:
    server.post("/flush_cache")
    started = time.monotonic()
    answers = server.generate_all(reference.prompts, at_once=8, max_new_tokens=LENGTH)
    record_property("seconds", round(time.monotonic() - started))
    check(reference, strategy, range(len(answers)), answers, record_property)
    server.wait_until_idle()
