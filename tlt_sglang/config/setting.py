"""The description of a setting: the values it takes, its default, and its help.

A setting is written once, as a field of `settings.Config`. The flags and their help (`flags`), the
check of a file (`sources`) and docs/configuration.md (`page`) are generated from it. Needs the
standard library alone: `tlt check` runs where nothing else is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from tlt_sglang.errors import ConfigError

Program = Literal["engine", "launcher", "sidecar", "coordinator"]

T = TypeVar("T")


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


@dataclass(frozen=True)
class Group:
    """Settings that stand under one heading, and the programs that read them."""

    title: str
    intro: str
    used_by: tuple[Program, ...]


@dataclass(frozen=True)
class Setting:
    """One setting, as its field in `settings.Config` describes it."""

    name: str
    default: object
    kind: Kind
    help: str
    default_text: str
    """The default in words."""
    group: Group
    used_by: tuple[Program, ...]

    @property
    def flag(self) -> str:
        """The setting's flag, which is spelled as the setting."""
        return "--tlt-" + self.name.replace("_", "-")

    @property
    def flag_help(self) -> str:
        """The flag's help: a phrase that stands alone, with the default."""
        return f"{self.help} (default: {self.default_text})"

    def check(self, value: object, source: str | None = None) -> object:
        """Return `value` as the configuration holds it.

        Raises ConfigError for a value that does not fit; `source` names the file it comes from,
        None the command line.
        """
        try:
            return self.kind.read(value)
        except ValueError:
            remedy = f"{self.kind.remedy}."
        if source is None:
            raise ConfigError(f"{self.flag} {as_word(value) or repr('')} is not valid; {remedy}")
        raise ConfigError(f"{source} gives {value!r} as {self.name}; {remedy}")


def setting(
    default: T,
    kind: Kind,
    help: str,
    group: Group,
    *,
    default_text: str | None = None,
    used_by: tuple[Program, ...] | None = None,
) -> T:
    """Return the field of a configuration that describes one setting."""
    if default_text is None:
        default_text = as_word(default)
    metadata = {
        "kind": kind,
        "help": help,
        "default_text": default_text,
        "group": group,
        "used_by": used_by or group.used_by,
    }
    return dataclasses.field(default=default, metadata=metadata)


def as_word(value: object) -> str:
    """Return a value as it is written on the command line; "none" and "off" for the unset."""
    if value is None or value is False:
        return "off" if value is False else "none"
    if isinstance(value, (list, tuple)):
        return ",".join(str(part) for part in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


# ---- kinds ---------------------------------------------------------------------------------------


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
