"""Put the figures of the result files into the Markdown pages, and find the ones that are stale.

    python -m benchmarks.figures --write     # update README.md, docs/ and benchmarks/README.md
    python -m benchmarks.figures --check     # list what is stale; exit status 1 if anything is
    python -m benchmarks.figures "bench_longtail.summary.tail_speedup | .1f"      # print one value

A figure in a sentence stands between two comments, which a page does not show:

    It is <!-- figure bench_longtail.summary.adaptive_vs_off -->1.47<!-- /figure --> times as fast.

A line must not begin with such a comment: Markdown takes a line that does for HTML.

The first word is a file of benchmarks/results without `.json`; then follow keys, separated by dots.
`runs[system=off]` selects the entries of a list by the value of a key, `runs[0]` by position; of
several entries the median counts. Two paths may be combined by ` - `, ` + `, ` * ` or ` / ` (with
the spaces), a number may stand for a path, and a format of Python's may follow a bar:

    took <!-- figure bench_longtail.runs[system=off].seconds | .1f -->5.9<!-- /figure --> s,
    was <!-- figure bench_longtail.summary.adaptive_vs_off - 1 | .0% -->47 %<!-- /figure --> faster,
    takes <!-- figure bench_strategies.summary.switch_cost_fraction | .1% -->0.5 %<!-- /figure -->

Without a format, numbers with a fraction have two digits after the point.

A whole table stands between two comments on lines of their own; its name is one of `TABLES`, and
what is between is replaced:

    <!-- table longtail -->
    <!-- /table -->

A path that is not in the result file is an error: a benchmark whose keys change breaks the check.
"""

from __future__ import annotations

import argparse
import json
import operator
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

FIGURE = re.compile(r"<!-- figure (?P<of>.+?) -->(?P<text>.*?)<!-- /figure -->")
TABLE = re.compile(r"<!-- table (?P<of>\S+) -->\n(?P<text>.*?)<!-- /table -->", re.DOTALL)
MARKER = re.compile(r"<!-- (?:figure|table) ")
HTML_LINE = re.compile(r"^ {0,3}<!-- figure (?P<of>.+?) -->", re.MULTILINE)
STEP = re.compile(r"(?P<key>[^.\[\]]+)(?:\[(?P<entries>[^\]]*)\])?(?:\.|$)")
OPERATION = re.compile(r"(.+) ([-+*/]) (.+)")
OPERATORS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


class FigureError(Exception):
    """A marker names a value that the result files do not have; the message says which."""


@dataclass(frozen=True)
class Stale:
    """One place of a page that does not show what the result file holds."""

    page: Path
    line: int
    of: str
    """The expression of the marker."""
    shown: str
    current: str

    def __str__(self) -> str:
        where = f"{self.page.relative_to(REPOSITORY)}:{self.line}"
        if "\n" in self.current:
            return f"{where}: the table {self.of} is stale"
        return f"{where}: {self.of} shows {self.shown!r}, the result is {self.current!r}"


# -- values ----------------------------------------------------------------------------------------


@cache
def result(name: str) -> Json:
    """Return the content of a result file; raise FigureError if there is no such file."""
    path = RESULTS / f"{name}.json"
    try:
        content: Json = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FigureError(f"There is no result file {path.name} in benchmarks/results.") from error
    return content


def values(path: str) -> list[Json]:
    """Return what a path leads to: one value, or one of every list entry that it selects."""
    steps = list(STEP.finditer(path))
    if "".join(step.group() for step in steps) != path or len(steps) < 2:
        raise FigureError(
            f"{path!r} is not a path; write FILE.KEY.KEY or FILE.LIST[KEY=VALUE].KEY."
        )
    reached = [result(steps[0]["key"])]
    for step in steps[1:]:
        reached = [_item(one, step["key"], path) for one in reached]
        if step["entries"] is not None:
            reached = [entry for one in reached for entry in _entries(one, step["entries"], path)]
    return reached


def _item(content: Json, key: str, path: str) -> Json:
    if not isinstance(content, dict) or key not in content:
        raise FigureError(f"{path}: the result has no {key!r} there.")
    return content[key]


def _entries(content: Json, selector: str, path: str) -> list[Json]:
    if not isinstance(content, list):
        raise FigureError(f"{path}: there is no list to select [{selector}] from.")
    key, equals, value = selector.partition("=")
    chosen: list[Json] = []
    if equals:
        chosen += [one for one in content if isinstance(one, dict) and str(one.get(key)) == value]
    elif selector.isdecimal():
        chosen += content[int(selector) :][:1]
    if not chosen:
        raise FigureError(f"{path}: nothing in the list is [{selector}].")
    return chosen


def value(expression: str) -> float | int | str:
    """Return the number or text that an expression without a format stands for."""
    operation = OPERATION.fullmatch(expression)
    if operation:
        first, sign, second = operation.groups()
        return OPERATORS[sign](number(first), number(second))
    if re.fullmatch(r"\d+(\.\d+)?", expression):
        return float(expression)
    every = values(expression)
    numbers = [one for one in every if isinstance(one, int | float)]
    if len(numbers) == len(every):
        return statistics.median(numbers) if len(numbers) > 1 else numbers[0]
    if len(set(map(str, every))) > 1 or not isinstance(every[0], str):
        raise FigureError(f"{expression} is neither a number nor a text.")
    return every[0]


def number(expression: str) -> float:
    """Return the value of an expression that has to be a number."""
    operand = value(expression.strip())
    if isinstance(operand, str):
        raise FigureError(f"{expression} is a text, not a number.")
    return float(operand)


def figure(marker: str) -> str:
    """Return the text that a page shows for a marker: expression, bar, format."""
    expression, _, style = (part.strip() for part in marker.partition(" | "))
    content = value(expression)
    if isinstance(content, str):
        return content
    if style.endswith("%"):
        return f"{format(100 * content, style[:-1] + 'f')} %"
    return format(content, style or (".2f" if isinstance(content, float) else "d"))


# -- tables ----------------------------------------------------------------------------------------


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def longtail(name: str) -> str:
    """Return the systems of a rollout step: times, throughput, and adaptive beside each."""
    every = values(f"{name}.runs")[0]
    assert isinstance(every, list)
    systems = dict.fromkeys(str(_item(run, "system", name)) for run in every)
    adaptive = number(f"{name}.runs[system=adaptive].seconds")
    rows = []
    for system in sorted(systems, key=lambda one: number(f"{name}.runs[system={one}].seconds")):
        run = f"{name}.runs[system={system}]"
        seconds, tail = number(f"{run}.seconds"), number(f"{run}.tail_seconds")
        speed = number(f"{run}.tokens") / seconds
        rows.append(
            (
                f"`{system}`" if ":" in system else system,
                *(f"{seconds:.1f}", f"{tail:.1f}", f"{speed:.0f}", f"{seconds / adaptive:.2f}"),
            )
        )
    header = ("System", "Step, s", "Tail, s", "Tokens/s", "Time over adaptive")
    return markdown(header, rows)


def strategies(name: str) -> str:
    """Return adaptive beside the fastest single strategy and plain decoding, per batch size."""
    ratios = values(f"{name}.ratios")[0]
    assert isinstance(ratios, dict)
    rows = []
    for size in ratios:
        of_size = f"{name}.ratios.{size}"
        rows.append(
            (
                size,
                f"`{_fastest(name, size)}`",
                figure(f"{of_size}.best"),
                figure(f"{of_size}.plain"),
            )
        )
    header = ("Requests", "Fastest single strategy", "Adaptive over it", "Adaptive over `off`")
    return markdown(header, rows)


def _fastest(name: str, size: str) -> str:
    """Return the strategy that ran fastest at this batch size in the first part of the runs."""
    speeds: dict[str, list[float]] = {}
    for run in values(f"{name}.runs[part=batch {size}]"):
        assert isinstance(run, dict)
        speed = float(str(run["tokens"])) / float(str(run["seconds"]))
        speeds.setdefault(str(run["side"]), []).append(speed)
    speeds.pop("adaptive")
    fastest = max(sorted(speeds), key=lambda side: statistics.median(speeds[side]))
    return fastest.removeprefix("pinned ")


def policy() -> str:
    """Return the regret of every policy in the simulation."""
    names = ("cost_model", "beg_mab", "ema", "fixed", "off")
    path = "bench_policy.spreads.regret_"
    rows = [
        (f"`{name}`", *(figure(f"{path}{name}.{part} | .1%") for part in ("median", "min", "max")))
        for name in names
    ]
    return markdown(("Policy", "Regret, median", "min", "max"), rows)


def coordinator() -> str:
    """Return what one coordinator takes to serve fleets of several sizes."""
    path = "bench_coordinator.summary."
    rows = [
        (
            f"{engines:,}",
            figure(f"{path}preempt_p99_ms_{engines} | .0f") + " ms",
            figure(f"{path}busy_{engines} | .1%"),
            figure(f"{path}rejoin_s_{engines} | .1f") + " s",
            figure(f"{path}memory_mb_{engines} | .1f") + " MB",
        )
        for engines in (10, 100, 1000, 10_000)
    ]
    return markdown(
        ("Engines", "Preempted in (p99)", "Share of a core", "Rejoined in", "Memory"), rows
    )


TABLES: dict[str, Callable[[], str]] = {
    "longtail": lambda: longtail("bench_longtail"),
    "longtail_sampled": lambda: longtail("bench_longtail_sampled"),
    "strategies": lambda: strategies("bench_strategies"),
    "strategies_sampled": lambda: strategies("bench_strategies_sampled"),
    "policy": policy,
    "coordinator": coordinator,
}


def table(name: str) -> str:
    """Return the text of the table of this name."""
    if name not in TABLES:
        raise FigureError(f"There is no table {name!r}; choose from {', '.join(TABLES)}.")
    return TABLES[name]()


# -- pages -----------------------------------------------------------------------------------------


def pages() -> list[Path]:
    """Return the pages that may hold figures."""
    return [
        REPOSITORY / "README.md",
        *sorted((REPOSITORY / "docs").rglob("*.md")),
        REPOSITORY / "benchmarks" / "README.md",
    ]


def updated(text: str) -> str:
    """Return a page's text with every figure and table as the result files have it."""

    def put(match: re.Match[str], current: str) -> str:
        start, end = match.span("text")
        return match.string[match.start() : start] + current + match.string[end : match.end()]

    text = FIGURE.sub(lambda match: put(match, figure(match["of"])), text)
    return TABLE.sub(lambda match: put(match, table(match["of"])), text)


def stale(page: Path) -> Iterator[Stale]:
    """Yield the places of a page that are stale; raise FigureError for markers that are wrong."""
    text = page.read_text(encoding="utf-8")
    whole = 0
    for pattern, current in ((FIGURE, figure), (TABLE, table)):
        for match in pattern.finditer(text):
            whole += 1
            fresh = current(match["of"])
            if match["text"] != fresh:
                line = text.count("\n", 0, match.start()) + 1
                yield Stale(page, line, match["of"], match["text"], fresh)
    for match in HTML_LINE.finditer(text):
        raise FigureError(
            f"{page.relative_to(REPOSITORY)} has a line that begins with the figure "
            f"{match['of']}, which Markdown takes for HTML; put a word before it."
        )
    if whole != len(MARKER.findall(text)):
        raise FigureError(
            f"{page.relative_to(REPOSITORY)} has a marker without its end; close every "
            "<!-- figure ... --> on the same line, and every <!-- table ... --> on a later one."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 all fresh, 1 stale figures, 2 a marker that is wrong."""
    about = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=about[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="update the pages")
    action.add_argument("--check", action="store_true", help="list the figures that are stale")
    action.add_argument("expression", nargs="?", metavar="FIGURE", help="print this figure")
    args = parser.parse_args(argv)
    try:
        if args.expression:
            print(figure(args.expression))
            return 0
        places = [place for page in pages() if page.exists() for place in stale(page)]
    except FigureError as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2
    for place in places:
        print(place)
    if args.write:
        for page in dict.fromkeys(place.page for place in places):
            page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main())
