"""Run a benchmark as a command: its flags, its exit status, and what it prints.

Imports neither torch nor SGLang, so that a benchmark's own process stays small and quiet beside the
engines it measures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.harness.statistics import Spread

_started = time.monotonic()


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message gives the reason."""


class UsageError(Exception):
    """A flag or an input file is wrong; the message names it and an alternative."""


class Parser(argparse.ArgumentParser):
    """The flags of the benchmark `name`, with the three that all have; `about` is its docstring.

    Raises UsageError for flags that are wrong.
    """

    def __init__(self, name: str, about: str | None, quick: str) -> None:
        super().__init__(
            prog=f"{name}.py",
            description=(about or "").split("\n\n", 1)[1],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add = self.add_argument
        add("--quick", action="store_true", help=quick)
        add(
            "--prompts",
            type=Path,
            metavar="FILE",
            help='Prompts, one a line: text, or JSON with a "prompt" (default: built-in prompts)',
        )
        add(
            "--json",
            type=Path,
            metavar="PATH",
            help=f"Result file (default: benchmarks/results/{name}.json)",
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}.")


def run(name: str, benchmark: Callable[[Path], None]) -> int:
    """Return the exit status of a benchmark: 0 done, 1 failed, 2 bad input, 130 interrupted.

    `benchmark` gets a folder for the logs of what it starts; they are kept only if it fails.
    """
    from tlt_sglang.errors import ConfigError, TltError

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    logs = Path(tempfile.mkdtemp(prefix=f"{name.replace('_', '-')}-"))
    try:
        benchmark(logs)
    except SystemExit:  # --help
        shutil.rmtree(logs, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        print(f"{name}: interrupted; everything it started is stopped.", file=sys.stderr)
        status = 130
    except (UsageError, ConfigError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 2
    except (BenchmarkError, TltError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 1
    else:
        status = 0
    if status != 1 or not any(logs.iterdir()):
        shutil.rmtree(logs, ignore_errors=True)
    return status


def add_temperature(parser: argparse.ArgumentParser) -> None:
    """Add --temperature, a number from 0 (greedy) to 2."""
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        metavar="T",
        help="Temperature (default: 0)",
    )


def _temperature(text: str) -> float:
    try:
        temperature = float(text)
    except ValueError:
        temperature = -1.0
    if not 0 <= temperature <= 2:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2")
    return temperature


def check_sizes(args: argparse.Namespace, *names: str) -> None:
    """Raise UsageError if one of these flags is a number below 1."""
    for name in names:
        size = getattr(args, name)
        if size is not None and size < 1:
            raise UsageError(f"--{name} {size} is too small; give a number from 1 on.")


def check_writable(path: Path) -> None:
    """Raise UsageError if a result cannot be written to `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder of {path} cannot be made: {error.strerror}.") from error
    target = path if path.exists() else path.parent
    if path.is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"{path} cannot be written; give --json another file.")


def say(text: str) -> None:
    """Print a line of progress on standard error, with the time since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def spread_table(spreads: dict[str, Spread], digits: int = 3) -> str:
    """Return a table of figures: median, least, greatest and count."""
    rows = [
        (name, *(f"{value:.{digits}f}" for value in (s.median, s.min, s.max)), str(s.count))
        for name, s in spreads.items()
    ]
    return table(("figure", "median", "min", "max", "count"), rows)
