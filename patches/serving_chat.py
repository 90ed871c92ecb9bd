"""sglang.srt.entrypoints.openai.serving_chat, in the main process: limits and logprobs of chats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlt_sglang.patching.patch import wraps_upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tlt_sglang.serving.chat_stream import Logprobs
    from tlt_sglang.upstream.protocols import Upstream


@wraps_upstream(
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._generate_stream_content",
    why="SGLang drops the logprobs of tokens without text of their own, such as the last",
    remove_when="SGLang's streamed chats have as many logprobs as tokens",
    process="main",
)
def generate_stream_content(
    original: Upstream, serving: object, **arguments: Any
) -> AsyncIterator[str]:
    from sglang.srt.entrypoints.openai.sse_utils import build_sse_content

    from tlt_sglang.serving.chat_stream import with_all_logprobs

    def last(logprobs: Logprobs) -> str:
        chunk: str = build_sse_content(
            chunk_id=arguments["content"]["meta_info"]["id"],
            created=arguments["created"],
            model=arguments["request"].model,
            index=arguments["index"],
            content="",
            logprobs=logprobs,
        )
        return chunk

    return with_all_logprobs(
        lambda logprobs: original(serving, **arguments | {"choice_logprobs": logprobs}),
        last,
        # A dict that SGLang makes for each stream; its own keys are the indices of the choices.
        arguments["stream_offsets"],
        arguments["index"],
        arguments["choice_logprobs"],
        arguments["finish_reason_type"] is not None,
    )


@wraps_upstream(
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._validate_request",
    why="SGLang takes a limit of 0 tokens for none, and answers up to the end of the context",
    remove_when="SGLang obeys or refuses max_completion_tokens 0",
    process="main",
)
def validate_request(original: Upstream, serving: object, request: Any) -> str | None:
    for limit in ("max_completion_tokens", "max_tokens"):
        if getattr(request, limit) == 0:
            return f"{limit} is 0; it must be an integer of at least 1."
    refusal: str | None = original(serving, request)
    return refusal


PATCHES = (generate_stream_content, validate_request)
