"""Find forms in help texts, error sentences, docstrings and names that this project does not use.

Prints each of them with its file and line: `python -m tools.wording [PATH ...]`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.directions import ROOT

FOLDERS = ("tlt_sglang", "patches", "benchmarks", "tests", "tools")

EVERYWHERE = {
    r"(?<![Tt]here )\b(is|are) no (?!longer\b|more\b|less\b)": "say what it must be, or 'is not'",
    r"(?<![Tt]here )\b(is|are) none\b": "say 'is not available', 'does not exist'",
    r"\btells? (no|nothing)\b": "say 'does not report'",
    r"\bmilliards?\b": "say 'billion'",
    r"\b(is|are|be|being) let be\b|\blets? .{1,20} be\b(?! )": "name the action",
    r"\b(came|comes|come) again\b": "say 'n-gram match' or 'is repeated'",
    r"\bput off\b|\bbacklog\b": "say 'deferred', 'pending tokens'",
    r"\barms?\b(?!-)": "say 'strategy'",
    r"\bverify rounds?\b|\brounds of verif": "say 'verify step'",
    r"\b(was|were|is|are) told\b|\btold (of|by|to)\b": "name what is passed or reported",
}
"""Expressions that no sentence contains, and what to write instead."""

DOCSTRING_STARTS = r"(Of|What|Whether|Those)\b"
HELP_STARTS = r"(of|those|within which|it|at most so)\b"
PARTICIPLES = {
    *("told", "said", "asked", "given", "found", "wanted", "known", "missed", "drawn"),
    *("gone", "seen"),
}
"""Names that say nothing of their value."""


@dataclass(frozen=True)
class Sentence:
    """A text that a person reads, and where it stands."""

    path: Path
    line: int
    kind: str
    """One of help, error, docstring and name."""
    text: str

    def problems(self) -> Iterator[str]:
        """Yield a description of each form in it that is not used."""
        place = f"{self.path.relative_to(ROOT)}:{self.line}: {self.kind}"
        excerpt = self.text.strip().partition("\n")[0][:80]
        if self.kind == "name":
            if self.text.strip("_") in PARTICIPLES:
                yield f"{place} {self.text!r}: name the value"
            return
        for pattern, advice in EVERYWHERE.items():
            if match := re.search(pattern, self.text):
                yield f"{place} contains {match[0]!r}: {advice}"
        if self.kind == "docstring" and re.match(DOCSTRING_STARTS, self.text.lstrip()):
            yield f"{place} {excerpt!r} is not a sentence: begin with a verb or a subject"
        if self.kind == "help" and re.match(HELP_STARTS, self.text.lstrip(), re.IGNORECASE):
            yield f"{place} {excerpt!r} does not stand alone: begin with a noun or a verb"


def python_files() -> list[Path]:
    """Return the Python files of this repository, without the list of banned forms itself."""
    files = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return sorted({*files, *ROOT.glob("*.py")} - {Path(__file__).resolve()})


def sentences(path: Path) -> Iterator[Sentence]:
    """Yield the texts and names of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and (text := string(node.value)) is not None:
            yield Sentence(path, node.lineno, "docstring", text)
        elif isinstance(node, ast.keyword) and node.arg == "help":
            if (text := string(node.value)) is not None:
                yield Sentence(path, node.value.lineno, "help", text)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            for argument in node.exc.args:
                if (text := string(argument)) is not None:
                    yield Sentence(path, argument.lineno, "error", text)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield Sentence(path, node.lineno, "name", node.id)
        elif isinstance(node, ast.arg):
            yield Sentence(path, node.lineno, "name", node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Sentence(path, node.lineno, "name", node.name)


def string(node: ast.expr) -> str | None:
    """Return the text of a string; an f-string has `{}` for each expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(string(part) or "{}" for part in node.values)
    return None


def problems(path: Path) -> list[str]:
    """Return the problems of a file."""
    return [problem for sentence in sentences(path) for problem in sentence.problems()]


def main(arguments: list[str]) -> int:
    """Print the problems of the files or folders, by default of all; return 1 if there are any."""
    chosen = [(ROOT / argument).resolve() for argument in arguments] or [ROOT]
    files = [file for file in python_files() if any(file.is_relative_to(path) for path in chosen)]
    found_problems = [problem for file in files for problem in problems(file)]
    print(*found_problems, sep="\n")
    return 1 if found_problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
