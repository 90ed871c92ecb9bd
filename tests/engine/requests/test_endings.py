"""Answers end at the same token, for the same reason, as in plain decoding.

First where texts of the default model give one verify step several ways to stop; then for requests
that are drawn at random, on a tiny target that answers hundreds of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fitting import Tiny, make_tiny
from tests.support.identity import PINNED, POOL, Reference
from tests.support.letters import add_tokenizer
from tests.support.long import first_and_long
from tests.support.servers import Server, Servers

CLOSE = 1e-3
"""Logprobs of one token, summed in two orders."""
OPTIONS = {
    "return_logprob": True,
    "top_logprobs_num": 2,
    "token_ids_logprob": [5, 6],
    "return_text_in_logprobs": True,
}
COUNTS = ("finish_reason", "prompt_tokens", "completion_tokens", "reasoning_tokens")
LISTS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")


def check(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the answers to one request."""
    assert got["output_ids"] == expected["output_ids"]
    assert got["text"] == expected["text"]
    meta, other = got["meta_info"], expected["meta_info"]
    for name in COUNTS:
        assert meta[name] == other[name], name
    assert meta["completion_tokens"] == len(got["output_ids"])
    for name in LISTS:
        assert len(meta[name]) == len(got["output_ids"]), name
    for one, two in zip(meta[LISTS[0]], other[LISTS[0]], strict=True):
        assert one[1:] == two[1:]
        assert one[0] == pytest.approx(two[0], abs=CLOSE)
    accepted = meta.get("spec_num_correct_drafts", 0)
    assert accepted < max(len(got["output_ids"]), 1)


def ask_both(
    servers: tuple[Server, Server], requests: list[tuple[Any, dict[str, Any]]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Send each request, a prompt and its sampling parameters, to both servers."""

    def ask(server: Server, prompt: Any, sampling: dict[str, Any]) -> dict[str, Any]:
        return server.generate(prompt, options=OPTIONS, **sampling)

    with ThreadPoolExecutor(8) as threads:
        answers = [
            [threads.submit(ask, server, *request) for server in servers] for request in requests
        ]
        return [(one.result(), two.result()) for one, two in answers]


# -- the default model ---------------------------------------------------------------------------


def ways_to_stop(pieces: list[str], ids: list[int], at: int) -> Iterator[dict[str, Any]]:
    """Yield parameters that end a text after token `at` and, listed first, two tokens later."""
    early, late = pieces[at], pieces[at + 1] + pieces[at + 2]
    yield {"stop": [late, early]}
    yield {"stop": [late, early], "no_stop_trim": True}
    yield {"stop_regex": [re.escape(late), re.escape(early)]}
    yield {"stop": [late], "stop_regex": [re.escape(early) + "$"]}
    yield {"stop_regex": [re.escape(late)], "stop": [early]}
    yield {"stop": [late], "stop_token_ids": [ids[at]], "ignore_eos": False}
    yield {"stop": [late, early], "stop_token_ids": [ids[at + 1]], "ignore_eos": False}
    yield {"stop": [late], "max_new_tokens": at + 1}
    yield {"stop_token_ids": [ids[at]], "min_new_tokens": at + 2, "ignore_eos": False}


def test_several_ways_to_stop(
    speculative: Server, plain: Server, reference: Reference, kind: str
) -> None:
    requests: list[tuple[Any, dict[str, Any]]] = []
    options = {"return_logprob": True, "return_text_in_logprobs": True}
    for prompt, at in ((0, 2), (0, 7), (6, 12)):
        whole = plain.generate(reference.prompts[prompt], 24, options=options)
        pieces = [text for _, _, text in whole["meta_info"]["output_token_logprobs"]]
        for sampling in ways_to_stop(pieces, whole["output_ids"], at):
            parameters = {"max_new_tokens": 24, "temperature": 0.0} | sampling
            requests.append((reference.prompts[prompt], parameters))
    for answers in ask_both((speculative, plain), requests):
        check(*answers)


def test_counting_has_two_stops_in_one_step(speculative: Server, plain: Server, kind: str) -> None:
    text = "Once upon a time there was a counting game: one two three four five, one two three f"
    both = ["ve, a", "r f"]
    ways: list[dict[str, Any]] = [
        {"stop": both},
        {"stop_regex": both},
        {"stop": both[:1], "stop_regex": both[1:]},
        {"stop": both, "stop_token_ids": [28], "ignore_eos": False},
        {"stop": both, "no_stop_trim": True},
    ]
    for answers in ask_both((speculative, plain), [(text, way) for way in ways]):
        check(*answers)


@pytest.mark.parametrize("regex", ["[0-9]{3}", "[0-9]{2},?", "(one )*"])
def test_a_grammar_that_is_finished(
    speculative: Server, plain: Server, kind: str, regex: str
) -> None:
    requests: list[tuple[Any, dict[str, Any]]] = [
        ("The first digits are", {"regex": regex, "ignore_eos": ignore, "max_new_tokens": limit})
        for ignore in (True, False)
        for limit in (3, 4, 8)
    ]
    for answers in ask_both((speculative, plain), requests):
        check(*answers)


def test_answers_that_fill_the_context(
    speculative: Server, plain: Server, reference: Reference, kind: str
) -> None:
    """Drafts of the last steps lie behind the context's end."""
    prompts = [
        (prompt * 100)[: 960 + 7 * number] for number, prompt in enumerate(reference.prompts[:4])
    ]
    parameters = {"max_new_tokens": None, "temperature": 0.0, "ignore_eos": True}
    for one, other in ask_both((speculative, plain), [(each, parameters) for each in prompts]):
        check(one, other)
        meta = one["meta_info"]
        assert meta["prompt_tokens"] + meta["completion_tokens"] >= 1022  # SGLang keeps two free


def test_cached_tokens(speculative: Server, plain: Server, kind: str, reference: Reference) -> None:
    prompt = reference.prompts[3]

    def counts(server: Server) -> list[int]:
        server.wait_until_idle()
        server.post("/flush_cache")
        first = server.generate(prompt, 12)
        longer = [*prompt, *first["output_ids"], *prompt[:5]]
        answers = [
            first,
            server.generate(prompt, 12),
            server.generate(longer, 4),
            server.generate([*prompt[:-2], 17, 18, 19], 4),
            server.generate(longer[:-3], 4),
        ]
        return [answer["meta_info"]["cached_tokens"] for answer in answers]

    assert counts(speculative) == counts(plain)


# -- a tiny target -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny target with a tokenizer, and drafters that it often agrees with."""
    made = make_tiny(tmp_path_factory.mktemp("reader"))
    add_tokenizer(made.path)
    return made


def tiny_server(servers: Servers, reader: Tiny, strategy: str) -> Server:
    flags = ["--reasoning-parser", "qwen3"]
    drafter = None if strategy == "off" else reader.drafters["eagle"]
    if strategy == POOL:
        flags += ["--tlt-policy", "random"]
    return servers.get(strategy, *flags, model=reader.path, drafter=drafter)


def some(values: list[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), max_size=most, unique=True)


sampling = st.fixed_dictionaries(
    {
        "temperature": st.just(0.0),
        "max_new_tokens": st.integers(1, 24),
        "ignore_eos": st.booleans(),
    },
    optional={
        "stop": some(["t", "th", "n h", "é", "kk", "1,", "in", "k,", "�", " t", "hi", "< "], 3),
        "stop_regex": some(["t$", "^.h", "[tn] ?[hik]", "\\d, ?\\d", "i.{0,3}k", "[^t]*h"], 2),
        "stop_token_ids": some([*range(3, 20)], 2),
        "no_stop_trim": st.booleans(),
        "min_new_tokens": st.integers(0, 6),
        "regex": st.sampled_from(["[th]{2}", "(th|i)*", "[12]{3}", "[ hikt]{1,6}", "t+h?"]),
    },
)
prompts = st.lists(st.integers(3, 23), min_size=1, max_size=8)


@pytest.mark.parametrize("strategy", first_and_long((POOL, PINNED)))
def test_drawn_requests(servers: Servers, reader: Tiny, strategy: str) -> None:
    plain = tiny_server(servers, reader, "off")
    speculative = tiny_server(servers, reader, strategy)

    @settings(
        max_examples=15, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(st.lists(st.tuples(prompts, sampling), min_size=20, max_size=20))
    def compare(requests: list[tuple[list[int], dict[str, Any]]]) -> None:
        for _, parameters in requests:
            if "regex" in parameters:
                # An end of the grammar before `min_new_tokens` contradicts it.
                parameters.pop("min_new_tokens", None)
            if parameters.get("min_new_tokens", 0) > parameters["max_new_tokens"]:
                parameters["min_new_tokens"] = parameters["max_new_tokens"]
        body = {
            "input_ids": [prompt for prompt, _ in requests],
            "sampling_params": [parameters for _, parameters in requests],
            "require_reasoning": True,
        }
        answers = [server.post("/generate", body | OPTIONS) for server in (speculative, plain)]
        for got, expected in zip(*answers, strict=True):
            check(got, expected)

    compare()
    speculative.wait_until_idle()
    accepted = speculative.scheduler()["strategies"].values()
    assert sum(tally["accepted"] for tally in accepted) > 100
