"""sglang.srt.mem_cache.registry, in the scheduler process: the keys of the prefix cache.

EAGLE's draft KV of a token is computed from the token after it, so SGLang keys the prefix cache
with pairs of tokens, and one token less is found in it. With single tokens a request finds as many
as in plain decoding. Where its text leaves a cached one, one slot of draft KV is from the other
text; the drafter may guess worse, and the target, which verifies, reads none of it. SGLang itself
does so for models with recurrent states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.results import CacheContext


@wraps_upstream(
    "sglang.srt.mem_cache.registry:default_radix_cache_factory",
    why="with EAGLE one cached token less is found than in plain decoding, and prefilled again",
    remove_when="SGLang finds as many cached tokens with EAGLE as without",
    process="scheduler",
)
def default_radix_cache_factory(original: Upstream, context: CacheContext) -> object:
    context.params.is_eagle = False
    return original(context)


PATCHES = (default_radix_cache_factory,)
