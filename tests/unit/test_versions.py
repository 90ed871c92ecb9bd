"""SGLang's versions stand in one file; nothing else asks which one is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.upstream import versions

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / "tlt_sglang" / "upstream"
LITERAL = re.compile(r"\b0\.[45]\.\d+|[\"']v\d\d[\"']")
"""A version of SGLang, or the name of a shape."""
QUESTION = re.compile(r"\b(if|elif|while|and|or|not)\b.*\b(sglang_version|versions\.installed)\b")


def product() -> list[Path]:
    files = [path for folder in ("tlt_sglang", "patches") for path in (ROOT / folder).rglob("*.py")]
    return sorted({path.resolve() for path in [*files, ROOT / "apply_patches.py"]})


def test_no_other_file_names_a_version_or_a_shape() -> None:
    homes = {HOME / "versions.py", ROOT / "patches" / "__init__.py"}
    lines = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in product()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (path not in homes and LITERAL.search(line)) or QUESTION.search(line)
    }
    assert lines == set()


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match=r"^SGLang 0\.4\.1 is installed, but TLT runs on "):
        versions.shape_of("0.4.1")
    assert versions.shape_of(versions.NEWEST) == versions.SHAPES[versions.NEWEST]
