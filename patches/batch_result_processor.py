"""sglang.srt.managers.scheduler_components.batch_result_processor, in the scheduler process.

The accepted run of a verify step is cut where plain decoding ends the answer, before it is counted,
stored and streamed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from collections.abc import Callable

    from tlt_sglang.patching.patch import Patch
    from tlt_sglang.upstream.protocols import Upstream
    from tlt_sglang.upstream.results import AnsweredBatch, AnsweredRequest, DecodeResult


def _wrapped(name: str, why: str) -> Callable[[Upstream], Patch]:
    return wraps_upstream(
        "sglang.srt.managers.scheduler_components.batch_result_processor:"
        f"SchedulerBatchResultProcessor.{name}",
        why=why,
        remove_when="SGLang ends an answer at the same token with and without speculation",
        process="scheduler",
    )


@_wrapped(
    "_accept_grammar_tokens",
    "SGLang ends an accepted run where its grammar terminates; plain decoding, one token later",
)
def accept_grammar_tokens(
    original: Upstream, processor: object, req: AnsweredRequest, tokens: int | list[int]
) -> list[int]:
    from tlt_sglang.engine.finishing import FINISHING

    run = [tokens] if isinstance(tokens, int) else tokens
    return FINISHING.accept_in_grammar(lambda token: original(processor, req, token), req, run)


@_wrapped(
    "_resolve_spec_v2_tokens",
    "tokens behind the end of an answer are counted as its reasoning tokens and accepted drafts",
)
def resolve_spec_v2_tokens(
    original: Upstream, processor: object, result: DecodeResult, batch: AnsweredBatch
) -> list[list[int]]:
    from tlt_sglang.engine.finishing import FINISHING

    runs: list[list[int]] = original(processor, result, batch)
    FINISHING.cut(batch, result, runs)
    return runs


PATCHES = (accept_grammar_tokens, resolve_spec_v2_tokens)
