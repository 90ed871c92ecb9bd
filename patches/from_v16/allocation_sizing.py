"""sglang.srt.mem_cache.allocation_sizing, in the scheduler process: slots for drafts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.mem_cache.allocation_sizing:get_req_to_token_extra_context_len",
    why="drafts of an answer that fills the context are written behind its row of the table",
    remove_when="SGLang's rows hold what a decode step reserves, for pages of one token, too",
    process="scheduler",
)
def get_req_to_token_extra_context_len(original: Upstream, *args: object) -> int:
    from sglang.srt.mem_cache import allocation_sizing as sizing

    from tlt_sglang import upstream

    sglang, extra = upstream.current(), int(original(*args))
    if sglang.spec().speculative_algorithm is None:
        return extra
    reserve: int = sizing.get_alloc_reserve_per_decode()
    return max(extra, reserve + sglang.page_size())


@wraps_upstream(
    "sglang.srt.mem_cache.allocation_sizing:get_alloc_len_per_decode",
    why="a pool's flags are as deep and as wide as its strategies together, which none of them is",
    remove_when="SGLang's runtime states hold whole strategies",
    process="scheduler",
    only_on="cuda",
)
def get_alloc_len_per_decode(original: Upstream, *args: object) -> int:
    from tlt_sglang.engine import engine

    upstream = functools.partial(original, *args)
    return engine.require().step.slots.of_pool(upstream, engine.require().config.pool)


PATCHES = (
    get_alloc_len_per_decode,
    get_req_to_token_extra_context_len,
)
