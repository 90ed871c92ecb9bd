"""The installed SGLang has the names that TLT relies on beside the targets of patches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tlt_sglang.patching.source import SourceTree
from tools.upstream import missing_attributes, missing_imports, words


def test_the_imports_of_the_product_exist() -> None:
    """Adapters and patches of other shapes may import what is not there, and so may sessions of
    weight updates, which older shapes do not have."""
    missing = missing_imports(SourceTree.from_installed("sglang"))
    others = ("tlt_sglang/upstream/", "patches/v", "patches/from_", "tlt_sglang/engine/weight_sync")
    assert [line for line in missing if not line.startswith(others)] == []


def test_missing_imports_are_listed() -> None:
    empty = SourceTree(
        "0", {"sglang/srt/runtime_context.py": b"def get_parallel(): ..."}.__getitem__
    )
    missing = list(missing_imports(empty))
    assert any(line.endswith(": sglang.srt.runtime_context.get_spec") for line in missing)
    assert not any("get_parallel" in line for line in missing)


def test_attributes_are_looked_up_in_the_source() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    files = (Path(spec.origin).parent / "srt" / "speculative").glob("*.py")
    source_words = words(path.read_bytes() for path in files)
    assert {"EAGLEWorkerV2", "_topk1_parents_prealloc", "speculative_num_steps"} < source_words
    missing = [line.split()[-1] for line in missing_attributes(source_words)]
    assert "DraftWorker._topk1_parents_prealloc" not in missing
    nothing = [line.split()[-1] for line in missing_attributes(frozenset())]
    assert {*missing, "DraftWorker._topk1_parents_prealloc"} < set(nothing)
