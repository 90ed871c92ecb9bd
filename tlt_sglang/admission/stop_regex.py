"""Which stop regexes can be searched for after every token. Runs anywhere; pure.

Python's `re` backtracks: where a repeat holds another repeat, as in (a+)+b, or alternatives that
begin alike, as in (a|a)*b, the time of a search doubles with each character, and it holds up all
requests. Nothing else of `re` is exponential but references to groups, which are refused, too.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

REPEATS = 16
"""A repeat of at most so many times takes no time by itself."""
_ANY = frozenset(range(256))
"""Stands for any first character; all characters from U+00FF on count as one."""

Item = tuple[object, Any]
"""An operator of `re` and its operand, as its parser returns them."""


def why_not(pattern: str) -> str | None:
    """Return why a pattern is refused, to follow "because"; None if it is accepted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            parsed = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        return f"it does not compile: {error}"
    return next(_risks(parsed, repeated=False), None)


def _risks(items: Iterable[Item], *, repeated: bool) -> Iterator[str]:
    """Yield what can make a search exponential; `repeated` is true within a repeat."""
    for operator, operand in items:
        if operator in (op.GROUPREF, op.GROUPREF_EXISTS):
            yield "it refers to a group, which can take exponential time"
        repeat = operator in (op.MAX_REPEAT, op.MIN_REPEAT) and _is_long(operand)
        if repeat and repeated:
            yield "it has a repeat within a repeat, which can take exponential time"
        if operator is op.BRANCH and repeated and _overlap(operand[1]):
            yield (
                "it repeats alternatives that can begin with the same character, which can take "
                "exponential time"
            )
        for part in _parts(operator, operand):
            yield from _risks(part, repeated=repeated or repeat)


def _is_long(operand: tuple[int, int, object]) -> bool:
    low, high, _ = operand
    return bool(high > REPEATS and high != low)


def _parts(operator: object, operand: Any) -> Sequence[Iterable[Item]]:
    """Return the patterns within an operator."""
    if operator in (op.MAX_REPEAT, op.MIN_REPEAT):
        return (operand[2],)
    if operator is op.SUBPATTERN:
        return (operand[3],)
    if operator in (op.ASSERT, op.ASSERT_NOT):
        return (operand[1],)
    if operator is op.BRANCH:
        return tuple(operand[1])
    # Python matches possessive repeats and atomic groups without backtracking into them.
    return ()


def _overlap(branches: Sequence[Iterable[Item]]) -> bool:
    """Return True if two alternatives can begin with the same character."""
    earlier: set[int] = set()
    for branch in branches:
        first = _first(branch)
        if not first or earlier & first:
            return True
        earlier |= first
    return False


def _first(items: Iterable[Item]) -> frozenset[int]:
    """Return the characters that a pattern can begin with; empty if it can match no character."""
    for operator, operand in items:
        if operator is op.LITERAL:
            return frozenset({min(operand, 255)})
        if operator is op.IN:
            return _members(operand)
        if operator is op.SUBPATTERN:
            return _first(operand[3])
        if operator is not op.AT:
            return _ANY
    return frozenset()


def _members(entries: Iterable[Item]) -> frozenset[int]:
    """Return the characters of a set such as [a-z_]."""
    members: set[int] = set()
    for operator, operand in entries:
        if operator is op.LITERAL:
            members.add(min(operand, 255))
        elif operator is op.RANGE:
            low, high = operand
            members.update(range(min(low, 255), min(high, 255) + 1))
        else:
            return _ANY
    return frozenset(members)


assert sys.version_info >= (3, 11), "re._parser is that of Python 3.11"
