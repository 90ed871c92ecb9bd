"""The kinds of values that settings take: how each is read from a file, and from a flag."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes, in a file and as a word of the command line."""

    name: str
    """The type, as the settings page names it."""
    remedy: str
    """The advice for a bad value, with which an error ends."""
    read: Callable[[object], object]
    """Return the value for one from TOML or JSON; raises ValueError where it does not fit."""
    parse: Callable[[str], object]
    """Return the value for a word of the command line; raises ArgumentTypeError."""
    metavar: str | None = None
    choices: tuple[str, ...] = ()


def whole(least: int, most: int = 2**31 - 1, *, metavar: str = "N", remedy: str = "") -> Kind:
    """Return the kind of whole numbers from `least` to `most`."""

    def read(value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(value)
        return value

    return Kind("integer", remedy or f"write {least} or more", read, parse_integer, metavar)


def decimal(
    least: float, most: float, *, above: bool = False, metavar: str = "X", remedy: str
) -> Kind:
    """Return the kind of numbers from `least` (or `above` it) to `most`."""

    def read(value: object) -> float:
        if type(value) is not int and type(value) is not float:
            raise ValueError(value)
        if not least <= value <= most or (above and value == least):
            raise ValueError(value)
        return float(value)

    return Kind("number", remedy, read, parse_number, metavar)


def choice(values: Sequence[str]) -> Kind:
    """Return the kind of one word out of `values`."""

    def read(value: object) -> object:
        if value not in values:
            raise ValueError(value)
        return value

    return Kind("string", f"choose from {', '.join(values)}", read, str, choices=tuple(values))


def text(metavar: str, remedy: str) -> Kind:
    """Return the kind of texts that are not empty."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError(value)
        return value

    return Kind("string", remedy, read, str, metavar)


def _read_switch(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(value)
    return value


SWITCH = Kind("boolean", "write true or false", _read_switch, bool)
"""The kind of true and false; its flag takes no value."""


def texts(metavar: str, remedy: str) -> Kind:
    """Return the kind of lists of texts, which may be written as one text with commas."""

    def read(value: object) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError(value)
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(value)
        return tuple(part.strip() for part in parts)

    return Kind("list of strings", remedy, read, str, metavar)


def numbers(metavar: str, remedy: str) -> Kind:
    """Return the kind of lists of whole numbers from 0 on."""

    def read(value: object) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)):
            raise ValueError(value)
        if not all(type(part) is int and part >= 0 for part in value):
            raise ValueError(value)
        return tuple(value)

    def parse(word: str) -> list[int]:
        return [parse_integer(part) for part in word.split(",") if part]

    return Kind("list of integers", remedy, read, parse, metavar)


def parse_integer(word: str) -> int:
    """Return the whole number that `word` stands for; the type of a flag."""
    if not re.fullmatch(r"-?[0-9]{1,18}", word):
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number")
    return int(word)


def parse_number(word: str) -> float:
    """Return the number that `word` stands for; the type of a flag."""
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None
