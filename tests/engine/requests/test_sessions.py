"""Each turn of a session is answered as in plain decoding, with as many tokens from the cache."""

from __future__ import annotations

import pytest

from tests.support.identity import PINNED, POOL, Reference, difference
from tests.support.long import first_and_long
from tests.support.servers import Server, Servers
from tests.support.sessions import Turn, send_turns

FLAG = "--enable-streaming-session"
LENGTHS = (12, 5)
"""Tokens of an answer; a verify step ends at one of them, and runs past the other."""
PINS = ("eagle:3x1x4", "eagle:3x4x8", "ngram:4", None)
PROMPTS = (0, 6)
STRATEGIES = {"pool": POOL, "one strategy": PINNED}

Turns = dict[tuple[bool, int, int], list[Turn]]
"""The turns by streaming, prompt and length of the answers."""


def all_turns(server: Server, reference: Reference) -> Turns:
    """Return the turns of every session here, of which each begins with an empty cache."""
    turns = {}
    for streaming in (True, False):
        for prompt in PROMPTS:
            ids = reference.prompts[prompt]
            chunks = [ids[:20], ids[20:26], ids[26:27], ids[27:40] or [28]]
            for length in LENGTHS:
                server.wait_until_idle()
                server.post("/flush_cache")
                turns[streaming, prompt, length] = send_turns(server, chunks, length, streaming)
    server.wait_until_idle()
    return turns


@pytest.fixture(scope="module")
def plain_turns(servers: Servers, reference: Reference) -> Turns:
    """Return the turns of plain decoding."""
    server = servers.get("off", FLAG)
    try:
        return all_turns(server, reference)
    finally:
        servers.drop(server)


def compare(got: Turns, expected: Turns, reference: Reference) -> None:
    for session, turns in expected.items():
        for number, (turn, plain) in enumerate(zip(got[session], turns, strict=True)):
            assert turn.cached_tokens == plain.cached_tokens, (session, number)
            if difference(reference.off(), plain.prompt, plain.answer, turn.answer) is not None:
                break  # a tie, after which the turns have other prompts


@pytest.mark.parametrize("kind", first_and_long(STRATEGIES))
def test_every_turn(
    servers: Servers,
    drafters: dict[str, str],
    reference: Reference,
    plain_turns: Turns,
    kind: str,
) -> None:
    flags = ["--tlt-policy", "random"] if kind == "pool" else []
    server = servers.get(STRATEGIES[kind], FLAG, *flags, drafter=drafters["eagle"])
    try:
        for pin in PINS if kind == "pool" else (None,):
            if kind == "pool":
                server.post("/tlt/strategy", {"strategy": pin})
            compare(all_turns(server, reference), plain_turns, reference)
    finally:
        servers.drop(server)
