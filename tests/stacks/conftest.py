"""Tests of stacks share their servers, and leave nothing behind, as engine tests do."""

from __future__ import annotations

from tests.engine.conftest import servers
from tests.engine.test_weights import share_through_files

__all__ = ["servers", "share_through_files"]
