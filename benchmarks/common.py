"""What every benchmark here shares: its figures, its prompts, and the document it writes.

Imports neither torch nor SGLang, so that a benchmark's own process stays small and quiet beside
the engines it measures. Starting those is in `benchmarks.server`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"

PROMPTS = (
    "Explain in simple words why the sky is blue during the day and red in the evening.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "List five things to check before buying a used bicycle, with one sentence on each.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Show your steps.",
    "Describe how bread is made, from the flour to the finished loaf.",
    "Write a Python function that returns the second largest number of a list.",
    "Compare living in a big city with living in a small village.",
    "Write a polite email asking a colleague to move tomorrow's meeting to Friday.",
)
"""Ordinary instructions, for where no file is given."""

INSTRUCTIONS = (
    *PROMPTS,
    "What is the difference between weather and climate?",
    "Give me three tips for sleeping better, and say why they help.",
    "Write a four-line poem about an old oak tree.",
    "How does a refrigerator keep food cold?",
    "Summarise the story of Romeo and Juliet in five sentences.",
    "Suggest a vegetarian dinner for four people, with a shopping list.",
    "Explain what a budget is to a twelve-year-old.",
    "What should I pack for a three-day hike in the mountains?",
    "Write a thank-you note to a neighbour who watered my plants.",
    "Why do leaves change colour in autumn?",
    "Translate 'Where is the railway station?' into Spanish and French.",
    "Describe the water cycle step by step.",
    "Write a dialogue between a customer and a shopkeeper about a broken kettle.",
    "What are the advantages and disadvantages of working from home?",
    "Explain how vaccines protect people from diseases.",
    "Write a short product description for a wooden chess set.",
    "How can a beginner learn to play the guitar?",
    "List the planets of the solar system with one fact about each.",
    "What did people use to write with before the pencil was invented?",
    "Rewrite this sentence politely: 'Send me the report now.'",
    "Explain the rules of football in a few sentences.",
    "Write a recipe for pancakes.",
    "What is a computer virus, and how can I protect my computer from one?",
    "Tell me about the history of the bicycle.",
)
"""More of them, for what depends on the prompt."""

Case = TypeVar("Case")


class BenchmarkError(Exception):
    """The benchmark cannot go on; the message says why."""


class UsageError(Exception):
    """A flag or an input file that cannot be right; the message says what to give instead."""


def run(name: str, benchmark: Callable[[Path], None]) -> int:
    """The exit status of a benchmark: 0 measured, 1 a problem, 2 bad input, 130 interrupted.

    `benchmark` gets a folder for the logs of what it starts; they stay where there was a problem.
    """
    from tlt_sglang.errors import ConfigError, TltError

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    logs = Path(tempfile.mkdtemp(prefix=f"{name.replace('_', '-')}-"))
    try:
        benchmark(logs)
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


# -- figures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One measurement."""

    part: str
    side: str
    """What was measured: one of the things the part compares."""
    round: int
    case: int
    """Which prompt or batch of the round."""
    seconds: float
    tokens: int
    """Tokens generated in these seconds, over all requests."""
    steps: int
    """Steps of the engine in these seconds, where it is one request's; else as `tokens`."""
    prompt_tokens: int = 0
    output: str = ""
    """Digest of the generated token ids, to see whether two sides generated the same."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def step_ms(self) -> float:
        return 1000 * self.seconds / self.steps


@dataclass(frozen=True)
class Spread:
    """The middle of some figures, and how far they lie apart."""

    median: float
    min: float
    max: float
    count: int

    def as_json(self) -> dict[str, float | int]:
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in dataclasses.asdict(self).items()
        }


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values at all."""
    if not values:
        raise ValueError("no values to take the median of")
    return Spread(float(statistics.median(values)), min(values), max(values), len(values))


def interleave(
    rounds: int, cases: Sequence[Case], sides: Sequence[str]
) -> Iterator[tuple[int, int, Case, str]]:
    """(round, index, case, side), the sides next to each other: A B A B.

    What the machine does besides, and its clock as it warms up, then falls on all sides alike.
    """
    for number in range(rounds):
        for index, case in enumerate(cases):
            for side in sides:
                yield number, index, case, side


def paired(
    runs: Sequence[Run], over: str, under: str, value: Callable[[Run], float]
) -> list[float]:
    """`value` of side `over` divided by that of side `under`, for each round and case of both."""
    sides: dict[str, dict[tuple[int, int], float]] = {over: {}, under: {}}
    for run in runs:
        if run.side in sides:
            sides[run.side][run.round, run.case] = value(run)
    return [sides[over][key] / below for key, below in sides[under].items() if key in sides[over]]


def agreement(runs: Sequence[Run], one: str, other: str) -> float:
    """Share of the pairs in which both sides generated the very same tokens."""
    same: dict[tuple[int, int], list[str]] = {}
    for run in runs:
        if run.side in (one, other):
            same.setdefault((run.round, run.case), []).append(run.output)
    pairs = [outputs for outputs in same.values() if len(outputs) == 2]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def digest(token_ids: Sequence[Sequence[int]]) -> str:
    """A short name for these generated tokens."""
    return hashlib.sha256(json.dumps(token_ids).encode()).hexdigest()[:12]


# -- input -----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The flags of the benchmark `name`, with the three that all have; `about` is its docstring.

    Raises UsageError for flags that cannot be right.
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
            "--prompts", type=Path, metavar="FILE", help='lines of text, or of JSON with a "prompt"'
        )
        add("--json", type=Path, metavar="PATH", help=f"default: benchmarks/results/{name}.json")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}.")


def load_prompts(path: Path) -> list[str]:
    """The prompts in a file: JSON lines with a "prompt" each (*.jsonl), or plain text lines.

    Empty lines are skipped. Raises UsageError with the line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"The prompts in {path} cannot be read: {reason}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The prompts in {path} are not UTF-8 text.") from error
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    as_json = path.suffix == ".jsonl" or (bool(filled) and filled[0][1].lstrip().startswith("{"))
    prompts = [_prompt(path, number, line) if as_json else line.strip() for number, line in filled]
    if not prompts:
        raise UsageError(f"The file {path} holds no prompt; write one a line.")
    return prompts


def _prompt(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"Line {number} of {path} is not JSON: {error.msg}.") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f'Line {number} of {path} has no text as "prompt".')
    return prompt


def check_writable(path: Path) -> None:
    """Raise UsageError if the results could not be written to `path` when they are there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder of {path} cannot be made: {error.strerror}.") from error
    target = path if path.exists() else path.parent
    if path.is_dir() or not os.access(target, os.W_OK):
        raise UsageError(f"{path} cannot be written; give --json another file.")


# -- output ----------------------------------------------------------------------------------------


_started = time.monotonic()


def say(text: str) -> None:
    """A line of progress on standard error, with the time since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def document(benchmark: str, summary: Mapping[str, float | None], **content: Any) -> dict[str, Any]:
    """What a result file holds: where the figures come from, the summary, then `content`."""
    return {
        "benchmark": benchmark,
        "command": command(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git(),
        "machine": machine(),
        "versions": versions(),
        "summary": dict(summary),
        **content,
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BenchmarkError(f"{path} could not be written: {error.strerror}.") from error


def command(argv: Sequence[str]) -> str:
    """The command line as it would be typed in the repository's root."""
    words = ["python", *argv]
    return shlex.join(word.replace(f"{REPOSITORY}{os.sep}", "") for word in words)


def git() -> dict[str, Any]:
    """Commit of the repository, and whether the working tree (but for results) differs from it."""
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """CPU model, cores and memory."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of what is measured; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "sglang", "transformers", "tlt-sglang"):
        try:
            found[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name.replace("-", "_")] = None
    return found
