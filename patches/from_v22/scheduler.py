"""sglang.srt.managers.scheduler, in the scheduler process: steps that cannot overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import DecodeBatch
    from tlt_sglang.upstream.protocols import Scheduler, Upstream


@wraps_upstream(
    "sglang.srt.managers.scheduler:Scheduler.update_running_batch",
    why="where slots for drafts are short, the next step waits for the outcome of the one in "
    "flight, and no request is retracted; with penalties and custom logit processors it waits, "
    "too, as they would count its tokens one step late",
    remove_when="SGLang finishes with speculation every request that it finishes without, and "
    "counts penalised tokens in the forward pass",
    process="scheduler",
)
def update_running_batch(
    original: Upstream, scheduler: Scheduler, batch: DecodeBatch
) -> DecodeBatch | None:
    from tlt_sglang.engine import engine

    if engine.require().step.slots.waits(scheduler, batch):
        return None
    updated: DecodeBatch | None = original(scheduler, batch)
    return updated


PATCHES = (update_running_batch,)
