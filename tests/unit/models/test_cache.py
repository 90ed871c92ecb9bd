"""Folders in the cache: whole or absent, whoever is interrupted or races."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tlt_sglang.errors import EnvironmentProblem
from tlt_sglang.models.cache import STALE_SECONDS, build, cache_root, is_complete

FILES = ("config.json", "model.safetensors")


def fill(target: Path) -> None:
    """Write every file, empty."""
    for name in FILES:
        (target / name).touch()


def test_the_default_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TLT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "tlt_sglang"


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def slow(target: Path) -> None:
        fill(target)
        assert target.parent == folder.parent
        assert not folder.exists()

    build(folder, slow, FILES)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_first_of_two_racing_conversions_wins(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def overtaken(target: Path) -> None:
        fill(target)
        build(folder, fill, FILES)
        (folder / "first").touch()

    build(folder, overtaken, FILES)
    assert (folder / "first").is_file()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_files_missing_is_rebuilt(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / FILES[0]).touch()
    build(folder, fill, FILES)
    assert is_complete(folder, FILES)


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".model.tmp-old", tmp_path / ".model.tmp-young"
    for left in (old, young):
        left.mkdir()
    long_ago = time.time() - 2 * STALE_SECONDS
    os.utime(old, (long_ago, long_ago))
    build(tmp_path / "model", fill, FILES)
    assert not old.exists()
    assert young.exists()


def test_an_unwritable_cache_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="set TLT_CACHE"):
        build(tmp_path / "file" / "model", fill, FILES)
