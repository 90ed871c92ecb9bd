"""sglang.srt.mem_cache.common, in the scheduler process: slots for drafts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream

_MODULE = "sglang.srt.mem_cache.common"


@wraps_upstream(
    f"{_MODULE}:get_req_to_token_extra_context_len",
    why="drafts of an answer that fills the context are written behind its row of the table",
    remove_when="SGLang's rows hold what a decode step reserves, for pages of one token, too",
    process="scheduler",
)
def get_req_to_token_extra_context_len(original: Upstream, server_args: Any) -> int:
    from sglang.srt.mem_cache import common

    extra: int = original(server_args)
    if server_args.speculative_algorithm is None:
        return extra
    reserve: int = common.get_alloc_reserve_per_decode(server_args)
    return max(extra, reserve + int(server_args.page_size))


@wraps_upstream(
    f"{_MODULE}:get_alloc_len_per_decode",
    why="a pool's flags are as deep and as wide as its strategies together, which none of them is",
    remove_when="SGLang's runtime states hold whole strategies",
    process="scheduler",
    only_on="cuda",
)
def get_alloc_len_per_decode(original: Upstream, *args: object) -> int:
    from tlt_sglang.engine import engine

    upstream = functools.partial(original, *args)
    return engine.require().step.slots.of_pool(upstream, engine.require().config.pool)


PATCHES = (get_req_to_token_extra_context_len, get_alloc_len_per_decode)
