"""A rule of admission as data, and the tests of values that rules are made of.

A test takes a value and the limits, and returns the parts of the value that are not allowed: the
value itself, or entries of a list or an object. A rule adds the field and the words for what is
allowed, in which {vocabulary}, {last_token}, {context}, {longest_prompt} and {hidden_size} stand
for the limits. Runs anywhere; pure.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from tlt_sglang.admission.limits import Limits

Test = Callable[[object, Limits], Iterable[object]]
Bound = int | float | Callable[[Limits], int | float]

INT32 = 2**31 - 1
INT64 = 2**63 - 1
SHOWN = 60
"""The most characters of a value that a sentence repeats."""


@dataclass(frozen=True)
class Rule:
    """One field, and what it may hold. None always stands for the default."""

    field: str
    test: Test
    allowed: str

    def problem(self, value: object, limits: Limits) -> str | None:
        """Return a sentence about the first part of `value` that is not allowed, if any."""
        if value is None:
            return None
        for part in self.test(value, limits):
            verb = "is" if part is value else "contains"
            allowed = self.allowed.format(
                vocabulary=limits.vocabulary,
                last_token=limits.last_token,
                context=limits.context,
                longest_prompt=limits.longest_prompt,
                hidden_size=limits.hidden_size,
            )
            return f"{self.field} {verb} {show(part)}; it must be {allowed}."
        return None


def problems(rules: Iterable[Rule], values: Mapping[str, object], limits: Limits) -> Iterator[str]:
    """Yield a sentence for each rule that the values of its field break."""
    for rule in rules:
        problem = rule.problem(values.get(rule.field), limits)
        if problem is not None:
            yield problem


def show(value: object) -> str:
    """Return a value as JSON writes it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (list, tuple, set, dict)) and not value:
        return "empty"
    text = repr(value[: SHOWN + 1] if isinstance(value, (str, bytes, list, tuple)) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# ---- tests of one value --------------------------------------------------------------------------


def integer(low: Bound, high: Bound, *, besides: Sequence[int] = ()) -> Test:
    """Integers from `low` to `high`, and those of `besides`."""

    def test(value: object, limits: Limits) -> Iterator[object]:
        allowed = _is_integer(value) and (
            value in besides or _bound(low, limits) <= value <= _bound(high, limits)
        )
        if not allowed:
            yield value

    return test


def number(low: float, high: float, *, above: bool = False) -> Test:
    """Finite numbers from `low`, or above it, to `high`."""

    def test(value: object, limits: Limits) -> Iterator[object]:
        if not _is_number(value) or not low <= value <= high or (above and value == low):
            yield value

    return test


def boolean(value: object, limits: Limits) -> Iterator[object]:
    """True and False."""
    if not isinstance(value, bool):
        yield value


def text(most: int = 2**31, *, empty: bool = True) -> Test:
    """Strings of Unicode characters, without lone surrogates, of at most `most` characters."""

    def test(value: object, limits: Limits) -> Iterator[object]:
        allowed = isinstance(value, str) and len(value) <= most and (empty or value != "")
        if not allowed or not _is_unicode(str(value)):
            yield value

    return test


def one_of(*values: object) -> Test:
    """These values, of these types."""

    def test(value: object, limits: Limits) -> Iterator[object]:
        if not any(type(value) is type(each) and value == each for each in values):
            yield value

    return test


def mapping(value: object, limits: Limits) -> Iterator[object]:
    """Objects whose keys are strings."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        yield value


def not_json(value: object, limits: Limits) -> Iterator[object]:
    """Objects of Python that no JSON stands for."""
    if isinstance(value, (bool, int, float, str, bytes, list, tuple, dict)):
        yield value


# ---- tests of several values ---------------------------------------------------------------------


def each(test: Test, most: int = 2**31, *, alone: bool = False, fewest: int = 0) -> Test:
    """Lists of `fewest` to `most` entries that pass `test`; with `alone`, one entry by itself."""

    def test_all(value: object, limits: Limits) -> Iterator[object]:
        if alone and isinstance(value, str):
            yield from test(value, limits)
        elif not isinstance(value, (list, tuple, set)) or not fewest <= len(value) <= most:
            yield value
        else:
            for entry in value:
                yield from test(entry, limits)

    return test_all


def token_ids(value: object, limits: Limits) -> Iterator[object]:
    """Lists of token ids; a list of thousands is tested in microseconds."""
    if not isinstance(value, (list, tuple, set, array)):
        yield value
        return
    for entry in value if len(value) and not _are_token_ids(value, limits) else ():
        if not _is_integer(entry) or not 0 <= entry < limits.vocabulary:
            yield entry


def prompt(value: object, limits: Limits) -> Iterator[object]:
    """Lists of at least one token id."""
    if isinstance(value, (list, tuple, array)) and not len(value):
        yield value
    else:
        yield from token_ids(value, limits)


def biases(value: object, limits: Limits) -> Iterator[object]:
    """Objects with token ids in decimal as keys, and finite numbers that no step overflows."""
    if not isinstance(value, dict):
        yield value
        return
    valid = number(-1e20, 1e20)
    for key, bias in value.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20
        if not decimal or int(key) >= limits.vocabulary:
            yield key
        for entry in valid(bias, limits):
            yield {key: entry}


def _are_token_ids(values: Iterable[int], limits: Limits) -> bool:
    """Return True if all values are token ids, without a step of Python for each."""
    try:
        ids = values if isinstance(values, array) else array("q", values)
    except (TypeError, OverflowError):
        return False
    return bool(min(ids) >= 0 and max(ids) < limits.vocabulary)


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def _is_unicode(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bound(bound: Bound, limits: Limits) -> int | float:
    return bound(limits) if callable(bound) else bound
