"""The commands `tlt data` and `tlt train`: their exit status, and how they end when interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from tlt_sglang.config import command_line
from tlt_sglang.training import data_command, train_command

COMMANDS = {"data": data_command.run, "train": train_command.run}


def data(argv: Sequence[str]) -> int:
    """Run `tlt data` and return its exit status."""
    return main(["data", *argv])


def train(argv: Sequence[str]) -> int:
    """Run `tlt train` and return its exit status."""
    return main(["train", *argv])


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv` begins with.

    Returns the exit status: 0 done, 1 a problem, 2 bad usage, 130 interrupted.
    """
    command, rest = argv[0], argv[1:]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command_line.run(command, COMMANDS[command], rest)
    except KeyboardInterrupt:
        print(f"tlt {command}: interrupted; start it again to go on.", file=sys.stderr)
        return 130
