"""sglang.srt.managers.schedule_batch, in the scheduler process: slots for drafts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import DecodeBatch
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.check_decode_mem",
    why="a request is retracted or aborted for want of slots for drafts, which it can do without",
    remove_when="SGLang finishes with speculation every request that it finishes without",
    process="scheduler",
)
def check_decode_mem(
    original: Upstream, batch: DecodeBatch, selected_indices: Sequence[int] | None = None
) -> bool:
    from tlt_sglang.engine import engine

    current = engine.require()
    upstream = functools.partial(original, batch, selected_indices)
    return current.step.slots.fits(upstream, current.scheduler, batch)


PATCHES = (check_decode_mem,)
