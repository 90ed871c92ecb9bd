"""The figures of the code's shape hold their bars; `make figures` prints them."""

from __future__ import annotations

import ast

import pytest

from tools.figures import any_count, figures, function_lengths, main, percentile

NAMES = (
    "loose modules at the top",
    "imports upward between rooms",
    "Any per 1,000 lines",
    "fmt: skip",
    "file length, median",
    "file length, 90th percentile",
    "function length, median",
    "function length, 90th percentile",
    "tests with a mark, percent",
)
"""The names of all figures, as a list so that collecting the tests does not count the figures."""


@pytest.mark.parametrize("name", NAMES)
def test_bars_hold(name: str) -> None:
    (figure,) = (figure for figure in figures() if figure.name == name)
    assert figure.holds, figure


def test_counts() -> None:
    text = "from typing import Any\n\ndef f(a: Any) -> typing.Any:\n    return a\n"
    tree = ast.parse(text)
    assert any_count(tree) == 2
    assert list(function_lengths(tree)) == [2]
    assert percentile(range(1, 11), 90) == 9
    assert percentile([5], 90) == 5


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(figure.name for figure in figures()) == NAMES
    assert main() == 0
    assert "fmt: skip" in capsys.readouterr().out
