"""The upstream package of the patcher's tests, on the path of one test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakelang import MATHS, USER, VERSION
from tlt_sglang.patching.patch import (
    Patch,
)
from tlt_sglang.patching.patcher import Patcher


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "fakelang"
    (root / "deep").mkdir(parents=True)
    (root / "__init__.py").write_text("")
    (root / "maths.py").write_text(MATHS)
    (root / "user.py").write_text(USER)
    (root / "deep" / "__init__.py").write_text("from ..maths import double as twice\n")
    info = tmp_path / f"fakelang-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fakelang\nVersion: {VERSION}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield root
    for name in [name for name in sys.modules if name.split(".")[0] == "fakelang"]:
        del sys.modules[name]
    assert sys.meta_path == finders


@pytest.fixture
def patcher_of(upstream: Path) -> Iterator[Callable[..., Patcher]]:
    """Makes patchers on the fake upstream, and takes their patches back after the test."""
    made: list[Patcher] = []

    def make(*patches: Patch, device: Any = "cpu") -> Patcher:
        made.append(Patcher(patches, device))
        return made[-1]

    yield make
    for patcher in reversed(made):
        patcher.revert()
