"""sglang.srt.managers.scheduler_components.batch_result_processor, in the scheduler process.

The first token of an answer is accepted in its grammar before its end is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.results import AnsweredBatch, DecodeResult


@wraps_upstream(
    "sglang.srt.managers.scheduler_components.batch_result_processor:"
    "SchedulerBatchResultProcessor.advance_grammar_fsm",
    why="with overlap scheduling the grammar accepts the first token before SGLang asks for its "
    "end",
    remove_when="SGLang ends an answer at the same token with and without speculation",
    process="scheduler",
)
def advance_grammar_fsm(
    original: Upstream, processor: object, result: DecodeResult, batch: AnsweredBatch
) -> None:
    from tlt_sglang.engine.finishing import FINISHING

    advanced_before = result.grammar_advanced
    original(processor, result, batch)
    if result.grammar_advanced and not advanced_before and batch.forward_mode.is_extend():
        FINISHING.prefill_in_grammar(batch)


PATCHES = (advance_grammar_fsm,)
