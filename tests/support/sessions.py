"""Send the turns of a session, one after the other."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.servers import Server


@dataclass(frozen=True)
class Turn:
    """One turn: all tokens before its answer, the answer, and the tokens found in the cache."""

    prompt: list[int]
    answer: list[int]
    cached_tokens: int


def send_turns(
    server: Server, chunks: Sequence[list[int]], max_new_tokens: int, streaming: bool
) -> list[Turn]:
    """Open a session, send a turn for each chunk of token ids, close it; return the turns."""
    name, request, tokens, turns = uuid.uuid4().hex, None, list[int](), list[Turn]()
    opening: dict[str, object] = {"session_id": name, "capacity_of_str_len": 10_000}
    server.post("/open_session", opening | ({"streaming": True} if streaming else {}))
    for chunk in chunks:
        options = {"session_params": {"id": name, "rid": request}}
        answer = server.generate(chunk, max_new_tokens, options=options)
        info = answer["meta_info"]
        assert info["prompt_tokens"] == len(tokens) + len(chunk)
        turns.append(Turn([*tokens, *chunk], answer["output_ids"], info["cached_tokens"]))
        tokens += [*chunk, *answer["output_ids"]]
        request = info["id"]
    server.post("/close_session", {"session_id": name})
    return turns
