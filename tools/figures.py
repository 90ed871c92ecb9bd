"""Print the figures of the code's shape as a table, each with its bar: `make figures`.

Everything is counted from the source text; nothing of the product is imported.
"""

from __future__ import annotations

import ast
import functools
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from tools.directions import PACKAGE, ROOT, arrows, parse, product_files

MARKED_FOLDERS = ("unit", "patches", "engine", "fleet", "stacks", "cuda", "gpu")
"""Folders of tests/ of which tests/conftest.py makes marks."""
SKIP = "# fmt: " + "skip"
PYTHON_FOLDERS = ("tlt_sglang", "patches", "benchmarks", "tests", "tools")


@dataclass(frozen=True)
class Figure:
    """A number, and the bar that it has to hold."""

    name: str
    value: float
    bar: str
    holds: bool
    digits: int = 0

    def row(self) -> tuple[str, str, str, str]:
        """Return the cells of its row in the table."""
        state = "holds" if self.holds else "fails"
        return self.name, f"{self.value:.{self.digits}f}", self.bar, state


@functools.cache
def figures() -> tuple[Figure, ...]:
    """Return all figures of this repository."""
    trees = [parse(path) for path in product_files()]
    texts = [path.read_text(encoding="utf-8") for path in product_files()]
    lines = [len(text.splitlines()) for text in texts if text.strip()]
    functions = [length for tree in trees for length in function_lengths(tree)]
    per_thousand = 1000 * sum(any_count(tree) for tree in trees) / sum(lines)
    skips = fmt_skips()
    tests, marked = marked_tests()
    return (
        at_most("loose modules at the top", len(loose_modules()), 6),
        at_most("imports upward between rooms", sum(arrow.upward for arrow in arrows()), 0),
        below("Any per 1,000 lines", per_thousand, 10, digits=1),
        below("fmt: skip", skips, 10),
        at_most("file length, median", statistics.median(lines), 89),
        at_most("file length, 90th percentile", percentile(lines, 90), 265),
        at_most("function length, median", statistics.median(functions), 8),
        at_most("function length, 90th percentile", percentile(functions, 90), 22),
        at_least("tests with a mark, percent", 100 * marked / tests, 100),
    )


def at_most(name: str, value: float, bar: float) -> Figure:
    """Return a figure that must not exceed `bar`."""
    return Figure(name, value, f"at most {bar:g}", value <= bar)


def below(name: str, value: float, bar: float, digits: int = 0) -> Figure:
    """Return a figure that must be smaller than `bar`."""
    return Figure(name, value, f"below {bar:g}", value < bar, digits)


def at_least(name: str, value: float, bar: float) -> Figure:
    """Return a figure that must reach `bar`."""
    return Figure(name, value, f"at least {bar:g}", value >= bar)


def loose_modules() -> list[str]:
    """Return the modules at the top of the package, without `__init__`."""
    return sorted(p.stem for p in (ROOT / PACKAGE).glob("*.py") if p.stem != "__init__")


def any_count(tree: ast.Module) -> int:
    """Count the uses of the name Any; imports do not count."""
    names = (node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    attributes = (node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return [*names, *attributes].count("Any")


def function_lengths(tree: ast.Module) -> Iterable[int]:
    """Yield the lines of each function, from `def` to its end."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1


def fmt_skips() -> int:
    """Count the comments that switch the formatter off, in all Python files."""
    files = [path for folder in PYTHON_FOLDERS for path in (ROOT / folder).rglob("*.py")]
    own = {path.resolve() for path in [*files, *ROOT.glob("*.py")]}
    return sum(path.read_text(encoding="utf-8").count(SKIP) for path in own)


def marked_tests() -> tuple[int, int]:
    """Return how many test functions there are, and how many lie in a folder with a mark."""
    total = marked = 0
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = parse(path)
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        names = [node.name for node in ast.walk(tree) if isinstance(node, functions)]
        count = sum(name.startswith("test_") for name in names)
        total += count
        if path.relative_to(ROOT / "tests").parts[0] in MARKED_FOLDERS:
            marked += count
    return total, marked


def percentile(values: Iterable[int], percent: int) -> int:
    """Return the smallest value that `percent` percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1]


def main() -> int:
    """Print the table; return 1 if a bar does not hold."""
    table = figures()
    rows = [("figure", "value", "bar", ""), *(figure.row() for figure in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for name, value, bar, state in rows:
        print(f"{name:{widths[0]}}  {value:>{widths[1]}}  {bar:{widths[2]}}  {state}".rstrip())
    return 0 if all(figure.holds for figure in table) else 1


if __name__ == "__main__":
    sys.exit(main())
