"""Digests of functions and classes, and the trees of source that they are read from."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.support.fakelang import MATHS, VERSION, plus_100, wheel, wrap
from tlt_sglang.errors import ConfigError, EnvironmentProblem, PatchError
from tlt_sglang.patching.patcher import Patcher
from tlt_sglang.patching.source import SourceTree, source_digest


def test_the_digest_is_of_the_code_alone() -> None:
    plain = "def f(a, b=1):\n    def g():\n        return 'x'\n    return a + b\n"
    dressed = (
        "X = 1\n\ndef f( a,\n  b = 1 ):  # why\n    '''Doc.'''\n\n    def g():\n"
        "        '''Doc.'''\n        return \"x\"\n    return (a + b)\n"
    )
    digest = source_digest(plain, "f")
    assert digest == source_digest(dressed, "f")
    assert len(digest) == 16
    for change in (("b=1", "b=2"), ("'x'", "'y'"), ("a + b", "b + a"), ("def f", "async def f")):
        assert source_digest(plain.replace(*change), "f") != digest


def test_the_digest_does_not_depend_on_the_python_version() -> None:
    """The value was computed on 3.11; f-strings are where versions differ."""
    source = "@d\nasync def f(a: int = 1, *b, **c) -> None:\n    return f\"{a!r:>{b['x']}} it's\"\n"
    assert source_digest(source, "f") == "c2654ad9f29552ff"


@pytest.mark.parametrize(
    ("source", "name", "changed"),
    [
        ("if x:\n    def f(): return 1\nelse:\n    def f(): return 2\n", "f", ("2", "3")),
        ("try:\n    from a import f\nexcept ImportError:\n    f = None\n", "f", ("None", "0")),
        ("from a import b, c as f\n", "f", ("c as", "d as")),
        ("import a.b\n", "a", ("a.b", "a.c")),
        ("with x:\n    A, (B, C) = 1, (2, 3)\n", "C", ("3", "4")),
        ("A: int = 1\nA += 1\n", "A", ("+= 1", "+= 2")),
        (
            "class A:\n    class B:\n        if x:\n            def f(self): pass\n",
            "A.B.f",
            ("pass", "1"),
        ),
        ("class A:\n    x: int = 1\n", "A.x", ("1", "2")),
    ],
)
def test_where_names_are_found(source: str, name: str, changed: tuple[str, str]) -> None:
    assert source_digest(source, name) != source_digest(source.replace(*changed), name)


def test_other_names_of_an_import_do_not_count() -> None:
    assert source_digest("from a import b, c", "c") == source_digest("from a import (d, c)", "c")


def test_a_name_that_is_not_there_is_an_error() -> None:
    for source in ("def g():\n    f = 1\n", "x.f = 1\nprint(f)\nd[f] = 1\n", "class f(: pass"):
        with pytest.raises(PatchError):
            source_digest(source, "f")


def test_trees(upstream: Path, tmp_path: Path) -> None:
    (upstream / "__init__.py").write_text("raise RuntimeError('imported')\n")
    installed = SourceTree.from_installed("fakelang")
    packed = SourceTree.from_wheel(wheel(tmp_path / "one.whl", MATHS, "2.0"))
    assert (installed.version, packed.version) == (VERSION, "2.0")
    assert installed.read("fakelang.maths") == packed.read("fakelang.maths") == MATHS
    assert "RuntimeError" in packed.read("fakelang")
    for tree in (installed, packed):
        with pytest.raises(PatchError, match=r"no module fakelang\.absent"):
            tree.read("fakelang.absent")
    with pytest.raises(EnvironmentProblem, match="not installed"):
        SourceTree.from_installed("fakelang_absent")
    with pytest.raises(ConfigError, match="not a wheel"):
        SourceTree.from_wheel(zip_without_metadata(tmp_path))


def zip_without_metadata(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "plain.zip", "w") as archive:
        archive.writestr("a.py", "")
    return folder / "plain.zip"


def test_another_version_is_told_apart(upstream: Path, tmp_path: Path) -> None:
    patcher = Patcher([wrap("double", plus_100), wrap("Worker.run", plus_100)], "any")
    changed = MATHS.replace("value * 2", "value * 3")
    one, two = patcher.check(SourceTree.from_wheel(wheel(tmp_path / "w.whl", changed, "2.0")))
    assert "double in SGLang 2.0 has no digest and differs from 1.2.3" in one
    assert "Worker.run in SGLang 2.0 is the same as in 1.2.3: test the patch there." in two
    assert patcher.check(SourceTree.from_installed("fakelang")) == []
