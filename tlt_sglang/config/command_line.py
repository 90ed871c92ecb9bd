"""The parts that the commands of `tlt` share: parser, exit status, help, types of arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from tlt_sglang.errors import FlagError, TltError

WHOLE_DIGITS = 9
"""Most digits of a whole number, so that nothing overflows."""


class Parser(argparse.ArgumentParser):
    """A parser that raises FlagError, a sentence, where argparse prints its usage and exits."""

    def __init__(
        self, prog: str, description: str | None = None, allow_abbrev: bool = False
    ) -> None:
        super().__init__(
            prog=prog, description=description, add_help=False, allow_abbrev=allow_abbrev
        )

    def error(self, message: str) -> NoReturn:
        raise FlagError(f"Bad flags: {message}; see --help.")


class FlagGroup(Protocol):
    """A parser or a group of one, to which flags can be added."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add one flag."""


def run(name: str, body: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Run the command `name` and return its exit status: 0 done, 1 a problem, 2 bad usage."""
    try:
        body(argv)
    except TltError as error:
        print(f"tlt {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, FlagError) else 1
    return 0


def print_help(parser: argparse.ArgumentParser, argv: Sequence[str]) -> bool:
    """Print the help and return True if `argv` requests it."""
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        return True
    return False


def whole_number(text: str) -> int:
    """Return the whole number from 0 on that `text` stands for; the type of an argument."""
    if not text.isdecimal() or len(text) > WHOLE_DIGITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive_number(text: str) -> int:
    """Return the whole number from 1 on that `text` stands for; the type of an argument."""
    if not whole_number(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be greater than 0")
    return int(text)


def add_number(
    group: FlagGroup,
    flag: str,
    default: int,
    text: str,
    kind: Callable[[str], int] = positive_number,
) -> None:
    """Add a flag for a number, with its default in the help."""
    text += " (default: %(default)s)"
    group.add_argument(flag, type=kind, default=default, metavar="N", help=text)
