"""Remove what killed processes of SGLang leave in shared memory, and nothing of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tlt_sglang.launcher import leftovers


def test_only_segments_of_this_server_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers, "_FOLDER", tmp_path)
    monkeypatch.setattr(leftovers, "_servers", set())
    dead = next(pid for pid in range(2**22 - 1, 1, -1) if not Path(f"/proc/{pid}").exists())
    names = {
        "ours": "sglang_loads_0a1b2c3d4e5f_12345678.shm",
        "theirs": "sglang_loads_ffffffffffff_12345678.shm",
        "a dead process's": f"sgl_shm_mq_{dead}_abcdef01",
        "a live process's": f"sgl_shm_mq_{os.getpid()}_abcdef01",
        "no process's": "sgl_shm_mq_name_abcdef01",
        "foreign": "other",
    }
    for name in names.values():
        (tmp_path / name).touch()
    leftovers.belongs_to("")
    leftovers.belongs_to("0a1b2c3d4e5f")
    leftovers.remove()
    remaining = {path.name for path in tmp_path.iterdir()}
    assert set(names.values()) - remaining == {names["ours"], names["a dead process's"]}
