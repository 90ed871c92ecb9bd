"""SGLang's versions stand in one file; nothing else asks which one is installed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import FunctionType

import pytest

from tlt_sglang import upstream
from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.upstream import versions
from tlt_sglang.upstream.api import Sglang

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


def test_every_shape_has_an_adapter() -> None:
    for shape in set(versions.SHAPES.values()):
        adapter = importlib.import_module(f"tlt_sglang.upstream.{shape}").Adapter()
        methods = [name for name, value in vars(Sglang).items() if isinstance(value, FunctionType)]
        inherited = {
            name for name in methods if getattr(type(adapter), name) is getattr(Sglang, name)
        }
        assert inherited <= {"__init__", "__subclasshook__"}, shape
        assert all(text.endswith(".") for text in adapter.limits())


def test_values_of_a_request_are_taken_once() -> None:
    """As `SchedulerOutputStreamer` takes them: a slice by tokens with each part of an answer."""
    values = importlib.import_module("tlt_sglang.upstream.v19").Adapter().request_values()
    values.append(3)
    assert values[0:1] == [3]
    values += [4, 5]
    assert values[-1] == 5
    assert values[51:102] == [4, 5]
    assert values[102:110] == []


def test_the_adapter_is_that_of_the_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, shape in versions.SHAPES.items():
        upstream.current.cache_clear()
        monkeypatch.setattr(versions, "installed", lambda version=version: version)
        assert type(upstream.current()).__module__ == f"tlt_sglang.upstream.{shape}"
    upstream.current.cache_clear()
