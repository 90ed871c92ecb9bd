"""Tests of what an older SGLang lacks: they run wherever `tlt check` does not list the lack."""

from __future__ import annotations

import pytest

from tlt_sglang import upstream


def lacks(words: str) -> bool:
    """Return True if a limit of the installed SGLang, as `tlt check` prints it, has these words."""
    return bool(_limits(words))


def unless_lacking(words: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test where `lacks(words)`; the reason is that limit."""
    return pytest.mark.skipif(lacks(words), reason=" ".join(_limits(words)))


def _limits(words: str) -> list[str]:
    return [text for text in upstream.current().limits() if words in text]
