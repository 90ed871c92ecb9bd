"""The patches against the SGLang that is installed: they fit, and their table is current."""

from __future__ import annotations

import pytest

import apply_patches
from tlt_sglang.patches import MODULES, all_patches
from tlt_sglang.patching.patch import table
from tlt_sglang.patching.source import SourceTree


def test_the_patches_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert apply_patches.main(["--check"]) == 0, capsys.readouterr().out


def test_the_table_is_current() -> None:
    version = SourceTree.from_installed("sglang").version
    current = apply_patches.TABLE.read_text(encoding="utf-8")
    assert current == table(all_patches(), version), "run: python apply_patches.py --write-table"


def test_every_patch_file_is_listed() -> None:
    files = {path.stem for path in apply_patches.TABLE.parent.glob("*.py")} - {"__init__"}
    assert files == set(MODULES)
