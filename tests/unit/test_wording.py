"""Texts that a person reads, and names, hold to the language of this project (tools/wording.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.directions import ROOT
from tools.wording import problems, python_files

BANNED = """
'''What it does.'''

def told(known: int) -> None:
    '''Of each request: the arms.'''
    raise ValueError(f"{known} is no port; give another one.")

parser.add_argument("--x", help="of the index (default: 3)")
"""
GOOD = """
'''Return what it does.'''

def counts(steps: int) -> None:
    '''Return the strategies of each request, if there are any.'''
    raise ValueError(f"{steps} must be greater than 0. There is no larger step.")

parser.add_argument("--x", help="Size of the index (default: 3)")
"""


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_and_names(path: Path) -> None:
    assert problems(path) == []


def test_banned_forms_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.wording.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(BANNED)
    kinds = sorted(problem.split(": ")[1].split()[0] for problem in problems(path))
    assert kinds == ["docstring"] * 3 + ["error", "help", "name", "name"]
    path.write_text(GOOD)
    assert problems(path) == []
