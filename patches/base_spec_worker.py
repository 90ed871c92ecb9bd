"""sglang.srt.speculative.base_spec_worker, in the scheduler process: n-grams are flushed, too."""

from __future__ import annotations

from typing import Any

from tlt_sglang.patching.patch import wraps_upstream


@wraps_upstream(
    "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.clear_cache_pool",
    why="after /flush_cache nothing of earlier requests is left, our n-grams included",
    remove_when="SGLang tells plugins when its caches are flushed",
    process="scheduler",
    digests={"0.5.23": "786eaf96e8f2ab2a"},
)
def clear_cache_pool(original: Any, worker: Any) -> None:
    from tlt_sglang.engine import engine

    assert engine.current is not None
    original(worker)
    if engine.current.step.pool is not None:
        engine.current.step.pool.flush()


PATCHES = (clear_cache_pool,)
