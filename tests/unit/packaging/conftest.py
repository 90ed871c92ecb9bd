"""The wheel, built once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import wheels


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("wheel"))
