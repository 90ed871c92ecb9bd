"""Which stop regexes can be searched for after every token. Runs anywhere; pure.

Python's `re` backtracks, and a search that takes exponential time holds up all requests of the
engine. It does if a pattern can match one text in many ways: (a+)+b, (a|a)*b, (a{1,2})+b. So the
pattern becomes an automaton with one state for each character that it can match, which is searched
for two different ways through a loop with the same text (exponential ambiguity, Weber and Seidl
1991, "On the degree of ambiguity of finite automata"), and for too many of them outside of loops.
References to groups count as a character.
"""

from __future__ import annotations

import functools
import re
import warnings
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from tlt_sglang.admission.automaton import ANY, Automaton, Fragment, TooLarge

LONG = 8
"""A repeat of more than so many times counts as a loop."""
MAX_LOOPS = 3
"""Loops in a row that can match the same text; each raises the power of its length in the time."""
MAX_WAYS = 4096
"""Ways to match one text without its loops; .?.?.?b has four ways to match three characters."""
MAX_EMPTY_CHOICES = 8

_EXPONENTIAL = "it can match the same text in many ways, which can take exponential time"
_POLYNOMIAL = f"more than {MAX_LOOPS} of its repeats in a row can match the same text"
_LARGE = "it is too complex to be examined"


@functools.lru_cache(maxsize=1024)
def why_not(pattern: str) -> str | None:
    """Return why a pattern is refused, to follow "because"; None if it is accepted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            parsed = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError, ValueError) as error:
        return f"it does not compile: {error}"
    try:
        automaton = Automaton()
        translation = Translation(automaton, bool(parsed.state.flags & re.IGNORECASE))
        automaton.finish(translation.sequence(parsed))
        if translation.repeats_nothing or automaton.is_exponential():
            return _EXPONENTIAL
        if automaton.empty_choices > MAX_EMPTY_CHOICES or automaton.has_more_ways(MAX_WAYS):
            return _EXPONENTIAL
        return _POLYNOMIAL if automaton.loops_in_a_row() > MAX_LOOPS else None
    except (TooLarge, RecursionError):
        return _LARGE


class Translation:
    """The translation of a parsed pattern into an automaton."""

    def __init__(self, automaton: Automaton, ignore_case: bool) -> None:
        """Translate into `automaton`."""
        self.automaton = automaton
        self.ignore_case = ignore_case
        self.repeats_nothing = False
        """True if a part that can match nothing is repeated a fixed number of times."""

    def sequence(self, items: Any) -> Fragment:
        """Return the fragment of items that follow each other."""
        result = self.automaton.nothing()
        for operator, operand in items:
            result = self.automaton.then(result, self.item(operator, operand))
        return result

    def item(self, operator: object, operand: Any) -> Fragment:
        """Return the fragment of one operator of `re` with its operand."""
        automaton = self.automaton
        if operator in (op.LITERAL, op.NOT_LITERAL, op.IN):
            return automaton.character(_characters(operator, operand, self.ignore_case))
        if operator in (op.MAX_REPEAT, op.MIN_REPEAT):
            return self.repeat(*operand)
        if operator is op.SUBPATTERN:
            return self.sequence(operand[3])
        if operator is op.BRANCH:
            return automaton.either([self.sequence(branch) for branch in operand[1]])
        if operator is op.GROUPREF_EXISTS:
            branches = [branch for branch in operand[1:] if branch is not None]
            return automaton.either([self.sequence(branch) for branch in branches])
        if operator is op.AT:
            return automaton.nothing()
        if operator in (op.ASSERT, op.ASSERT_NOT):
            # It is searched by itself, and matches no character of the text around it.
            automaton.finish(self.sequence(operand[1]))
            return automaton.nothing()
        if operator in (op.ATOMIC_GROUP, op.POSSESSIVE_REPEAT):
            # It is searched by itself until it first matches, and then it is one character.
            inner = operand if operator is op.ATOMIC_GROUP else [(op.MAX_REPEAT, operand)]
            automaton.finish(self.sequence(inner))
        # Those, ANY, and a reference.
        return automaton.character(ANY)

    def repeat(self, low: int, high: int, items: Any) -> Fragment:
        """Return the fragment of a repeat, a loop if it is long."""
        automaton = self.automaton
        if high > LONG:
            inner = self.sequence(items)
            if high != parser.MAXREPEAT and inner.empty:
                self.repeats_nothing = True
            return automaton.loop(inner, at_least_once=low > 0)
        # From the last to the first: there is one way to each number of repeats.
        result = automaton.nothing()
        for count in reversed(range(high)):
            result = automaton.then(self.sequence(items), result)
            if count >= low:
                result = automaton.either([result, automaton.nothing()])
        return result


def _characters(operator: object, operand: Any, ignore_case: bool) -> int:
    """Return the set of characters that an operator matches, one bit for each."""
    if operator is op.LITERAL:
        bits = _bit(operand)
    elif operator is op.NOT_LITERAL:
        return ANY & ~_bit(operand) if operand < 255 else ANY
    else:
        bits, negate = 0, False
        for member, value in operand:
            if member is op.NEGATE:
                negate = True
            elif member is op.LITERAL:
                bits |= _bit(value)
            elif member is op.RANGE:
                low, high = min(value[0], 255), min(value[1], 255)
                bits |= (1 << (high + 1)) - (1 << low)
            else:
                bits |= _category(value)
        if negate:
            # All characters from U+00FF on share a bit, which the others of them keep.
            return ANY & ~bits | _bit(255)
    return bits | _other_case(bits) if ignore_case else bits


def _bit(character: int) -> int:
    return 1 << min(character, 255)


@functools.cache
def _category(name: object) -> int:
    """Return the characters of a category such as a digit."""
    pattern = {
        op.CATEGORY_DIGIT: r"\d",
        op.CATEGORY_NOT_DIGIT: r"\D",
        op.CATEGORY_SPACE: r"\s",
        op.CATEGORY_NOT_SPACE: r"\S",
        op.CATEGORY_WORD: r"\w",
        op.CATEGORY_NOT_WORD: r"\W",
    }[name]
    member = re.compile(pattern)
    return sum(1 << code for code in range(255) if member.match(chr(code))) | _bit(255)


def _other_case(bits: int) -> int:
    codes = [code for code in range(255) if bits >> code & 1]
    folded = {*"".join(map(chr, codes)).upper(), *"".join(map(chr, codes)).lower()}
    return sum(1 << code for code in {min(ord(each), 255) for each in folded})
