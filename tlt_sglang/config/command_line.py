"""What the commands of `tlt` have in common: their exit status, their help, their numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from tlt_sglang.errors import FlagError, TltError


def run(name: str, body: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Exit status of the command `name`: 0 done, 1 a problem (one sentence), 2 bad usage."""
    try:
        body(argv)
    except TltError as error:
        print(f"tlt {name}: {error}", file=sys.stderr)
        return 2 if isinstance(error, FlagError) else 1
    return 0


def helped(parser: argparse.ArgumentParser, argv: Sequence[str]) -> bool:
    """Whether help was asked for; then it is printed."""
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        return True
    return False


def amount(text: str) -> int:
    """A whole number below a milliard, as the type of a flag."""
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def count(text: str) -> int:
    """Such a number above 0."""
    if not amount(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
