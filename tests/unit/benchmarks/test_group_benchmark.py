"""Test the figures that the benchmark of groups makes of its curves, without a model."""

from __future__ import annotations

import pytest

from benchmarks import bench_group as bench
from benchmarks.harness.program import UsageError


@pytest.mark.parametrize(
    ("length", "rounds"), [(0.5, 0.0), (1.0, 0.0), (1.5, 0.5), (2.0, 1.0), (2.25, 2.5), (3.0, None)]
)
def test_when_a_curve_reaches_a_length(length: float, rounds: float | None) -> None:
    assert bench.reached([1.0, 2.0, 1.75, 2.75], length) == rounds


def test_a_group_that_learns_twice_as_fast() -> None:
    alone = [[1.0, 1.2, 1.4, 1.6, 1.8], [1.2, 1.4, 1.6, 1.8, 2.0]]
    two = [[1.0, 1.4, 1.8, 2.2, 2.6], [1.2, 1.6, 2.0, 2.4, 2.8]]
    assert bench.summarise({1: alone, 2: two}) == {
        "accept_len_start": 1.1,
        "accept_len_1": 1.9,
        "accept_len_2": 2.7,
        "speedup_2": 2.0,
    }


def test_a_group_that_never_gets_there() -> None:
    summary = bench.summarise({1: [[1.0, 1.5, 2.0]], 2: [[1.0, 1.1, 1.2]]})
    assert summary["speedup_2"] is None and summary["accept_len_2"] == 1.2


def test_problems_are_those_of_their_seed() -> None:
    assert bench.texts_of(1, 4, []) == bench.texts_of(1, 8, [])[:4] != bench.texts_of(2, 4, [])


def test_texts_of_the_user() -> None:
    texts = bench.texts_of(0, 3, ["one two three four"] * 5)
    assert len(texts) == 3 and "".join(texts[0]) == "one two three four"
    with pytest.raises(UsageError, match="fewer than four"):
        bench.texts_of(0, 3, ["one"])
