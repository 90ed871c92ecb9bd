"""sglang.srt.speculative.ngram_worker, in the scheduler process: counts accepted drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.speculative.ngram_worker:NGRAMWorker.on_verify_complete_cpu",
    why="SGLang updates its own totals only when it prints a log line",
    remove_when="SGLang's accept-length totals are current at any time",
    process="scheduler",
)
def on_verify_complete_cpu(
    original: Upstream, worker: object, num_correct_drafts_per_req: list[int], batch_size: int = 0
) -> None:
    from tlt_sglang.engine import engine

    engine.require().step.verified(num_correct_drafts_per_req)
    original(worker, num_correct_drafts_per_req, batch_size)


PATCHES = (on_verify_complete_cpu,)
