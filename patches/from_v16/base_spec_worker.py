"""sglang.srt.speculative.base_spec_worker, in the scheduler process: flushes n-grams, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.clear_cache_pool",
    why="after /flush_cache nothing of earlier requests remains, our n-grams included",
    remove_when="SGLang tells plugins when its caches are flushed",
    process="scheduler",
)
def clear_cache_pool(original: Upstream, worker: object) -> None:
    from tlt_sglang.engine import engine

    original(worker)
    if (pool := engine.require().step.pool) is not None:
        pool.flush()


PATCHES = (clear_cache_pool,)
