"""Each token of a streamed chat has its logprob once, in order, whatever text its step has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hypothesis import given
from hypothesis import strategies as st

from tlt_sglang.serving.chat_stream import Logprobs, with_all_logprobs

Step = tuple[int, str, bool]
"""Tokens, text, and whether the stream sends logprobs of a step without text by itself."""


def chunk(text: str, logprobs: Logprobs | None) -> str:
    return f"{text}:{'' if logprobs is None else ','.join(map(str, logprobs['content']))}"


async def send(steps: list[Step], state: dict[object, object]) -> list[str]:
    """Send the steps as SGLang does."""
    chunks = []
    token = 0
    for i, (count, text, flushes) in enumerate(steps):
        content: list[object] = list(range(token, token + count))
        token += count

        async def stream(
            logprobs: Logprobs | None, text: str = text, flushes: bool = flushes
        ) -> AsyncIterator[str]:
            if text or (flushes and logprobs is not None):
                yield chunk(text, logprobs)

        sent = with_all_logprobs(
            stream,
            lambda logprobs: chunk("", logprobs),
            state,
            0,
            {"content": content} if content else None,
            finished=i == len(steps) - 1,
        )
        chunks += [piece async for piece in sent]
    return chunks


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["", "a", "bc"]), st.booleans()), min_size=1
    )
)
def test_no_logprob_is_lost_or_sent_twice(steps: list[Step]) -> None:
    state: dict[object, object] = {}
    chunks = asyncio.run(send(steps, state))
    sent = [int(n) for piece in chunks for n in piece.split(":")[1].split(",") if n]
    assert sent == list(range(sum(count for count, *_ in steps)))
    assert "".join(piece.split(":")[0] for piece in chunks) == "".join(text for _, text, _ in steps)
    assert state == {}


def test_they_wait_for_the_next_text() -> None:
    steps = [(1, "a", False), (2, "", False), (1, "b", False), (1, "", False)]
    assert asyncio.run(send(steps, {})) == ["a:0", "b:1,2,3", ":4"]
