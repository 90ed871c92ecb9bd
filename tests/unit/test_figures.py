"""The figures of the code's shape hold their bars; `make figures` prints them."""

from __future__ import annotations

import ast

import pytest

from tools.figures import Figure, any_count, figures, function_lengths, main, percentile


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: figure.name)
def test_bars_hold(figure: Figure) -> None:
    assert figure.holds, figure


def test_counts() -> None:
    text = "from typing import Any\n\ndef f(a: Any) -> typing.Any:\n    return a\n"
    tree = ast.parse(text)
    assert any_count(tree) == 2
    assert list(function_lengths(tree)) == [2]
    assert percentile(range(1, 11), 90) == 9
    assert percentile([5], 90) == 5


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "fmt: skip" in capsys.readouterr().out
