"""Which stop regexes are accepted: all that a search cannot take exponential time for."""

from __future__ import annotations

import pytest

from tlt_sglang.admission.stop_regex import why_not

ACCEPTED = (
    "",
    "a",
    "END",
    r"\n\n+",
    "[0-9]+[.]",
    r"(?:yes|no)\b",
    "(?i)stop",
    r"\d{3}-\d{4}",
    "(ab){2}",
    "(a{1,3}){1,16}",
    "(?:a|b)+c",
    r"^\s*Answer: .*$",
    "a.*b.*c",
    "(?<=x)y",
    "(?>a+)+b",
    "(a++)+b",
    r"(\w|\d)+x",  # one set of characters to Python
    "(?:(?:[a-m]|[k-z]))+!",
)
EXPONENTIAL = {
    "(a+)+b": "a repeat within a repeat",
    "(a*)*b": "a repeat within a repeat",
    "((a+)b?)*c": "a repeat within a repeat",
    "(a|a)*b": "begin with the same character",
    "(a|ab)*c": "begin with the same character",
    "(.|a)*b": "begin with the same character",
    "(a{1,100}){1,100}b": "a repeat within a repeat",
    r"(a)\1": "refers to a group",
    "(?=(a+)+b)": "a repeat within a repeat",
}
BROKEN = ("(", "*", "[", "a{2,1}", "(?P<x", "\\", "(?<=a+)b", "a" * 10 + ")", "(?i")


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_accepted(pattern: str) -> None:
    assert why_not(pattern) is None


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_exponential(pattern: str) -> None:
    reason = why_not(pattern)
    assert reason is not None and EXPONENTIAL[pattern] in reason


@pytest.mark.parametrize("pattern", BROKEN)
def test_broken(pattern: str) -> None:
    reason = why_not(pattern)
    assert reason is not None and reason.startswith("it does not compile")
