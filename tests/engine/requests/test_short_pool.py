"""Where KV slots for drafts are short, every request is answered as in plain decoding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import requests

from tests.support.identity import PINNED, POOL
from tests.support.long import first_and_long
from tests.support.servers import Server, Servers

SLOTS = 200
LIMITS = ("--max-total-tokens", str(SLOTS), "--max-running-requests", "2")
ALONE = ((140, 50), (170, 25), (188, 10), (192, 6), (193, 5), (190, 9), (194, 6), (20, 175))
"""Tokens of a prompt and of its answer; the pool holds them with few slots to spare, or none."""
STRATEGIES = {
    "pool": POOL,
    "pool without plain decoding": "eagle:3x1x4,eagle:3x4x8",
    "one strategy": PINNED,
    "n-grams": "ngram:8",
}


@dataclass(frozen=True)
class Case:
    """A request of so many tokens of prompt and of answer; equal seeds have equal prompts."""

    prompt: int
    answer: int
    seed: int
    ignore_eos: bool = True

    @property
    def ids(self) -> list[int]:
        return [
            (self.seed * 7919 + position * 31) % 40_000 + 100 for position in range(self.prompt)
        ]


def pairs() -> list[tuple[Case, Case]]:
    """Return requests of which two at once need all slots, and sometimes more."""
    rng = random.Random(4)
    made = []
    for number in range(12):
        two = []
        for seed in (100 + number, 200 + number):
            prompt = rng.randrange(20, 150)
            answer = rng.randrange(10, min(60, SLOTS - prompt - 2))
            two.append(Case(prompt, answer, seed, ignore_eos=number % 3 == 0))
        made.append((two[0], two[1]))
    return made


Answer = list[int] | str
"""The tokens, or what was wrong with the request."""


def answer(server: Server, case: Case) -> Answer:
    try:
        tokens: list[int] = server.generate(case.ids, case.answer, ignore_eos=case.ignore_eos)[
            "output_ids"
        ]
    except requests.HTTPError as error:
        return str(error)
    return tokens


def all_answers(server: Server) -> list[Answer]:
    """Return the answers to requests alone, then to two at once; no slot remains in use."""
    answers = [answer(server, Case(*sizes, seed)) for seed, sizes in enumerate(ALONE)]
    with ThreadPoolExecutor(2) as threads:
        for two in pairs():
            answers += threads.map(lambda case: answer(server, case), two)
    server.wait_until_idle()
    return answers


@pytest.fixture(scope="module")
def expected(servers: Servers) -> list[Answer]:
    """Return the answers of plain decoding."""
    return answers_of(servers, servers.get("off", *LIMITS))


def answers_of(servers: Servers, server: Server) -> list[Answer]:
    """Return all answers of a server that no other test uses, and stop it."""
    try:
        return all_answers(server)
    finally:
        servers.drop(server)


def server_of(servers: Servers, drafters: dict[str, str], kind: str) -> Server:
    strategies = STRATEGIES[kind]
    flags = ["--tlt-policy", "random"] if "," in strategies else []
    drafter = drafters["eagle"] if "eagle" in strategies else None
    return servers.get(strategies, *LIMITS, *flags, drafter=drafter)


@pytest.mark.parametrize("kind", first_and_long(STRATEGIES))
def test_no_request_is_lost(
    servers: Servers, drafters: dict[str, str], expected: Sequence[Answer], kind: str
) -> None:
    answers = answers_of(servers, server_of(servers, drafters, kind))
    assert all(isinstance(tokens, list) for tokens in expected[:6])
    assert answers == expected
