"""Which stop regexes are accepted: all that a search cannot take exponential time for."""

from __future__ import annotations

import re
import time

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
    "(a{1,3}){1,6}",
    "(?:a|b)+c",
    r"^\s*Answer: .*$",
    "a.*b.*c",
    "(?<=x)y",
    "(?>a+)+b",
    "(a++)+b",
    r"(\w|\d)+x",  # one set of characters to Python
    "(?:(?:[a-m]|[k-z]))+!",
    r"(?:\d{1,3},)+\d{3}",
    "(?:[a-z]+ )+done",
    "(ab?)+c",
    "(a|bc)*d",
    "(foo|bar)+",
    "(a*b)*c",
    r"(\w+)\s+\1",
    ".{0,200}x",
    "(?:\n[^\n]*)*END",
    r"\[[^\]]*\]",
    "((a|b)*c)*d",
    "(?:x|y|z){3,30}",
    "(?i)(a|A)*b",
    "a.?.?.?.?.?.?b",
    r"(?:The )?(?:final )?[Aa]nswer(?: is)?:? ?\d{1,3}(?:,\d{3}){0,4}(?:\.\d{1,6})?",
    "|".join(f"word{n} and more" for n in range(30)),
    "<[a-z]{1,8}(?: [a-z]{1,8})?>",
    "x" * 400,
    "(?:[0-9]{1,3}[.]){3}[0-9]{1,3}",
)
EXPONENTIAL = (
    "(a+)+b",
    "(a*)*b",
    "((a+)b?)*c",
    "(a|a)*b",
    "(?:a|ab|b)*c",
    "(.|a)*b",
    "(a|.)+x",
    "(a{1,100}){1,100}b",
    "(a{1,2})+b",
    "(a?a?)+b",
    "(a?){30}b",
    "(?i)(?:ab|AB)*c",
    "(?=(a+)+b)",
    r"(\w+\s*)+:",
    "(x+x+)+y",
    "([a-z]+)*[0-9]",
    "(a|b|ab)*c",
    "(.*)*x",
    "(?:[^x]|y)*z",
    "(\u0100|\u0200|[^a])*b",
    ".?" * 40 + "~END",
    "(?:a?){8}(?:a?){8}(?:a?){8}b",
    "a?b?" * 20 + "c",
    "(?:|)" * 40 + "x",
    ".*" + ".?" * 30 + "x",
    "(?>(a+)+b)",
    "(?:(a+)+b)?+",
    "(?:(?:a+)+b)++",
)
BROKEN = ("(", "*", "[", "a{2,1}", "(?P<x", "\\", "(?<=a+)b", "a" * 10 + ")", "(?i")


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_accepted(pattern: str) -> None:
    assert why_not(pattern) is None


@pytest.mark.parametrize("pattern", EXPONENTIAL)
def test_exponential(pattern: str) -> None:
    reason = why_not(pattern)
    assert reason is not None and "exponential time" in reason


@pytest.mark.parametrize("pattern", BROKEN)
def test_broken(pattern: str) -> None:
    reason = why_not(pattern)
    assert reason is not None and reason.startswith("it does not compile")


def test_loops_in_a_row() -> None:
    assert why_not(".*a.*b.*c") is None
    reason = why_not(".*a.*b.*c.*d")
    assert reason == "more than 3 of its repeats in a row can match the same text"
    assert why_not("a+b+c+d+e+f+") is None


def test_the_examination_takes_little_time() -> None:
    patterns = (
        "(?:" + "|".join("abcdefghij"[i % 10] * 6 for i in range(35)) + ")*x",
        "((" * 40 + "a" + ")?b)*" * 40,
    )
    for pattern in (*patterns, "(?:[a-z]{8}){8}" * 8, "(?:a?){8}" * 20, "(?:.{1,8}){1,8}" * 10):
        started = time.process_time()
        why_not(pattern)
        assert time.process_time() - started < 2.0, pattern


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_a_search_takes_little_time(pattern: str) -> None:
    """On texts that almost match, again and again."""
    compiled = re.compile(pattern)
    for text in ("a" * 60, "ab" * 40, "foo" * 30, "1,23," * 30, "word " * 30, "xyz" * 30):
        started = time.process_time()
        compiled.search(text + "\x00")
        assert time.process_time() - started < 1.0, text
