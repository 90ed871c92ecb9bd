"""sglang.srt.managers.schedule_batch, in the scheduler process: where an answer ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.kv_pool import PrefillBatch
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.results import AnsweredRequest


@wraps_upstream(
    "sglang.srt.managers.schedule_batch:Req.update_finish_state",
    why="of the stops in an accepted run SGLang takes the one that is listed first, not the one "
    "that comes first; and an exception for one request ended the engine",
    remove_when="SGLang ends an answer at the same token with and without speculation",
    process="scheduler",
)
def update_finish_state(
    original: Upstream, request: AnsweredRequest, new_accepted_len: int = 1
) -> None:
    from tlt_sglang.engine import shield
    from tlt_sglang.engine.finishing import FINISHING

    with shield.Examination(request):
        FINISHING.update(original, request, new_accepted_len)


@wraps_upstream(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend",
    why="a prefill of embeddings beside tokens ends the engine: the model gets too few rows",
    remove_when="SGLang prefills embeddings and tokens in one batch, or in two",
    process="scheduler",
)
def prepare_for_extend(original: Upstream, batch: PrefillBatch) -> None:
    from tlt_sglang.engine import embeddings

    original(batch)
    embeddings.place(batch)


PATCHES = (update_finish_state, prepare_for_extend)
