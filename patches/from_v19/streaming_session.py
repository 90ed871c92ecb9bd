"""sglang.srt.session.streaming_session, in the scheduler process: what a session keeps."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import Turn
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.session.streaming_session:StreamingSession.try_cache_finished_req",
    why="the next turn of a session reads keys and values of the last token that no step has "
    "computed, so that its answer differs from plain decoding's",
    remove_when="SGLang prefills the last token of a turn with the next one under speculation",
    process="scheduler",
)
def try_cache_finished_req(
    original: Upstream, sessions: object, req: Turn, **options: object
) -> bool:
    from tlt_sglang.engine import engine
    from tlt_sglang.engine.sessions import keep

    scheduler = engine.require().scheduler
    speculates = scheduler is not None and scheduler.draft_worker is not None
    return keep(functools.partial(original, sessions, req, **options), req, speculates)


PATCHES = (try_cache_finished_req,)
