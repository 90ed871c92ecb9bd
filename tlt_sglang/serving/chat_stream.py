"""Logprobs of a streamed chat: every token has its own, in the order of the tokens.

SGLang sends the logprobs of a step with the text of that step, and drops them if it has none: an
end of sequence, or a part of a character. Here they wait for the next text, or for the end. Runs in
the HTTP process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

Logprobs = dict[str, list[object]]
"""`ChoiceLogprobs` of the OpenAI API: "content" has one entry per token."""


async def with_all_logprobs(
    stream: Callable[..., AsyncIterator[str]],
    last: Callable[[Logprobs], str],
    state: dict[object, Any],
    index: int,
    logprobs: Logprobs | None,
    finished: bool,
) -> AsyncIterator[str]:
    """Yield the chunks of one step of choice `index`, with the logprobs of steps that had none.

    `stream` returns the step's chunks and adds the logprobs it is called with to the first of them;
    `last` returns a chunk of logprobs alone. `state` is the stream's own, kept between its steps.
    """
    key = ("logprobs", index)
    waiting: Logprobs | None = state.pop(key, None)
    if waiting is not None:
        logprobs = waiting if logprobs is None else _joined(waiting, logprobs)
    sent = False
    async for chunk in stream(logprobs):
        sent = True
        yield chunk
    if sent or logprobs is None:
        return
    if finished:
        yield last(logprobs)
    else:
        state[key] = logprobs


def _joined(first: Logprobs, second: Logprobs) -> Logprobs:
    return second | {"content": [*first["content"], *second["content"]]}
