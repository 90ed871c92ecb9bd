"""A log has room for as many tokens of a large target as of a small one, within bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tlt_sglang.harvest.log_size import LEAST_BYTES, MOST_BYTES, log_bytes
from tlt_sglang.harvest.writer import Writer


def test_a_configured_size_is_kept() -> None:
    assert log_bytes(0.02, 16384, free=0) == 20_000_000


def test_the_default_is_by_the_size_of_features() -> None:
    """Four hidden states of bfloat16: of an 8B target 32 kB a token, of a 70B one 64 kB."""
    assert log_bytes(None, 4 * 576) == LEAST_BYTES
    assert log_bytes(None, 4 * 4096) == pytest.approx(32768 * 32772)
    assert log_bytes(None, 4 * 8192) == MOST_BYTES
    assert log_bytes(None) == LEAST_BYTES  # before the target is known


def test_the_default_leaves_half_of_the_shared_memory_free() -> None:
    assert log_bytes(None, 4 * 4096, free=1_000_000_000) == 500_000_000
    assert log_bytes(None, 4 * 4096, free=300_000_000) == LEAST_BYTES


def test_a_log_holds_the_tokens_that_its_default_is_for(tmp_path: Path) -> None:
    """Prompts of up to half of them are logged whole: 16 thousand tokens of an 8B target."""
    writer = Writer.create(log_bytes(None, 4 * 4096), 4 * 4096, "bfloat16", tmp_path)
    assert 4 * writer.most_tokens > 0.99 * 32768
    writer.close()
