"""sglang.srt.entrypoints.openai.serving_tokenize, in the main process: token ids to decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.entrypoints.openai.serving_tokenize:"
    "OpenAIServingDetokenize._handle_non_streaming_request",
    why="token ids that the tokenizer cannot read are answered with status 500",
    remove_when="SGLang answers them with status 400",
    process="main",
)
async def detokenize(
    original: Upstream, serving: Any, adapted_request: object, request: Any, raw_request: object
) -> object:
    from tlt_sglang.engine import admit

    problem = admit.decoding_problem(serving.tokenizer_manager, request.tokens)
    if problem is not None:
        return serving.create_error_response(problem)
    return await original(serving, adapted_request, request, raw_request)


PATCHES = (detokenize,)
