"""List the benchmarks with the first line of each one's docstring: `make bench`."""

from __future__ import annotations

import ast
from pathlib import Path

from tools.directions import ROOT


def benchmarks() -> list[tuple[str, str]]:
    """Return the command and the description of each benchmark."""
    return [(command(path), description(path)) for path in sorted(ROOT.glob("benchmarks/bench_*"))]


def command(path: Path) -> str:
    """Return the command that runs the benchmark in a file or a package."""
    return (
        f"python {path.relative_to(ROOT)}" if path.suffix else f"python -m benchmarks.{path.stem}"
    )


def description(path: Path) -> str:
    """Return the first line of the docstring of a file or a package."""
    file = path if path.suffix else path / "__init__.py"
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


def main() -> None:
    """Print the list."""
    rows = benchmarks()
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")


if __name__ == "__main__":
    main()
