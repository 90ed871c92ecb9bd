"""The patches against the SGLang that is installed: they fit, and their table is current."""

from __future__ import annotations

import pytest

import apply_patches
from tlt_sglang import patches
from tlt_sglang.patches import all_patches, patches_of
from tlt_sglang.patching.patch import table
from tlt_sglang.upstream import versions


def test_the_patches_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert apply_patches.main(["--check"]) == 0, capsys.readouterr().out


def test_the_table_is_current() -> None:
    current = apply_patches.TABLE.read_text(encoding="utf-8")
    expected = table(all_patches(), list(versions.SHAPES))
    assert current == expected, "run: python apply_patches.py --write-table"


def test_every_patch_file_is_listed() -> None:
    folder = apply_patches.TABLE.parent
    files = {
        ".".join(path.relative_to(folder).with_suffix("").parts)
        for path in folder.rglob("*.py")
        if path.stem != "__init__"
    }
    listed = [name for names in patches.SHAPES.values() for name in names]
    assert files == {*patches.SHARED, *listed}


def test_every_version_has_the_digests_of_its_patches() -> None:
    assert {path.stem for path in patches.DIGESTS.glob("*")} == set(versions.SHAPES)
    for version, shape in versions.SHAPES.items():
        targets = {patch.target for patch in patches_of(shape)}
        assert set(patches._digests(version)) == targets, version
        assert all(version in patch.digests for patch in patches_of(shape))


def test_every_shape_has_patches() -> None:
    assert set(patches.SHAPES) == set(versions.SHAPES.values())
