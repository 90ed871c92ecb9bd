"""Tests of what an older SGLang lacks: they run wherever `tlt check` does not list the lack."""

from __future__ import annotations

import pytest

from tlt_sglang import upstream


def unless_lacking(words: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test where a limit of the installed SGLang has these `words`.

    The reason is that limit, as `tlt check` prints it.
    """
    limits = [text for text in upstream.current().limits() if words in text]
    return pytest.mark.skipif(bool(limits), reason=" ".join(limits))
