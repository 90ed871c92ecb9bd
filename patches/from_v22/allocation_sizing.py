"""sglang.srt.mem_cache.allocation_sizing, in the scheduler process: where slots are short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.mem_cache.allocation_sizing:get_alloc_reserve_per_decode",
    why="where the KV pool is short, a step reserves fewer slots for drafts, or none",
    remove_when="SGLang finishes with speculation every request that it finishes without",
    process="scheduler",
)
def get_alloc_reserve_per_decode(original: Upstream) -> int:
    from tlt_sglang.engine import engine

    return engine.require().step.slots.reserve(original)


PATCHES = (get_alloc_reserve_per_decode,)
